"""The operators that a file is made of, a module a format."""
