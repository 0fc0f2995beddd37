"""The verbs as plain functions."""
