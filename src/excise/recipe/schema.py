"""The fields of a recipe, with their defaults and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Model:
    """The model to change, or (with ``config``) to train from scratch.

    Attributes:
        task: What the model does: write text, tag tokens (IOB2), or give a text its class.
        name: Hub id or folder.
        revision: Commit, tag or branch on the hub.
        config: Fields of a transformers config, ``model_type`` included: a new model instead of ``name``.
        tokenizer: Hub id or folder; default the model's own.
        tokenizer_size: Train a byte-level BPE tokenizer of this size on the data instead (from scratch only).
        precision: ``fp32``, ``bf16`` (weights), ``bf16-mixed`` (fp32 weights, bf16 matrix products), or ``auto``: the
            weights' own type; on a CPU a short probe decides between ``fp32`` and ``bf16-mixed``.
        attention: Attention implementation; default the model's own.
        lora: Any field of PEFT's ``LoraConfig``; absent means full fine-tuning.
        train_only: Regular expression of the parameters to train; absent means all.
        gradient_checkpointing: Recompute activations in the backward pass.
    """

    task: Literal["causal_lm", "token_classification", "sequence_classification"] = "causal_lm"
    name: str = ""
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    tokenizer_size: int | None = None
    precision: Literal["auto", "fp32", "bf16", "bf16-mixed"] = "auto"
    attention: str | None = None
    lora: dict[str, Any] | None = None
    train_only: str | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Data:
    """Where the rows come from. What is not given makes the metrics that need it read "not shown".

    Attributes:
        forget: Rows to forget (JSONL path or ``hub:owner/name:config:split``).
        retain: Rows to keep.
        untouched: A share of ``retain`` (0 to 1) that unlearning never trains on, or a source of its own.
        never_seen: Rows of the same kind that no model was trained on.
        alternatives: Refusals or other answers for DPO-like objectives: one per line, drawn by (seed, row).
        paraphrases: Where objectives that read ``forget_paraphrase`` get it: built-in ``rules``, the ``data`` (rows
            then also serve the evaluation, which flatters it), or a callable ``module:function`` from text to text.
        utility: More sets to evaluate on, by name.
        train: Further sources for ``finetune`` beside ``retain`` (and ``forget``).
        template: How a prompt is written before its answer, for tokenizers without a chat template.
        chat: Use the tokenizer's chat template: ``auto`` where it has one, ``always``, ``never``.
        max_length: Longest row in tokens.
        truncate: Cut longer answers (and texts that have a class) instead of refusing them.
        long: What becomes of longer rows that have no prompt: ``split`` them between words (not within an entity), or
            ``refuse``; default: texts of a language model are split, rows of a classifier refused.
        tag_names: Names of the classes by number, for rows that give numbers instead of names.
        limit: Use at most this many rows of each side (for trials).
    """

    forget: str = ""
    retain: str = ""
    untouched: float | str = 0.2
    never_seen: str | None = None
    alternatives: str | None = None
    paraphrases: str = "rules"
    utility: dict[str, str] = field(default_factory=dict)
    train: tuple[str, ...] = ()
    template: str = "{prompt}\n"
    chat: Literal["auto", "always", "never"] = "auto"
    max_length: int = 512
    truncate: bool = False
    long: Literal["split", "refuse"] | None = None
    tag_names: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Objective:
    """Terms by name with their settings: ``{"npo": {"beta": 0.1, "weight": 1.0}}``; several add up."""

    forget: dict[str, Any] = field(default_factory=lambda: {"simnpo": {"beta": 2.5}})
    retain: dict[str, Any] = field(default_factory=lambda: {"nll": {}})
    regularise: dict[str, Any] = field(default_factory=lambda: {"clreg": {"weight": 0.1}})


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how many rows of each side in one.

    Attributes:
        epochs: Passes over the forget rows (over the retain rows where nothing is forgotten).
        steps: Optimizer steps instead of epochs.
        forget_batch: Forget rows in a micro-batch.
        retain_batch: Retain rows in a micro-batch.
        accumulate: Micro-batches in an optimizer step.
        retain_steps: Retain-only optimizer steps after each step that forgets.
        mixed: Draw natural batches of ``forget_batch + retain_batch`` rows from all rows together, instead of so many
            of each side; an epoch is a pass over both sides, and a step without a forget row only retains.
        contrast_batch: Further retain rows in a micro-batch that forgets, which only serve as contrast.
        balance: Rows drawn so that every class occurs about equally often, for classifiers: of the retain and the
            ``contrast`` rows (``classes``), of the latter only (``contrast``), or of none.
    """

    epochs: float = 10
    steps: int | None = None
    forget_batch: int = 16
    retain_batch: int = 16
    accumulate: int = 1
    retain_steps: int = 0
    mixed: bool = False
    contrast_batch: int = 0
    balance: Literal["none", "classes", "contrast"] = "none"


