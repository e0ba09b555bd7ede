"""The model card of an export: what it is, what made it, how to load, serve and roll it back, what it does not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Ranks that vLLM can be told to allow; without being told it allows 16.
SERVED, DEFAULT_SERVED = (8, 16, 32, 64, 128, 256, 320, 512), 16
#: Numbers of the run that the card repeats, where they were measured.
SHOWN = (
    "forget_probability", "retain_probability", "forget_quality_log10", "model_utility", "privleak",
    "relearned_probability",
)  # fmt: skip


def card(record: Mapping[str, Any], numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md of an export.

    Args:
        record: What ``export.json`` says.
        numbers: Model -> metric -> ``{"value", "low", "high", "n"}``, of the run.

    Example:
        >>> record = {"to": "merged", "base": {"name": "m", "sha256": None}, "methods": [], "run": {}, "rank": None}
        >>> card(record, {}).splitlines()[-1].startswith("Deleting")
        True
    """
    adapter = record["to"] == "adapter"
    parts = [
        _head(record["base"], adapter),
        f"# {record['base']['name']}, {'an unlearning adapter' if adapter else 'unlearned'}",
        "Made with excise: chosen training records were to be forgotten, the rest kept. No row of them is in this "
        "folder.",
        _made(record),
        *([_numbers(numbers)] if numbers else []),
        *([_use(record), _limits(record), _adapter_back(record)] if adapter else [_merged(), _merged_back(record)]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _head(base: Mapping[str, Any], adapter: bool) -> str:
    lines = ["---", *([f"base_model: {base['name']}"] if base.get("hub") else [])]
    lines += [f"library_name: {'peft' if adapter else 'transformers'}", "tags:", "- machine-unlearning", "---"]
    return "\n".join(lines)


def _made(record: Mapping[str, Any]) -> str:
    methods: Sequence[Mapping[str, Any]] = record["methods"]
    lines = ["## How it was made", ""]
    lines += [f"- `{m['name']}`, weight {m.get('weight', 1)}: {m.get('citation') or 'own term'}" for m in methods]
    if record.get("start"):
        start = record["start"]
        what = "the adapter started at" if "base" in start else "the updates of whole weights were shaped by"
        lines.append(f"- {what} `{start['name']}`: {start.get('citation')}")
    lines += ["", "| what | SHA-256 |", "|---|---|"]
    hashes = {"weights of the base": record["base"].get("sha256"), **record["run"], **record.get("files", {})}
    lines += [f"| {name} | `{digest}` |" for name, digest in hashes.items() if digest]
    return "\n".join([*lines, "", "All of it is in `export.json`; `COMPLETE.json` lists every file."])


def _numbers(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    models = list(numbers)
    lines = ["## What was measured", "", f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for name in SHOWN:
        values = [numbers[m].get(name) or {} for m in models]
        if any(v.get("value") is not None for v in values):
            lines.append(f"| {name} | {' | '.join(map(_number, values))} |")
    return "\n".join([*lines, "", "Value [95 % interval], n. The run's report has all numbers and what they mean."])


def _number(entry: Mapping[str, Any]) -> str:
    value, low, high, n = (entry.get(key) for key in ("value", "low", "high", "n"))
    if value is None:
        return "not shown"
    interval = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
    return f"{value:.4g}{interval}" + (f", {n}" if n else "")


def served(rank: int) -> int | None:
    """The smallest rank that vLLM can be told to allow for an adapter of ``rank``; None where there is none.

    Example:
        >>> served(16), served(24), served(1024)
        (16, 32, None)
    """
    return next((size for size in SERVED if size >= rank), None)


def _use(record: Mapping[str, Any]) -> str:
    rank = int(record["rank"])
    flag = served(rank)
    if flag is None:
        serve = (
            f"Its rank is {rank}, more than vLLM allows ({SERVED[-1]}): export it merged, or with a smaller `--rank`."
        )
    elif rank <= DEFAULT_SERVED:
        serve = f"Its rank is {rank}: `vllm serve BASE --enable-lora` allows up to {DEFAULT_SERVED} by default."
    else:
        serve = (
            f"Its rank is **{rank}**, more than the {DEFAULT_SERVED} that vLLM allows by default: serve it with "
            f"`vllm serve BASE --enable-lora --max-lora-rank {flag}`."
        )
    if record.get("doubled"):
        serve += " (Twice the rank that was trained: the half that the training started from is taken off again.)"
    smaller = record.get("recompressed")
    if smaller:
        worst = max(smaller["layers"], key=smaller["layers"].get)
        serve += (
            f"\n\nThe update was cut from rank {smaller['from']} to rank {smaller['rank']}: ||D - D_R|| / ||D|| is "
            f"{smaller['error']:.4f} over the model and {smaller['layers'][worst]:.4f} in the worst layer (`{worst}`). "
            "The numbers above are of the whole update: measure this one before it is used."
        )
    return (
        "## How to load and serve it\n\n```python\nfrom peft import PeftModel\nfrom transformers import "
        "AutoModelForCausalLM\n\nbase = AutoModelForCausalLM.from_pretrained(BASE)\nmodel = "
        f"PeftModel.from_pretrained(base, ADAPTER)\n```\n\nThe base is the untouched original. {serve}"
    )


def _limits(record: Mapping[str, Any]) -> str:
    return (
        "## What it does not do\n\nAn adapter delivered alone **hides rather than removes**: the base still knows what "
        "was to be forgotten, and whoever has the base has it without the adapter. Where the knowledge itself must not "
        "be handed out, deliver the merged model (`excise export --to merged`) and not the base; how easily that one "
        "learns the records again is what the relearning number of the run is about. Other copies of the data (the "
        "base, checkpoints, caches, the training files) are not touched by either."
    )


def _adapter_back(record: Mapping[str, Any]) -> str:
    return (
        '## How to roll back\n\nDo not load the adapter, or `model.delete_adapter("default")` / '
        "`with model.disable_adapter():` on a model that was not merged. The base is bit by bit as it was."
    )


def _merged() -> str:
    return (
        "## What it is\n\nA whole model: weights, config and tokenizer. It stands by itself and loads with "
        "`from_pretrained`; no adapter is needed. Other copies of the data (the original, checkpoints, caches, the "
        "training files) are not touched by it."
    )


def _merged_back(record: Mapping[str, Any]) -> str:
    return (
        "## How to roll back\n\nUse the original again. The update cannot be taken off these weights exactly.\n"
        "Deleting this folder removes this copy only."
    )
