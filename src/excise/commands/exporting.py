"""`excise export`: what a run made, as an adapter for the untouched base or as a whole model, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from excise import __version__, artifacts, files, models, recipe
from excise.commands.card import card
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.initialise import delivery, difference, store

FORMS = ("adapter", "merged")
_CONFIG = "adapter_config.json"
#: Not taken along: what the export writes itself.
_OWN = ("README.md", files.COMPLETE)


def export(run: str | Path, *, to: str = "adapter", out: str | Path, rank: int | None = None) -> Path:
    """Write what a run made into a folder of its own, for others to use.

    ``adapter`` is loaded by stock ``PeftModel.from_pretrained`` on the untouched base; where the run started it
    elsewhere than at zero, it has twice the rank that was trained; where whole weights were trained, it is their
    difference to the base's, cut to ``rank``. ``merged`` is a whole model. Both have a
    ``README.md`` (rank and the serving flag for it, methods, hashes, limits, rollback), ``export.json`` and
    ``COMPLETE.json``. Nothing in them comes from the rows but the weights.

    Args:
        run: Folder of a run that is done.
        to: ``adapter`` or ``merged``.
        out: Folder to write; new or empty.
        rank: Cut the adapter's whole update to this rank, by singular values; the error is measured and recorded.

    Returns:
        The folder.

    Raises:
        UsageError: A run that is not done, a folder that is not empty, a form that the run does not have, or a rank
            above the adapter's own.
        InputRefused: No run in that folder.
        IntegrityFailed: A file of the run has changed, or the base is not the one that the run was made on.

    Example:
        >>> export("runs/a", to="adapter", out="delivered/a")  # doctest: +SKIP
        PosixPath('delivered/a')
    """
    folder, out = artifacts.open_run(run), Path(out)
    manifest, adapter = _check(folder, to, out, rank)
    settings = recipe.load(str(folder.recipe))
    hashes = files.verify(folder.model)
    record = _record(folder, manifest, settings, to)
    with files.staged(out) as aside:
        if to == "adapter" and not adapter:
            assert rank is not None
            record |= _difference(folder, manifest, settings, aside, rank)
        elif to == "adapter":
            record |= _adapter(folder, hashes, aside, rank)
        elif adapter:
            _merged(folder, manifest, settings, aside)
        else:
            _copy(folder.model, hashes, aside)
        record["files"] = {p.name: files.sha256(p) for p in sorted(aside.iterdir()) if p.is_file()}
        files.write_json(aside / "export.json", artifacts.finite(record))
        files.write_text(aside / "README.md", card(record, _numbers(folder)))
    return out


def _check(folder: artifacts.RunFolder, to: str, out: Path, rank: int | None) -> tuple[artifacts.Manifest, bool]:
    """Refuse before anything is read at length or written; whether the run made an adapter."""
    if to not in FORMS:
        raise UsageError(f"--to {to}: give {' or '.join(FORMS)}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out}: {'is a file' if out.is_file() else 'the folder is not empty'}; name another")
    if out.resolve().is_relative_to(folder.root.resolve()):
        raise UsageError(f"{out}: lies in the run folder, which must stay as it is; name another")
    manifest = artifacts.read_manifest(folder)
    if manifest.get("status") != "done":
        raise UsageError(f"{folder.root}: the run is not done; finish it with excise run --resume")
    if not folder.model.is_dir():
        raise InputRefused(f"{folder.root}: holds no model; give the folder of a run that trained one")
    adapter = (folder.model / _CONFIG).is_file()
    if to == "adapter" and not adapter and rank is None:
        raise UsageError(
            f"{folder.root}: all weights were trained, there is no adapter: use --to merged, or give --rank for one "
            "that stands for the difference"
        )
    if rank is not None and to != "adapter":
        raise UsageError("--rank is for an adapter: leave it out, or use --to adapter")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank}: give 1 or more")
    return manifest, adapter


def _record(
    folder: artifacts.RunFolder, manifest: artifacts.Manifest, settings: recipe.Recipe, to: str
) -> dict[str, Any]:
    """What ``export.json`` says, but for the form's own part; a local base is named without its path."""
    name, hub = settings.model.name or "a new model", settings.model.name and not Path(settings.model.name).exists()
    place = Path(name).resolve()
    shown = name if hub or not settings.model.name else (place.parent if place.name == "model" else place).name
    made: Mapping[str, Any] = manifest
    return {
        "format": 1,
        "to": to,
        "base": {
            "name": shown, "hub": bool(hub), "revision": settings.model.revision,
            "sha256": made.get("model", {}).get("sha256"),
        },
        "methods": list(made.get("terms", [])),
        "start": made.get("start"),
        "run": {"manifest of the run": files.sha256(folder.manifest), "recipe of the run": files.sha256(folder.recipe)},
        "versions": {"excise": __version__, **artifacts.environment()},
        "rank": None,
    }  # fmt: skip


