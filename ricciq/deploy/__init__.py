"""From a discrete model to a file, and from a file to a runtime."""
