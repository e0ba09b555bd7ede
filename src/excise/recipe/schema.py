"""The fields of a recipe, with their defaults and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from excise.recipe.thresholds import Verify


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
        never_seen_training: Never-seen rows that terms of the objective read, where any does: a share of ``never_seen``
            (whole groups, which neither a stopping rule nor the evaluation then reads), a source of its own, or
            ``shuffled``: a stand-in for want of them, forgotten answers under the questions of other forgotten rows.
        never_saw: A model of the task that never saw the forget rows, if there is one: the base before its fine-tuning,
            an older or a smaller model, with a tokenizer of its own; or several, such that each forget row is new to
            one of them (each trained on half of the data, say). From what it says of them the forget terms
            ``distil`` and ``likelihood`` learn (a language model has to have the same tokenizer), and the stopping rule
            of a classifier counts. Of a language model's never-seen rows that training and the rule read, those are
            taken that it finds as likely.
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
        part: Train (`excise finetune`) on a part of the rows alone, ``1/2`` or ``all but 1/4`` say; where a row belongs
            follows from its group, or from its text where it has none. Models of all such parts serve ``never_saw``. Of
            such a model that forgets (`excise run`): the part that it was trained on; other rows it never saw.
        limit: Use at most this many rows of each side (for trials).
        without: Rows that the requests of a ledger named are left out of every side but ``forget``: its folder, or
            ``DIR@N`` for what its first N entries say (`excise ledger` sets it).
    """

    forget: str = ""
    retain: str = ""
    untouched: float | str = 0.2
    never_seen: str | None = None
    never_seen_training: float | str = 0.5
    never_saw: tuple[str, ...] | None = None
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
    part: str | None = None
    limit: int | None = None
    without: str | None = None


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
        never_seen_batch: Never-seen rows in a micro-batch, where a term reads them; default: as many as retain rows.
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
    never_seen_batch: int | None = None
    accumulate: int = 1
    retain_steps: int = 0
    mixed: bool = False
    contrast_batch: int = 0
    balance: Literal["none", "classes", "contrast"] = "none"