@dataclass(frozen=True)
class Optimiser:
    """How weights move: ``adamw``, or ``muon`` (hidden matrices, from scratch) with ``adamw`` for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-5
    adamw_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    decay: Literal["linear", "cosine", "constant"] = "linear"
    floor: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class Evaluate:
    """What is measured after the run.

    Attributes:
        gold: A model that was trained without the forget rows, where there is one.
        batch_tokens: Tokens in an evaluation batch.
        max_rows: Rows of each side that are measured (the first ones).
        generate: New tokens per generated answer; 0 switches ROUGE off.
        rewordings: Score paraphrases and false answers too (what truth ratios and forget quality read).
        latent: Measure hidden states.
        relearn_steps: Steps at which the relearning curve is read.
        relearn_lr: Learning rate of the relearning attack; default the run's own.
        include_text: Keep generated and original text of forget rows in the run folder and the report.
        map: Two-dimensional map of hidden states: ``pca``, ``umap`` (extra) or ``none``.
        cache: Folder that keeps what was measured of originals and golds, for runs that share them. Hidden states of
            forget rows are in it: treat it as the data itself. Answers to ``tasks`` are not kept.
        tasks: Multiple-choice tasks to ask the models (extra ``mcq``): files with ``question``, ``choices`` and
            ``answer``, or names of lm-evaluation-harness (``wmdp_bio``, ``mmlu``), which need the hub.
    """

    gold: str | None = None
    batch_tokens: int = 4096
    max_rows: int = 400
    generate: int = 64
    rewordings: bool = True
    latent: bool = True
    relearn_steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    relearn_lr: float | None = None
    include_text: bool = False
    map: Literal["pca", "umap", "none"] = "pca"
    cache: str | None = None
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tune:
    """What `excise tune` searches: recipe key -> list of values, or ``{"low":, "high":, "log":}``."""

    space: dict[str, Any] = field(default_factory=dict)
    objective: str = "distance"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistics:
    """How the statistics behind a start (or a basis of the retained) are taken: one pass over the rows of a side.

    Attributes:
        pooling: What counts as one observation of a layer's output: each ``token``, the mean over a ``row``, or its
            ``sum``.
        positions: Positions that are read: all ``attended`` ones, or those of the ``answer``.
        center: Subtract the mean (a covariance), or not (a second moment).
        rows: Use at most this many rows of each side, the first ones.
        preset: ``official`` takes them as the public code of ReGLU does, whatever the other keys say: sums over all
            positions, padding included, not centred, of the first 256 rows.
        layers_at_once: Layers whose statistics are held at a time. All at once (the default) need a matrix of the
            output's width squared, or of the weight's size for FILA, for every layer and side; fewer cost a pass over
            the rows for each group.
        cache: Folder that keeps what was taken, for runs that share model, rows and settings.
    """

    pooling: Literal["token", "row", "sum"] = "token"
    positions: Literal["attended", "answer"] = "attended"
    center: bool = True
    rows: int | None = None
    preset: Literal["official"] | None = None
    layers_at_once: int | None = None
    cache: str | None = None


@dataclass(frozen=True)
class Stop:
    """When a run has gone far enough: where forgotten rows look like never-seen ones and the retained are still good.

    Attributes:
        rule: ``two_sided``, or ``none``: run to the end.
        band: Admissible share of pairs in which a forgotten row is likelier than a never-seen one of its kind.
        quality: Lowest admissible probability of the watched retained rows, as a share of the original's.
        calibration: Never-seen rows that the rule reads and the evaluation does not: a share of ``data.never_seen``
            (whole groups), or a source of its own.
        watch: Retained rows that the rule reads and neither training nor evaluation does: a share of ``data.retain``.
        rows: Most rows of each side in a check.
        every: Steps between checks.
        near: Look after every step once the statistic is this close above the band.
        patience: Checks after the best one before giving up on a better one.
    """

    rule: Literal["none", "two_sided"] = "none"
    band: tuple[float, ...] = (0.45, 0.55)
    quality: float = 0.98
    calibration: float | str = 0.5
    watch: float = 0.1
    rows: int = 100
    every: int = 5
    near: float = 0.15
    patience: int = 5


@dataclass(frozen=True)
class Recipe:
    """A whole run. Every field has a default; a recipe file names only what it changes.

    ``initialise`` names where an adapter starts, with its settings: ``{"rila": {"beta": 0.5}}``; empty means plain.

    Example:
        >>> from excise.recipe import build
        >>> recipe = build({"model": {"name": "m"}, "optimiser": {"lr": "5e-5"}})
        >>> recipe.optimiser.lr
        5e-05
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    initialise: dict[str, Any] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    schedule: Schedule = field(default_factory=Schedule)
    optimiser: Optimiser = field(default_factory=Optimiser)
    stop: Stop = field(default_factory=Stop)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tune: Tune = field(default_factory=Tune)
    seed: int = 0
    out: str | None = None
    checkpoint_every: int = 0
    log_every: int = 1
