"""How a run was made, as the page says it: facts, objective, data, hashes, sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from excise.artifacts import Manifest, Results
from excise.reporting import numbers
from excise.reporting.style import side_title
from excise.reporting.words import NOT_SHOWN

#: Files that a page is made from, checked against their recorded hashes.
READ = ("recipe.yaml", "results.json", "pictures.json", "log.jsonl", "examples.json")


def facts(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """What was run, as pairs of words."""
    model = as_map(manifest.get("model"))
    pairs = [
        ("model", model.get("name")),
        ("parameters", _parameters(model.get("parameters"))),
        ("weights (SHA-256)", model.get("sha256")),
        ("command", manifest.get("command")),
        ("seed", manifest.get("seed")),
        ("precision", manifest.get("precision")),
        ("attention", manifest.get("attention")),
        ("status", manifest.get("status")),
    ]
    return tuple((key, str(value)) for key, value in pairs if value not in (None, ""))


def _parameters(count: Any) -> str | None:
    """A count, or (trained, all)."""
    if isinstance(count, int):
        return f"{count:,}"
    numbers = [n for n in as_list(count) if isinstance(n, int)]
    if len(numbers) != 2:
        return None
    return f"{numbers[1]:,}, all trained" if numbers[0] == numbers[1] else f"{numbers[0]:,} trained of {numbers[1]:,}"


def model_name(manifest: Manifest) -> str:
    """The model's name for a heading: of a path only the end, which says enough and tells nothing of the machine.

    Example:
        >>> model_name({"model": {"name": "/home/me/runs/a/model"}}), model_name({"model": {"name": "owner/name"}})
        ('a/model', 'owner/name')
    """
    name = str(as_map(manifest.get("model")).get("name") or "a model")
    parts = name.replace("\\", "/").split("/")
    return name if len(parts) <= 2 else "/".join(parts[-2:])


def term(term: Mapping[str, Any]) -> dict[str, str]:
    """One term of the objective as the table shows it."""
    weight = term.get("weight")
    if isinstance(weight, Mapping):
        weight = ", ".join(f"{k} {v}" for k, v in weight.items())
    elif isinstance(weight, int | float):
        weight = f"{weight:g}"
    return {
        "name": str(term.get("name", "")),
        "weight": str(weight if weight is not None else ""),
        "citation": str(term.get("citation") or ""),
    }


def data(manifest: Manifest) -> tuple[dict[str, str], ...]:
    """Rows and fingerprint of each side."""
    rows = []
    for side, entry in as_map(manifest.get("data")).items():
        given = as_map(entry)
        rows.append({
            "side": side_title(str(side)),
            "rows": str(given.get("rows", NOT_SHOWN)),
            "fingerprint": str(given.get("fingerprint") or NOT_SHOWN),
        })  # fmt: skip
    return tuple(rows)


def integrity(manifest: Manifest, changed: Sequence[str]) -> str:
    """Whether the files that the page is made from are the recorded ones."""
    if changed:
        return f"Checked when this page was made: files that it was made from differ: {', '.join(changed)}."
    recorded = [name for name in READ if name in as_map(manifest.get("files"))]
    return (
        f"Checked when this page was made, all unchanged: {', '.join(recorded)}."
        if recorded
        else "Not checked: no record of the files it was made from."
    )


def citations(manifest: Manifest, results: Results) -> tuple[dict[str, str], ...]:
    """Sources of the terms and of the numbers shown, each with what it was used for."""
    sources: dict[str, list[str]] = {}
    for term in as_list(manifest.get("terms")):
        given = as_map(term)
        if given.get("citation") and given["citation"] != "ours":
            sources.setdefault(str(given["citation"]), []).append(f"term {given.get('name', '')}")
    for source, titles in numbers.cited(results).items():
        sources.setdefault(source, []).extend(titles)
    return tuple({"source": source, "used": "; ".join(used)} for source, used in sources.items())


def as_map(value: Any) -> Mapping[str, Any]:
    """``value`` where it is an object, else an empty one: a page is made of whatever a folder has."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> Sequence[Any]:
    """``value`` where it is a list, else an empty one."""
    return value if isinstance(value, list | tuple) else ()
