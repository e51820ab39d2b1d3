"""Recipes of the language models of reasoning, gathered: `unet.RECIPES` takes them in, for all records of image
networks hang on the list of families."""

from __future__ import annotations

from stepmark.backbones import (
    Recipe,
    analogists,
    deducers,
    demonstrators,
    knowers,
    navigators,
    proceduralists,
    solvers,
)

RECIPES: dict[str, Recipe] = (
    solvers.RECIPES
    | deducers.RECIPES
    | demonstrators.RECIPES
    | analogists.RECIPES
    | proceduralists.RECIPES
    | navigators.RECIPES
    | knowers.RECIPES
)
