"""What is compared: every method's recipe, the four settings that are tried on other authors, and what they chose.

Trials forget authors 86-90 and keep the setting that came nearest to that split's gold in the probability of forgotten
and of kept answers (``tune.objective: distance``); what is reported are other authors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Values = dict[str, Any]
_CLREG: Values = {"clreg": {"temperature": 0.5, "weight": 1.0, "dropout": 0.1}}
_LORA: Values = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_RILA: Values = {"initialise": {"rila": {"beta": 0.5}}, "model": {"lora": _LORA}, "statistics": {"rows": 200}}
_RATES = [2e-4, 5e-4, 1e-3, 2e-3]
_AS_SHIPPED: tuple[Values, ...] = ({}, *({"optimiser.lr": lr} for lr in (2e-3, 4e-3, 7e-3)))
_RATES_RILA = [4e-4, 8e-4, 1.5e-3, 3e-3]


@dataclass(frozen=True)
class Method:
    """A recipe over the study's own settings, and what is tried in it.

    Attributes:
        recipe: A recipe that ships, which the values change; None: the study's settings alone.
        values: Nested values of a recipe.
        trials: Recipe keys with their values, one object a trial; the first is taken where there are no trials.
        taught: Whether it learns from models of all but a quarter of the original's rows (`tofu_tiny.WITHOUT`).
    """

    values: Values = field(default_factory=dict)
    trials: tuple[Values, ...] = ()
    recipe: str | None = None
    taught: bool = False


def _published(forget: Values, regularise: Values | None = None, *, rila: bool = False) -> Method:
    objective = {"forget": forget, "retain": {"nll": {}}, "regularise": regularise or {}}
    own = {"objective": objective, **(_RILA if rila else {})}
    return Method(own, tuple({"optimiser.lr": lr} for lr in (_RATES_RILA if rila else _RATES)))


METHODS: Mapping[str, Method] = {
    "npo": _published({"npo": {"beta": 0.1}}),
    "simnpo": _published({"simnpo": {"beta": 2.5}}),
    "simnpo+clreg": _published({"simnpo": {"beta": 2.5}}, _CLREG),
    "ihl+rila": _published({"ihl": {}}, rila=True),
    "clreg+rila": _published({"simnpo": {"beta": 2.5}}, _CLREG, rila=True),
    "default": Method(recipe="gold-like", trials=_AS_SHIPPED),
    "strangers": Method(recipe="gold-like-strangers", trials=_AS_SHIPPED, taught=True),
}
#: Not trained here at all: what stands at either end.
ENDS = ("original", "gold2")
