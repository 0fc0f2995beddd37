"""Run the command line: python -m ricciq."""

from ricciq.cli import main

if __name__ == "__main__":
    main()
