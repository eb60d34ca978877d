"""The main job: open, observe, build rungs, order the climb, write the artifact."""

from pliant.fit.pipeline import fit
from pliant.fit.recipe import Recipe, default_recipe, read_recipe
from pliant.fit.result import FitResult, summary

__all__ = ["FitResult", "Recipe", "default_recipe", "fit", "read_recipe", "summary"]
