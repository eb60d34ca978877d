"""The main job: open, observe, build rungs, order the climb, write the artifact."""

from pliant.fit.pipeline import FitResult, fit, summary
from pliant.fit.recipe import Recipe, default_recipe, read_recipe

__all__ = ["FitResult", "Recipe", "default_recipe", "fit", "read_recipe", "summary"]
