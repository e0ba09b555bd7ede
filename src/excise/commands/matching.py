"""Never-seen rows as easy as the forgotten, chosen by a model that saw neither, before anything is trained."""

from __future__ import annotations

from excise import models, recipe
from excise.alike import alike
from excise.commands.measuring.evaluation import load_for_measuring
from excise.commands.progress import Progress
from excise.commands.starting import sides
from excise.commands.starting.sides import CALIBRATION, TRAINING
from excise.commands.watching import row_likelihoods
from excise.errors import UsageError
from excise.metrics.statistics import auc
from excise.records import fingerprint

#: A model that is said never to have seen the forget rows and finds them likelier this often has to be asked about.
DOUBTED = 0.8


def match(settings: recipe.Recipe, given: sides.Sides, progress: Progress) -> None:
    """Leave, of the never-seen rows that training and the stopping rule read, those like the forget rows (`alike`).

    What is measured stays whole. The model of ``data.never_saw`` is read once and let go; without one nothing is done.

    Raises:
        UsageError: The task is no language model's, or neither training nor the rule reads never-seen rows.
        InputRefused: A model that cannot be loaded, or rows that do not fit into it.
    """
    if not settings.data.never_saw:
        return
    if settings.model.task != "causal_lm":
        raise UsageError("data.never_saw is for language models: leave it out for a classifier")
    read = [side for side in (TRAINING, CALIBRATION) if len(given.records.get(side, [])) > 1]
    if not read:
        raise UsageError("data.never_saw chooses among never-seen rows, and neither training nor stop.rule reads any")
    with progress.stage("match: never-seen rows"):
        model, tokenizer = load_for_measuring(settings.data.never_saw, settings)
        rows = sides.encode(
            given, ["forget", *read], tokenizer, settings.data, seed=settings.seed,
            context=models.context_length(model),
        )  # fmt: skip
        mine = row_likelihoods(model, rows, "forget")
        for side in read:
            others = row_likelihoods(model, rows, side)
            if (share := float(auc(mine, others))) > DOUBTED:
                given.warnings.append(
                    f"data.never_saw: this model finds the forgotten row the likelier one in {share:.0%} of pairs with "
                    f"{side.replace('_', ' ')} rows: make sure that it never saw them"
                )
            chosen = [given.records[side][i] for i in alike(mine, others, seed=settings.seed)]
            # Beside the file's own: a resumed run is held to both, so that another model at that path is noticed.
            given.sources[f"{side}-alike"] = {"rows": len(chosen), "fingerprint": fingerprint(chosen)}
            given.records[side] = chosen
