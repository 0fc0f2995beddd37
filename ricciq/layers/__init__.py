"""Discrete counterparts of float layers, a module a kind; those imported here are registered."""

from ricciq.layers import conv as conv
from ricciq.layers import conv1d as conv1d
from ricciq.layers import conv_transpose as conv_transpose
from ricciq.layers import linear as linear
