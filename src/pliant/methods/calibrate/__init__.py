"""Choosing calibration text: `(candidates, count, *, seed, options) -> Selection`."""
