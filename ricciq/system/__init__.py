"""Files, processes, signals and the network; nothing about quantization."""
