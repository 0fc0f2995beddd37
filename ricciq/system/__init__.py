"""Files, processes, signals and the network: nothing of the field."""
