"""Pliant: the best model that fits a memory budget, running, and resized live."""
