"""The folder of a run, and what it says of itself."""
