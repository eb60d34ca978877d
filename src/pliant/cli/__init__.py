"""The command line: one verb, one file."""

from pliant.cli.main import main

__all__ = ["main"]
