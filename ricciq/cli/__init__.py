"""The command line."""

from ricciq.cli.app import main as main
