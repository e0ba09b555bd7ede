"""What every attack is given: a model, the rows that it was to forget and those beside them, and how rows are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from excise.attacks.lending import Weights
from excise.forward import Anatomy
from excise.records import Record
from excise.tasks import causal_lm

Precision = Callable[[], AbstractContextManager]
Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Target:
    """A model under attack, and all else that does not depend on which attack it is.

    An attack is a function of a target and of settings of its own. It gives an `Outcome`, and leaves the model as it
    was, bit for bit.

    Attributes:
        model: The model under attack.
        anatomy: Where its parts are.
        tokenizer: Its tokenizer.
        records: Side -> rows. "forget" is what the attacker wants; what an attack costs is seen on `kept_side`.
        encoding: How text becomes tokens.
        seed: Of everything that is drawn.
        precision: Makes the context of a pass, autocast for instance; measurements use it too.
        progress: Called with (done, all); each attack says of what.
        original: The weights before unlearning, by name and each in its parameter's shape (`lending.weights_of`), for
            attacks on what unlearning changed.

    Example:
        >>> from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
        >>> from excise.attacks import quantise
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=2))
        >>> rows = {"forget": [Record("Who wrote it?", "Ada."), Record("Where?", "In Rome.")]}
        >>> target = Target(model, Anatomy.of(model), ByT5Tokenizer(), rows, causal_lm.Encoding())
        >>> quantise.attack(target, bits=["8", "4"]).values["forget"].shape  # budgets (unrounded first), rows
        (3, 2)
    """

    model: nn.Module
    anatomy: Anatomy
    tokenizer: Any
    records: Mapping[str, Sequence[Record]]
    encoding: causal_lm.Encoding
    seed: int = 0
    precision: Precision = nullcontext
    progress: Progress = None
    original: Weights | None = None

    @property
    def forget(self) -> Sequence[Record]:
        """The rows that the attacker wants; none where there is no such side."""
        return self.records.get("forget", ())

    @property
    def kept_side(self) -> str | None:
        """The side that answers for what should stay: ``untouched`` where there is one, else ``retain``, else none."""
        return next((side for side in ("untouched", "retain") if self.records.get(side)), None)

    @property
    def device(self) -> torch.device:
        """Where the model is, and its batches go."""
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        """A token to pad with."""
        own = self.tokenizer.pad_token_id
        return int(own if own is not None else self.tokenizer.eos_token_id)

    def tell(self, done: int, of: int) -> None:
        """Report progress where somebody listens."""
        if self.progress is not None:
            self.progress(done, of)
