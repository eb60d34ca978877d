"""Errors meant for people: what was wrong, what was expected, what to do."""

from __future__ import annotations


class PliantError(Exception):
    """Base of every error that Pliant raises on purpose; `exit_code` is the shell's status."""

    exit_code = 1


class CheckpointError(PliantError):
    """A checkpoint is missing, damaged, or holds values that cannot be compressed."""

    exit_code = 3


class UnsupportedModelError(PliantError):
    """An architecture holds a part that Pliant could not recognise; the message names it."""

    exit_code = 4


class BudgetError(PliantError):
    """A budget is malformed or smaller than the smallest size; the message gives that size."""

    exit_code = 5


class CorruptError(PliantError):
    """An artifact's bytes do not match their checksum or their description."""

    exit_code = 6


class RecipeError(PliantError):
    """A recipe is malformed, or names a method, option or target that does not exist."""

    exit_code = 7
