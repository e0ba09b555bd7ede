"""What strangers, golds and those who learned from strangers say of the same forgotten sentences, all pooled.

    python studies/deepcut/teachers.py --encoder DIR [--out DIR] [--strangers KIND ...] [--data NAME]

First the sentences of the ten draws at 1 %, which but for two are those of the first two draws at 5 % and of the first
at 10 %; then those of all reported draws at 5 %. Strangers are told which one of them never saw a sentence; beside that
what `data.never_saw` makes of it, which believes whoever finds the sentence least likely. ``--encoder`` and ``--out``
as for `run.py`, whose models and run folders are used: the rows of `distil` on these draws have to be there. Prints F1.
``--strangers`` names kinds of strangers (`rows.PARTS`); then they alone are compared, each, and their mean. All that is
of WNUT17; of another data set (``--data``) the first draw at 5 % alone is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import scoring
from rows import DRAWS, PARTS, TAUGHT_ON
from run import SIZES
from splits import TAGGED
from study import Study

from excise import models, recipe
from excise.artifacts import Number
from excise.commands.starting import sides
from excise.metrics import class_scores

TASK = "token_classification"
Draw = tuple[str, int]  # a split, and the seed of its gold


def main() -> None:
    """Read, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("studies-out") / "deepcut")
    parser.add_argument("--strangers", nargs="+", default=[], choices=sorted(PARTS), metavar="KIND")
    parser.add_argument("--data", default="wnut17", choices=sorted(TAGGED))
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(given.out, given.encoder, SIZES["whole"])
    small: list[Draw] = [(f"random01-{n}", 0) for n in range(DRAWS)]
    every: list[Draw] = [(f"random05-{n}", n) for n in TAUGHT_ON]
    shown = Shown(study, given.data)
    if given.strangers:
        for draws in (small, every) if given.data == "wnut17" else (every[:1],):
            shown.compared(draws, given.strangers)
    elif given.data == "wnut17":
        everyone(shown, small, every)
    else:
        shown.golds("gold", every[:1])
        for kind in ("quarters", "twenty-epochs"):
            shown.pupils(f"pupil, {kind}", every[:1], kind)
        shown.strangers(every[:1], "quarters")


def everyone(shown: Shown, small: list[Draw], every: list[Draw]) -> None:
    """Golds, pupils and strangers."""
    print("1 %, ten draws:")
    for name, draws in (("1 %", small), ("5 %", every[:2]), ("10 %", [("random10-0", 0)])):
        shown.golds(f"golds of {name}", draws)
        shown.pupils(f"pupils of {name}, quarters", draws, "quarters")
    for kind in ("eighths", "ten-epochs"):
        shown.pupils(f"pupils of 1 %, {kind}", small, kind)
    for kind in ("quarters", "eighths"):
        shown.strangers(small, kind)
    print("5 %, all draws:")
    shown.golds("golds", every)
    shown.pupils("pupils, quarters", every, "quarters")
    shown.strangers(every, "quarters")


class Shown:
    """F1 of models on the forgotten sentences of draws, pooled, a line each."""

    def __init__(self, study: Study, data: str) -> None:
        self.study, self.data, self.train = study, data, study.sides(data)["train"]
        self.how = sides.encoding(recipe.Data())
        config = models.load(recipe.Model(name=str(study.original(data)[0]), task=TASK)).config
        self.names = tuple(config.id2label[i] for i in range(config.num_labels))

    def golds(self, name: str, draws: Sequence[Draw]) -> None:
        """Of each draw the model that was trained without it."""
        self._of(name, draws, lambda draw: self.study.gold(self.data, *draw)[0])

    def pupils(self, name: str, draws: Sequence[Draw], kind: str) -> None:
        """Of each draw the model that learned from strangers."""
        folder = self.study.out / "rows"
        self._of(name, draws, lambda draw: folder / f"{self.data}-{draw[0]}-distil-{kind}-s{draw[1]}" / "model")

    def _of(self, name: str, draws: Sequence[Draw], model: Callable[[Draw], Path]) -> None:
        said = [z for draw in draws for z in self._said(model(draw), self._rows([draw]))]
        self._print(name, said, self._rows(draws))

    def strangers(self, draws: Sequence[Draw], kind: str) -> None:
        """Of each sentence the model that never saw it; and the one that finds it least likely."""
        rows = self._rows(draws)
        said, true = self._heard(rows, kind)
        least = np.array([[self._mean(z, i) for z, i in zip(own, rows, strict=True)] for own in said]).argmin(0)
        self._print(f"strangers, {kind}", [said[p][j] for j, p in enumerate(true)], rows)
        self._print(f"the same, believed ({(least == true).mean():.2f} right)",
                    [said[p][j] for j, p in enumerate(least)], rows)  # fmt: skip

    def compared(self, draws: Sequence[Draw], kinds: Sequence[str]) -> None:
        """Strangers of several kinds, each, and the mean of what they say."""
        rows, every = self._rows(draws), []
        for kind in kinds:
            said, true = self._heard(rows, kind)
            every.append([said[p][j].log_softmax(-1) for j, p in enumerate(true)])
            self._print(f"strangers, {kind}", every[-1], rows)
        if len(kinds) > 1:
            mean = [torch.stack(own).exp().mean(0).log() for own in zip(*every, strict=True)]
            self._print("mean of these", mean, rows)

    def _rows(self, draws: Sequence[Draw]) -> list[int]:
        return [i for split, _ in draws for i in self.study.forgotten(self.data, split)]

    def _heard(self, rows: Sequence[int], kind: str) -> tuple[list[list[Tensor]], np.ndarray]:
        """What each stranger says of the rows, and which of them never saw a row."""
        said = [self._said(place, rows) for place, _ in self.study.strangers(self.data, PARTS[kind])]
        part = np.empty(len(self.train), int)
        for number, held in enumerate(PARTS[kind].of(len(self.train))):
            part[held] = number
        return said, part[rows]

    def _said(self, place: Path, rows: Sequence[int]) -> list[Tensor]:
        return scoring.logits_of(place, [self.train[i] for i in rows], TASK, self.how)

    def _mean(self, logits: Tensor, row: int) -> float:
        labels = torch.tensor([self.names.index(tag) for tag in self.train[row].tags])
        return float(logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean())

    def _print(self, name: str, said: list[Tensor], rows: Sequence[int]) -> None:
        made = scoring.tables({"forget": said}, {"forget": [self.train[i] for i in rows]}, self.names)
        found = Number.of(class_scores.score(made).values["forget_f1"]).value
        print(f"  {name}: {found:.3f} ({len(rows)} sentences)", flush=True)


if __name__ == "__main__":
    main()
