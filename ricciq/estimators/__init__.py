"""Gradient estimators: how a gradient taken at discrete values is corrected."""
