"""Recipes: a loss as data; :mod:`pykd.composition.recipe` under its public name."""

from pykd.composition.recipe import build, dumps, load

__all__ = ["build", "dumps", "load"]
