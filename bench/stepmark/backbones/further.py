"""Recipes of the language models of reasoning, gathered: `unet.RECIPES` takes them in, for all records of image networks hang
on the list of families."""

from __future__ import annotations

from stepmark.backbones import Recipe, deducers, solvers

RECIPES: dict[str, Recipe] = solvers.RECIPES | deducers.RECIPES
