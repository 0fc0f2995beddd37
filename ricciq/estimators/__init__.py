"""Gradient estimators: what becomes of a gradient taken at discrete values."""
