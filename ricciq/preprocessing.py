"""The module of `Preprocessing` in version 0.1, for scripts that import it from here."""

from ricciq.data.preprocessing import Preprocessing

__all__ = ["Preprocessing"]
