"""Calibration text and the statistics that a pass over it leaves."""

from pliant.observe.statistics import Statistics

__all__ = ["Statistics"]
