"""Calibration text and the statistics that a pass over it leaves."""

from pliant.observe.calibration import choose_windows, digest, write_text
from pliant.observe.candidates import Candidates, Selection, mean_states, perturbed_losses
from pliant.observe.statistics import Statistics
from pliant.observe.sweep import Observation, Sweep
from pliant.observe.text import WINDOW, load_text, split, windows

__all__ = [
    "WINDOW",
    "Candidates",
    "Observation",
    "Selection",
    "Statistics",
    "Sweep",
    "choose_windows",
    "digest",
    "load_text",
    "mean_states",
    "perturbed_losses",
    "split",
    "windows",
    "write_text",
]
