"""The forms of data that --data takes, one module for each."""