@dataclass(frozen=True)
class Optimiser:
    """How weights move: ``adamw``, or ``muon`` (hidden matrices, from scratch) with ``adamw`` for the rest.

    ``tail`` is the share of the run at its end that goes on at the ``floor`` of the rate: small steps to trim what the
    large ones left. ``betas`` are AdamW's. ``weight_decay`` pulls matrices to zero, or those of a ``preconditioned``
    run to their start.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-5
    adamw_lr: float | None = None
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: float = 0.1
    decay: Literal["linear", "cosine", "constant"] = "linear"
    floor: float = 0.0
    tail: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class Muse:
    """What MUSE (2407.06460) asks; what is not given reads "not shown". Sources as those of ``data``.

    Attributes:
        passages: Passages of the forgotten texts: rows of ``prompt`` and ``gt`` (or ``completion``), gone on with for
            128 tokens.
        forget_questions: Questions about the forgotten texts, answered in at most 32 tokens.
        forget_examples: Solved questions that stand before each of them.
        retain_questions: The same about the texts to keep: MUSE's utility.
        retain_examples: Solved questions that stand before each of these.
        members: Forgotten texts that PrivLeak reads; default: the forget rows.
        non_members: Texts that no model was trained on; default: the never-seen rows.
        reference_auc: In place of a gold: how often a retrained model finds a non-member likelier than a member, by
            Min-40 % (News .4772, Books .5393).
    """

    passages: str | None = None
    forget_questions: str | None = None
    forget_examples: str | None = None
    retain_questions: str | None = None
    retain_examples: str | None = None
    members: str | None = None
    non_members: str | None = None
    reference_auc: float | None = None


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
        gradient_norms: Take the gradient of every forget and never-seen row, for the membership attack that reads its
            norm: a backward pass for each row.
        relearn_steps: Steps at which the relearning curve is read.
        relearn_lr: Learning rate of the relearning attack; default the run's own.
        savings_steps: Steps on all forget rows after which memorisation savings are read, beside the relearning curve;
            0 switches them off.
        include_text: Keep generated and original text of forget rows in the run folder and the report.
        map: Two-dimensional map of hidden states: ``pca``, ``umap`` (extra) or ``none``.
        cache: Folder that keeps what was measured of originals and golds, for runs that share them. Hidden states of
            forget rows are in it: treat it as the data itself. Answers to ``tasks`` are not kept.
        tasks: Multiple-choice tasks to ask the models (extra ``mcq``): files with ``question``, ``choices`` and
            ``answer``, or names of lm-evaluation-harness (``wmdp_bio``, ``mmlu``), which need the hub.
        muse: Passages and questions of MUSE, for language models.
        attacks: Attacks by name with their settings: ``{"sample": {"samples": 64}}``; see docs/metrics.md. Where none
            is named the suite ``attack`` makes all of them, and a run none.
    """

    gold: str | None = None
    batch_tokens: int = 4096
    max_rows: int = 400
    generate: int = 64
    rewordings: bool = True
    latent: bool = True
    gradient_norms: bool = False
    relearn_steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    relearn_lr: float | None = None
    savings_steps: int = 24
    include_text: bool = False
    map: Literal["pca", "umap", "none"] = "pca"
    cache: str | None = None
    tasks: tuple[str, ...] = ()
    muse: Muse = field(default_factory=Muse)
    attacks: dict[str, Any] = field(default_factory=dict)


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
        statistic: What is held against never-seen rows (of a tagger: entity tokens, those of a type against each other,
            and apart where retained rows hold the word as that type, as another, or not at all). ``auc`` is the share
            of pairs in which the forgotten one is likelier, ``gap`` by how much probability it is so on average; ``f1``
            of a tagger by how much strict F1, whatever the entities are: name models as ``data.never_saw`` beside it.
        band: Admissible values of it: about 0.5 for ``auc``, about 0 for ``gap`` and ``f1``.
        quality: Lowest admissible probability of the watched retained rows, as a share of the original's.
        calibration: Never-seen rows that the rule reads and the evaluation does not: a share of ``data.never_seen``
            (whole groups, of what training leaves of it), or a source of its own.
        watch: Retained rows that the rule reads and neither training nor evaluation does: a share of ``data.retain``.
        rows: Most rows of each side in a check.
        after: Share of the run before the first check, where the rule only chooses the end.
        every: Steps between checks while the statistic is far from the band.
        near: How far above the band checks begin to be made as often as the statistic moves fast, every step inside,
            and how far below it every step still is looked at.
        patience: Checks after the best one before giving up on a better one; with ``between`` also checks below the
            band that lead further down, before giving up on any.
        between: Where one check is above the band's middle and the next below it, at most so many mixes of both weights
            are checked too, to end at the middle. Checks are then ``every`` steps apart or further, without ``near``.
    """

    rule: Literal["none", "two_sided"] = "none"
    statistic: Literal["auc", "gap", "f1"] = "auc"
    band: tuple[float, ...] = (0.45, 0.55)
    quality: float = 0.98
    calibration: float | str = 0.5
    watch: float = 0.1
    rows: int = 100
    after: float = 0.0
    every: int = 5
    near: float = 0.15
    patience: int = 5
    between: int = 0


@dataclass(frozen=True)
class ResetRows:
    """Embedding rows of tokens that only the forget set uses, replaced by what unused rows look like.

    Attributes:
        kept: Sides whose tokens are in use: retained rows, further sets; empty for all retained rows of the recipe
            (``retain``, ``untouched``, ``watch``), of which nothing but token counts is read.
        share: Least share of a token's uses that are the forget rows'. 1 takes tokens that nobody else uses; below,
            rows of shared tokens are moved part of the way, from none at ``share`` to all of it at 1.
        output: Rows of an output layer with weights of its own too; a tied one goes with the input's.
    """

    kept: tuple[str, ...] = ()
    share: float = 1.0
    output: bool = True


@dataclass(frozen=True)
class Edit:
    """What is changed in the weights before training, without a gradient."""

    reset_rows: ResetRows | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run. Every field has a default; a recipe file names only what it changes.

    ``initialise`` names where an adapter starts, with its settings: ``{"rila": {"beta": 0.5}}``; empty means plain.
    Where whole weights are trained, ``{"preconditioned": {}}`` gives their updates a shape. ``chosen`` says what a run
    without a recipe file was given, and why: first the recipe, then each part that was left out (`excise run` sets it).

    Example:
        >>> from excise.recipe import build
        >>> recipe = build({"model": {"name": "m"}, "optimiser": {"lr": "5e-5"}})
        >>> recipe.optimiser.lr
        5e-05
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    edit: Edit = field(default_factory=Edit)
    initialise: dict[str, Any] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    schedule: Schedule = field(default_factory=Schedule)
    optimiser: Optimiser = field(default_factory=Optimiser)
    stop: Stop = field(default_factory=Stop)
    evaluate: Evaluate = field(default_factory=Evaluate)
    verify: Verify = field(default_factory=Verify)
    tune: Tune = field(default_factory=Tune)
    seed: int = 0
    out: str | None = None
    checkpoint_every: int = 0
    log_every: int = 1
    chosen: tuple[str, ...] = ()
