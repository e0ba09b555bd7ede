"""Terms of the objective, by name: what forgets, what retains, what regularises.

`FORGET`, `RETAIN` and `REGULARISE` map the names that recipes use to factories. A factory takes plain options and
returns a `Term` or a tuple of them. To add one: a function and a factory, a row in a table, the formula with loops in
``tests/oracles.py``, an entry in ``docs/objectives.md``; the contract test picks the row up by itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping

from excise.objectives.forget import altpo, dpo, ga, idk_nll, npo, satimp, simnpo, wga
from excise.objectives.forget_class import bad_teacher, relabel
from excise.objectives.forget_distil import NEVER_SAW, distil, likelihood
from excise.objectives.forget_quantile import quantile
from excise.objectives.forget_wide import ceu, ihl, pdu, rmu, rmu_direction, undial
from excise.objectives.regularise import clreg
from excise.objectives.regularise_class import deepcut, deepcut_cautions
from excise.objectives.regularise_lora import rol
from excise.objectives.regularise_match import latent_match
from excise.objectives.retain import anchor, kl, nll, primal_dual, rmu_retain
from excise.objectives.term import Dual, Ramp, Term, Weight

Factory = Callable[..., Term | tuple[Term, ...]]


def source_of(factory: Factory) -> str:
    """Where a term comes from, for the manifest and the report: the ``Source:`` paragraph of its docstring.

    Empty where there is none, a stranger's factory for instance, or Python running without docstrings.

    Example:
        >>> source_of(npo)
        'Zhang et al. 2024, arXiv 2404.05868.'
    """
    found = re.search(r"^Source:\s*(.+?)(?:\n\s*\n|\Z)", inspect.getdoc(factory) or "", re.DOTALL | re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


FORGET: Mapping[str, Factory] = {
    "ga": ga,
    "wga": wga,
    "satimp": satimp,
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "altpo": altpo,
    "idk_nll": idk_nll,
    "ihl": ihl,
    "undial": undial,
    "pdu": pdu,
    "ceu": ceu,
    "rmu": rmu,
    "relabel": relabel,
    "bad_teacher": bad_teacher,
    "distil": distil,
    "likelihood": likelihood,
    "quantile": quantile,
}

RETAIN: Mapping[str, Factory] = {
    "nll": nll,
    "kl": kl,
    "rmu_retain": rmu_retain,
    "primal_dual": primal_dual,
    "anchor": anchor,
}

REGULARISE: Mapping[str, Factory] = {
    "clreg": clreg,
    "latent_match": latent_match,
    "deepcut": deepcut,
    "rol": rol,
}

__all__ = [
    "FORGET",
    "NEVER_SAW",
    "REGULARISE",
    "RETAIN",
    "Dual",
    "Factory",
    "Ramp",
    "Term",
    "Weight",
    "deepcut_cautions",
    "rmu_direction",
    "source_of",
]
