"""Discrete counterparts of float layers, a module a kind."""
