"""excise: remove chosen training data from language models, and show how far that succeeded.

The commands are functions of the same name: `demo`, `finetune`, `plan`, `run`, `tune`, `evaluate`, `score`, `report`.
They are loaded when they are first used, so that importing the package is cheap.

Example:
    >>> import excise
    >>> data = {"forget": "forget.jsonl", "retain": "retain.jsonl"}
    >>> settings = excise.recipe.build({"model": {"name": "my-model"}, "data": data})
    >>> excise.run(settings, out="runs/first")  # doctest: +SKIP
    PosixPath('runs/first/report.html')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from excise import recipe

if TYPE_CHECKING:
    from excise.commands.demonstration import demo
    from excise.commands.evaluating import evaluate
    from excise.commands.planning import plan
    from excise.commands.running import run
    from excise.commands.scoring import report, score
    from excise.commands.training import finetune
    from excise.commands.tuning import tune

__version__ = "0.1.0"

__all__ = ["__version__", "demo", "evaluate", "finetune", "plan", "recipe", "report", "run", "score", "tune"]

_WHERE = {
    "demo": "demonstration",
    "finetune": "training",
    "plan": "planning",
    "run": "running",
    "tune": "tuning",
    "evaluate": "evaluating",
    "score": "scoring",
    "report": "scoring",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"excise.commands.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'excise' has no attribute {name!r}")
