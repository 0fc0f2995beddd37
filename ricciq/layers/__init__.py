"""Discrete counterparts of float layers, one module for each kind; importing registers them."""

from ricciq.layers import conv as conv
from ricciq.layers import conv1d as conv1d
from ricciq.layers import conv_transpose as conv_transpose
from ricciq.layers import linear as linear