def _numbers(folder: artifacts.RunFolder) -> dict[str, dict[str, Any]]:
    """The run's numbers: model -> metric -> value, interval and n."""
    found = artifacts.read_results(folder).models
    order: list[str] = [artifacts.ORIGINAL, artifacts.GOLD, artifacts.UNLEARNED]
    return {name: {k: vars(v) for k, v in found[name].items()} for name in order if name in found}


def _copy(source: Path, names: Mapping[str, str], aside: Path) -> None:
    for name in names:
        if name not in _OWN:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, aside / name)


def _adapter(folder: artifacts.RunFolder, hashes: Mapping[str, str], aside: Path, rank: int | None) -> dict[str, Any]:
    """Copy the adapter, at a smaller rank if one is asked for."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder.model / delivery.WEIGHTS)
    whole = delivery.highest_rank(state)
    doubled = bool(artifacts.read_manifest(folder).get("start"))
    if rank is None:
        _copy(folder.model, hashes, aside)
        return {"rank": whole, "doubled": doubled}
    if rank > whole:
        raise UsageError(f"--rank {rank}: the adapter has rank {whole}; leave --rank out or give less")
    config = json.loads((folder.model / _CONFIG).read_text(encoding="utf-8"))
    smaller = delivery.recompress(state, delivery.scales(state, config), rank)
    _copy(folder.model, {name: "" for name in hashes if name not in (_CONFIG, delivery.WEIGHTS)}, aside)
    save_file(smaller.tensors, aside / delivery.WEIGHTS, metadata={"format": "pt"})
    files.write_json(aside / _CONFIG, delivery.smaller_config(config, rank))
    layers = {name.removeprefix("base_model.model."): error for name, error in smaller.errors.items()}
    return {"rank": rank, "recompressed": {"from": whole, "rank": rank, "error": smaller.error, "layers": layers}}


def _merged(folder: artifacts.RunFolder, manifest: artifacts.Manifest, settings: recipe.Recipe, aside: Path) -> None:
    """The base with the adapter's update in its weights, if it is the base that the run was made on."""
    from peft import PeftModel

    tokenizer = models.load_tokenizer(str(folder.model))
    whole = _base(manifest, settings, tokenizer)
    merged = PeftModel.from_pretrained(whole, str(folder.model)).merge_and_unload()
    models.save(merged, tokenizer, aside)


def _base(manifest: artifacts.Manifest, settings: recipe.Recipe, tokenizer: Any) -> Any:
    """The model that the run was made on, if it is still the same."""
    whole = models.load(settings.model, tokenizer=tokenizer, seed=settings.seed)
    recorded = manifest.get("model", {}).get("sha256")
    if recorded is not None and store.fingerprint(whole) != recorded:
        raise IntegrityFailed(f"{settings.model.name}: not the base that the run was made on: restore its weights")
    return whole


def _difference(
    folder: artifacts.RunFolder, manifest: artifacts.Manifest, settings: recipe.Recipe, aside: Path, rank: int
) -> dict[str, Any]:
    """An adapter of ``rank`` that stands for what the run did to the linear layers of its base."""
    from safetensors.torch import save_file

    if settings.model.config is not None:
        raise UsageError(f"{folder.root}: the model was trained from scratch, there is no base: use --to merged")
    tokenizer = models.load_tokenizer(str(folder.model), task=settings.model.task)
    base = _base(manifest, settings, tokenizer)
    found = difference.changed(base, models.load_result(folder.model, settings.model))
    made = difference.factored(found, rank)
    save_file(made.tensors, aside / delivery.WEIGHTS, metadata={"format": "pt"})
    difference.config(base, list(found), rank, models.TASKS[settings.model.task].peft).save_pretrained(str(aside))
    tokenizer.save_pretrained(aside)
    layers = {name.removeprefix("base_model.model."): error for name, error in made.errors.items()}
    whole = max(min(x.shape) for x in found.values())
    return {"rank": rank, "recompressed": {"from": whole, "rank": rank, "error": made.error, "layers": layers}}
