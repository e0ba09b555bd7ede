"""What is to be forgotten and how: frozen dataclasses, filled from strict YAML and command-line overrides."""

from excise.recipe.reading import build, changed, dump, load, plain, put, read_yaml, shipped
from excise.recipe.schema import (
    Data,
    Evaluate,
    Model,
    Objective,
    Optimiser,
    Recipe,
    Schedule,
    Statistics,
    Stop,
    Tune,
)

__all__ = [
    "Data",
    "Evaluate",
    "Model",
    "Objective",
    "Optimiser",
    "Recipe",
    "Schedule",
    "Statistics",
    "Stop",
    "Tune",
    "build",
    "changed",
    "dump",
    "load",
    "plain",
    "put",
    "read_yaml",
    "shipped",
]
