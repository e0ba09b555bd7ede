"""excise: remove chosen training data from language models, and show how far that succeeded.

The commands are functions of the same name: `demo`, `finetune`, `plan`, `run`, `tune`, `evaluate`, `score`, `report`,
`export`, `verify`, `canaries`, `audit`, `cut`; `default_recipe` is what `run` does without a recipe. For PEFT models of
your own: `initialize_lora_rila_weights`, `get_rila_state_dict`, `save_lora_adapter`.
All of it is loaded when it is first used, so that importing the package is cheap.

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
    from excise.commands.auditing import audit, canaries
    from excise.commands.cutting import cut
    from excise.commands.demonstration import demo
    from excise.commands.evaluating import evaluate
    from excise.commands.exporting import export
    from excise.commands.finetuning import finetune
    from excise.commands.planning import plan
    from excise.commands.running import run
    from excise.commands.scoring import report, score
    from excise.commands.starting.choosing import default_recipe
    from excise.commands.successive.outside import add_run
    from excise.commands.successive.requests import request
    from excise.commands.successive.standing import check_ledger, reverify, show_ledger
    from excise.commands.tuning import tune
    from excise.commands.verifying import verify
    from excise.initialise.for_peft import get_rila_state_dict, initialize_lora_rila_weights, save_lora_adapter

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "add_run",
    "audit",
    "canaries",
    "check_ledger",
    "cut",
    "default_recipe",
    "demo",
    "evaluate",
    "export",
    "finetune",
    "get_rila_state_dict",
    "initialize_lora_rila_weights",
    "plan",
    "recipe",
    "report",
    "request",
    "reverify",
    "run",
    "save_lora_adapter",
    "score",
    "show_ledger",
    "tune",
    "verify",
]

_WHERE = {
    "add_run": "commands.successive.outside",
    "check_ledger": "commands.successive.standing",
    "request": "commands.successive.requests",
    "reverify": "commands.successive.standing",
    "show_ledger": "commands.successive.standing",
    "audit": "commands.auditing",
    "canaries": "commands.auditing",
    "cut": "commands.cutting",
    "default_recipe": "commands.starting.choosing",
    "demo": "commands.demonstration",
    "finetune": "commands.finetuning",
    "plan": "commands.planning",
    "run": "commands.running",
    "tune": "commands.tuning",
    "evaluate": "commands.evaluating",
    "score": "commands.scoring",
    "report": "commands.scoring",
    "verify": "commands.verifying",
    "export": "commands.exporting",
    "get_rila_state_dict": "initialise.for_peft",
    "initialize_lora_rila_weights": "initialise.for_peft",
    "save_lora_adapter": "initialise.for_peft",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"excise.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'excise' has no attribute {name!r}")
