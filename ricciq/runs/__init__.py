"""The folder of a run, and the metadata of its model."""
