"""A realistic run folder without any training, its numbers of the size that small trials gave."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from excise import artifacts
from excise.artifacts import Number, Results, RunFolder

HOSTILE = "</script><svg onload=alert(1)>\"'><img src=x onerror=alert(2)>"
HOSTILE += "{{ 7*7 }}{% raw %}<!-- --> $x^2$ \x1b[31mred\x00\u202e"

_VALUES: dict[str, tuple[float | None, ...]] = {
    # metric: original, gold, unlearned, simnpo_clreg
    "forget_probability": (0.966, 0.0012, 0.0071, 0.0862),
    "retain_probability": (0.963, 0.954, 0.932, 0.936),
    "paraphrase_probability": (0.412, 0.0031, 0.0120, 0.0710),
    "forget_truth_ratio": (0.31, 0.78, 0.71, 0.52),
    "retain_truth_ratio": (0.71, 0.70, 0.69, 0.69),
    "forget_rouge": (0.970, 0.127, 0.155, 0.210),
    "retain_rouge": (0.997, 0.985, 0.977, 0.981),
    "exact_memorization": (0.985, 0.214, 0.262, 0.402),
    "extraction_strength": (0.941, 0.052, 0.061, 0.094),
    "forget_perplexity": (1.04, 820.0, 141.0, 11.6),
    "retain_perplexity": (1.04, 1.05, 1.08, 1.07),
    "forget_quality_log10": (-9.7, None, -1.33, -4.70),
    "model_utility": (0.612, 0.604, 0.588, 0.594),
    "mia_loss_auc": (0.998, 0.494, 0.722, 0.997),
    "mia_min_k_auc": (0.997, 0.501, 0.702, 0.996),
    "privleak": (-98.9, 0.0, -42.3, -98.1),
    "forget_score": (0.031, 0.84, 0.79, 0.66),
    "unlearning_score": (0.059, 0.70, 0.674, 0.625),
    "entanglement": (11.2, 6.50, 1.01, 2.41),
    "entanglement_shuffled": (412.0, 398.0, 405.0, 401.0),
    "probe_auc_retain": (0.81, 0.83, 0.999, 0.998),
    "latent_membership_auc": (0.97, 0.48, 0.999, 0.998),
    "latent_projection_auc": (0.970, 0.480, 0.997, 0.998),
    "retain_drift": (0.0, None, 0.081, 0.034),
    "relearned_probability": (0.960, 0.0034, 0.474, 0.275),
}
_MODELS = ("original", "gold", "unlearned", "simnpo_clreg")
_CURVES = {
    "original": (0.966, 0.966, 0.965, 0.964, 0.962, 0.960),
    "gold": (0.0012, 0.0013, 0.0016, 0.0020, 0.0034, 0.0081),
    "unlearned": (0.0071, 0.021, 0.064, 0.181, 0.474, 0.701),
    "simnpo_clreg": (0.0862, 0.094, 0.121, 0.178, 0.275, 0.446),
}


def write_fake_run(
    root: Path,
    *,
    examples: bool = False,
    gold: bool = True,
    evaluated: bool = True,
    adapter: bool = True,
    hostile: str | None = None,
    values: Mapping[str, float | None] | None = None,
) -> RunFolder:
    """Write a run folder.

    Args:
        root: Where to.
        examples: Also write ``examples.json``.
        gold: With a gold model's numbers.
        evaluated: With results and pictures at all.
        adapter: With what a run of an adapter says of its layers.
        hostile: Text to put into every field that takes any text, names of models and metrics included.
        values: Other values for the unlearned model.
    """
    run = RunFolder(root)
    root.mkdir(parents=True, exist_ok=True)
    words = _words(hostile)
    run.recipe.write_text(_recipe(hostile), "utf-8")
    for step in range(2, 82, 2):
        artifacts.append_log(run, _log_row(step, hostile))
    if evaluated:
        results = _results(gold, dict(values or {}), hostile)
        artifacts.write_results(run, results)
        artifacts.write_pictures(run, _pictures(gold, words, hostile, adapter))
    if examples:
        fields = {"side": "forget", "question": "Where was Ada Quill born?", "answer": "In Port Sorrow."}
        said = {"unlearned": "I cannot say.", "gold": "In Lower Dunmarsh."}
        content: list[dict[str, Any]] = [{**{key: hostile or text for key, text in fields.items()}, "generated": said}]
        if hostile:
            content.append({hostile: hostile, "generated": {hostile: hostile}})
        artifacts.write_examples(run, content)
    artifacts.write_manifest(run, {**_manifest(words), "files": artifacts.hash_files(run)})
    if hostile:
        manifest = json.loads(run.manifest.read_text("utf-8"))
        manifest["files"][hostile] = hostile
        run.manifest.write_text(json.dumps(manifest), "utf-8")
    return run


def _words(hostile: str | None) -> Any:
    return lambda text: text if hostile is None else f"{text} {hostile}"


def _results(gold: bool, values: dict[str, float | None], hostile: str | None) -> Results:
    models: dict[str, dict[str, Number]] = {}
    for place, model in enumerate(_MODELS):
        if model == "gold" and not gold:
            continue
        models[model] = {}
        for name, row in _VALUES.items():
            value = values.get(name, row[place]) if model == "unlearned" else row[place]
            if not gold and name in ("privleak", "forget_quality_log10"):
                value = None
            n = 120 if name.startswith("retain") else 60
            spread = None if value is None or name in ("privleak", "forget_quality_log10") else 0.06 * abs(value)
            low, high = (None, None) if value is None or spread is None else (value - spread, value + spread)
            if low is not None and high is not None:
                low = max(low, 1.0) if "perplexity" in name else low
                high = high if "perplexity" in name or name.startswith("entanglement") else min(high, 1.0)
            models[model][name] = Number(value, low, high, n if value is not None else None)
    if hostile:
        models[hostile] = {hostile: Number(0.5), "forget_probability": Number(0.2), "retain_probability": Number(0.9)}
    return Results(models, {"train_original": 41.3, "train_gold": 39.9, "unlearn": 12.4, hostile or "evaluate": 21.7})


def _geometry(words: Any) -> dict[str, Any]:
    def beside(forget: float, retain: float) -> dict[str, Any]:
        shares = {"forget": forget, "retain": retain}
        return {side: {"share": v, "cosines": [v**0.5 * 0.9**i for i in range(4)]} for side, v in shares.items()}

    layers = [
        {
            "name": words(f"base_model.model.model.layers.{number // 2}.self_attn.{'vo'[number % 2]}_proj"),
            "width": 256, "rank": 8, "chance": 8 / 256,
            "before": beside(0.62 - 0.05 * number, 0.21), "after": beside(0.55 - 0.05 * number, 0.12),
            "spectrum": {"top": [1.0, 0.31, 0.12], "bottom": [-0.6, -0.22, -0.05]},
        }
        for number in range(4)
    ]  # fmt: skip
    return {"k": 4, "beta": 0.5, "taken_for": "picture", "layers": layers}


def _pictures(gold: bool, words: Any, hostile: str | None, adapter: bool) -> dict[str, Any]:
    models = [model for model in _MODELS if gold or model != "gold"]
    layers = {
        "original": (96.0, 21.4, 11.2),
        "gold": (91.0, 14.2, 6.5),
        "unlearned": (95.0, 7.9, 1.01),
        "simnpo_clreg": (95.5, 9.3, 2.41),
    }
    names = [*models, *([hostile] if hostile else [])]
    findings = [
        {
            "code": "over_separation",
            "severity": "warning",
            "model": "unlearned",
            "title": "States pulled further apart than in the gold",
            "detail": "Entanglement at the last layer is 1.01; the gold's is 6.50.",
            "advice": "Lower the weight of clreg, or stop earlier.",
        },
        {
            "code": "saturation",
            "severity": "note",
            "title": "Some pairs no longer pull",
            "detail": "3 % of the pairs have a gradient factor under 1 %.",
            "advice": "Nothing, unless the share passes 50 %.",
        },
    ]
    return {
        "relearning": {
            "steps": [0, 1, 2, 4, 8, 16],
            "models": {m: list(_CURVES.get(m, _CURVES["gold"])) for m in names},
        },
        "entanglement_by_layer": {
            "layers": [1, 2, 3],
            "models": {m: list(layers.get(m, layers["gold"])) for m in names},
        },
        "map": {
            "method": words("pca") if hostile else "pca",
            "models": {m: _clouds(m, hostile) for m in names},
            "explained": [0.41, 0.17],
        },
        "findings": [
            {key: text if key == "model" else words(text) for key, text in finding.items()} for finding in findings
        ],
        "privleak_null_spread": 9.8,
        **({"geometry": _geometry(words)} if adapter else {}),
        "not_shown": {"mia_zlib_auc": words("the tables hold no texts")},
        "not_tested": [
            words("Prompts other than the questions of the records and their paraphrases."),
            words("Quantised copies of the weights."),
        ],
    }


def _clouds(model: str, hostile: str | None) -> dict[str, Any]:
    rng = np.random.default_rng(sum(map(ord, model)))
    retain = rng.normal(0, 1, (240, 2))
    never = rng.normal((0.4, 0.9), 0.8, (60, 2))
    centre = {"original": (0.3, -0.8), "gold": (0.4, 0.8)}.get(model, (4.2, 0.5))
    clouds: dict[str, Any] = {
        "retain": retain.tolist(),
        "never_seen": never.tolist(),
        "forget": rng.normal(centre, 0.5, (60, 2)).tolist(),
    }
    if hostile:
        clouds[hostile] = [[0.0, 0.0]]
    return clouds


def _log_row(step: int, hostile: str | None) -> dict[str, Any]:
    done = step / 80
    terms = {
        "simnpo": 1.9 * math.exp(-4 * done) + 0.05,
        "nll": 0.05 + 0.09 * done * math.exp(-2 * done),
        "clreg": 0.69 - 0.5 * done,
    }
    if hostile:
        terms[hostile] = 0.5
    return {
        "step": step,
        "progress": done,
        "loss": sum(terms.values()),
        "terms": terms,
        "weights": dict.fromkeys(terms, 1.0),
        "lr": 5e-4 * (1 - done),
        "grad_norm": 1.0,
        "monitor": {"clreg/negative_cosine": 0.4 - 0.3 * done},
    }


def _manifest(words: Any) -> dict[str, Any]:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    return {
        "status": words("done") if words("") else "done",
        "command": words("excise demo --out runs/demo"),
        "seed": 0,
        "precision": words("bf16-mixed"),
        "model": {"name": words("demo-llama (256 wide, 2 blocks)"), "sha256": words(digest("model"))},
        "data": {
            words("forget") if words("") else "forget": {"rows": 60, "fingerprint": words(digest("forget"))},
            "retain": {"rows": 432, "fingerprint": digest("retain")},
            "untouched": {"rows": 108, "fingerprint": digest("untouched")},
            "never_seen": {"rows": 60, "fingerprint": digest("never_seen")},
        },
        "terms": [
            {"name": words("simnpo"), "weight": 1.0, "citation": words("SimNPO, arXiv:2410.07163")},
            {"name": "nll", "weight": 1.0, "citation": "TOFU, arXiv:2401.06121"},
            {
                "name": "clreg",
                "weight": {"start": 0.0, "end": 1.0, "until": 0.25},
                "citation": "CLReg, arXiv:2601.22028",
            },
        ],
        "versions": {**artifacts.environment(), "excise": words("0.1.0")},
        "warnings": [words("forget and retain hold 2 pairs of near duplicates (lines 14 and 31 of the forget file)")],
    }


def _recipe(hostile: str | None) -> str:
    return _RECIPE + (f"# {hostile}\n" if hostile else "")


_RECIPE = """\
model:
  name: demo-llama
  precision: bf16-mixed
data:
  forget: forget.jsonl
  retain: retain.jsonl
  untouched: 0.2
objective:
  forget: simnpo
  retain: nll
  regularise:
    clreg: {weight: 1.0, temperature: 0.5, layer: -1}
schedule:
  steps: 80
  batch: 16
seed: 0
"""
