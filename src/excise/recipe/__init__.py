"""What is to be forgotten and how: frozen dataclasses, filled from strict YAML and command-line overrides."""

from excise.recipe.reading import build, changed, dump, load, plain, put, read_yaml, shipped
from excise.recipe.schema import (
    Data,
    Edit,
    Evaluate,
    Model,
    Muse,
    Objective,
    Optimiser,
    Recipe,
    ResetRows,
    Schedule,
    Statistics,
    Stop,
    Tune,
)
from excise.recipe.thresholds import Verify

__all__ = [
    "Data",
    "Edit",
    "Evaluate",
    "Model",
    "Muse",
    "Objective",
    "Optimiser",
    "Recipe",
    "ResetRows",
    "Schedule",
    "Statistics",
    "Stop",
    "Tune",
    "Verify",
    "build",
    "changed",
    "dump",
    "load",
    "plain",
    "put",
    "read_yaml",
    "shipped",
]
