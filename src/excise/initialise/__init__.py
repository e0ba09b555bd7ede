"""How an adapter begins: statistics of its layers on forget and retain rows, and the factors made from them."""

from excise.initialise.collect import collect, shares_input
from excise.initialise.moments import (
    Moments,
    contrast,
    contrast_directions,
    leading_directions,
    merge,
)
from excise.initialise.streaming import Accumulator
from excise.initialise.taking import adapted_linears

__all__ = [
    "Accumulator",
    "Moments",
    "adapted_linears",
    "collect",
    "contrast",
    "contrast_directions",
    "leading_directions",
    "merge",
    "shares_input",
]
