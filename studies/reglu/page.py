"""From the rows of the ReGLU study to docs/results/reglu.md and its JSON twin."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import width
from rows import AIMED, LOSSES, MAIN, OTHER_STARTS, OTHERS, STARTS
from study import Study

import twin

DOCS = twin.DOCS
TWIN = DOCS / "reglu.json"
Row = dict[str, Any]

#: Column -> metric; each is read beside the gold's.
COLUMNS = {
    "forget p": "forget_probability",
    "untouched p": "retain_probability",
    "utility": "model_utility",
    "log10 FQ": "forget_quality_log10",
    "KS": "ks",
    "PrivLeak (95 %)": "privleak",
    "equivalent": "privleak_90",
    "relearned": "relearned_probability",
    "latent AUC": "latent_membership_auc",
    "entanglement": "entanglement",
    "repetition": "forget_repetition",
}
SPLITS = {"forget10": "10 %", "forget05": "5 %", "forget01": "1 %"}
TITLES = {"plain": "plain", "pissa": "PiSSA", "fila": "FILA", "vila": "VILA", "rila": "RILA only", "rol": "ROL only",
          "rila+rol": "RILA + ROL"}  # fmt: skip
LOSS_TITLES = {"ihl": "IHL", "npo": "NPO", "graddiff": "GradDiff", "simnpo": "SimNPO", "wga": "WGA",
               AIMED: "quantile (ours)"}  # fmt: skip
#: What is reached for: forget quality above, and utility lost as a share of the gold's below.
QUALITY, UTILITY = -1.3, 0.03
NOT_YET = "not run yet"


def write(study: Study, *, docs: bool) -> None:
    """Write the page and its twin: into the docs, or beside the rows and then without the findings."""
    folder, rows = DOCS if docs else study.out, list(study.found().values())
    costs, tuned, wide = study.costs_so_far(), study.trials(), width.found(study)
    apart = {"costs": costs, "tuning": tuned, "widths": wide}
    twin.write(folder / TWIN.name, [*rows, *({"name": name, **own} for name, own in apart.items())])
    text = Path(__file__).with_name("page.md.txt").read_text(encoding="utf-8")
    if not docs:
        head, _, rest = text.partition("<<FINDINGS>>")
        text = head + "_Not the whole study: see the tables._\n" + rest.partition("<<END>>")[2]
    tables = {
        "FINDINGS": "", "END": "",
        **{f"MAIN{s[-2:]}": main_table(rows, s) for s in SPLITS},
        "OTHERS": others_table(rows),
        "ORDER": order(rows, "forget_quality_log10"),
        "ORDERRELEARNED": order(rows, "relearned_probability"),
        "TARGETS": targets(rows),
        **{f"SWEEP{s[-2:]}": sweeps(rows, s, study.better()) for s in ("forget10", "forget01")},
        "LONGER": longer(rows),
        "AIMED": aimed(rows),
        "WIDTHS": widths(wide),
        "ROLSHARE": rol_share(rows),
        "GEOMETRY": geometry_table(rows),
        "COSTS": cost_table(costs),
        "TUNED": tuning_table(tuned),
        "ENGINE": ", ".join(sorted({r["commit"] for r in rows if "commit" in r})) or NOT_YET,
        "SWEPT": LOSS_TITLES[study.better()],
        "STATUS": status(study),
    }  # fmt: skip
    for name, table in tables.items():
        text = text.replace(f"<<{name}>>", table if table or name in ("FINDINGS", "END") else f"_{NOT_YET}_")
    (folder / "reglu.md").write_text(text, encoding="utf-8")


# --- numbers ------------------------------------------------------------------------------------------------------


def value(row: Row, metric: str) -> float | None:
    """A number of a row, None where it was not shown."""
    found = row.get(metric) if metric == "ks" else (row["metrics"].get(metric) or {}).get("value")
    return found if found is not None and math.isfinite(found) else None


def _number(values: Iterable[float | None]) -> str:
    """Mean, and where there are several the standard deviation."""
    found = [v for v in values if v is not None]
    if not found:
        return "not shown"
    spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.3g}{spread}"


def _mean(rows: Sequence[Row], metric: str) -> float | None:
    values = [v for r in rows if (v := value(r, metric)) is not None]
    return statistics.mean(values) if values else None


def _cell(rows: Sequence[Row], metric: str) -> str:
    if metric == "privleak_90":
        found = [r[metric]["equivalent"] for r in rows if metric in r]
        return "" if not found else f"{sum(found)} of {len(found)}" if len(found) > 1 else "yes" if found[0] else "no"
    if metric == "privleak" and len(rows) == 1:
        own = rows[0]["metrics"].get(metric) or {}
        if own.get("low") is not None:
            return f"{own['value']:.0f} ({own['low']:.0f} to {own['high']:.0f})"
    if metric == "ks" and rows and "ks" not in rows[0]:
        return ""
    return _number(value(r, metric) for r in rows)


def _cells(rows: Sequence[Row]) -> list[str]:
    return [_cell(rows, metric) for metric in COLUMNS.values()]


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def _of(rows: Sequence[Row], loss: str, start: str, split: str) -> list[Row]:
    wanted = ("main", loss, start, split)
    return [r for r in rows if (r["group"], r.get("loss"), r.get("start"), r["split"]) == wanted]


def _one(rows: Sequence[Row], role: str, split: str) -> Row | None:
    return next((r for r in rows if r["group"] == role and r["split"] == split), None)


# --- tables -------------------------------------------------------------------------------------------------------


def _beside_gold(rows: Sequence[Row], split: str, losses: Sequence[str], starts: Iterable[str]) -> str:
    """Original and gold, then every loss and start: mean over seeds and standard deviation."""
    own = [(role, r) for role in ("original", "gold") if (r := _one(rows, role, split))]
    if not own:
        return ""
    body = [[f"**{role}**", "", "", *_cells([r])] for role, r in own]
    for loss in losses:
        for start in starts:
            found, title = _of(rows, loss, start, split), f"{LOSS_TITLES[loss]}, {TITLES[start]}"
            if found:
                body.append([title, f"{found[0]['lr']:g}", str(len(found)), *_cells(found)])
            else:
                body.append([title, "", "0", NOT_YET, *[""] * (len(COLUMNS) - 1)])
    counted = next(r for r in rows if r["split"] == split and r["group"] not in ("original", "gold"))["metrics"]
    n, leak = counted["forget_quality_log10"]["n"], counted["privleak"]
    return (
        f"Forget quality: n = {n} truth ratios of model and gold each. PrivLeak: {leak['n']} forgotten and "
        f"{leak['extra']['n_never_seen']} never-seen rows.\n\n" + _table(["run", "rate", "seeds", *COLUMNS], body)
    )


def main_table(rows: Sequence[Row], split: str) -> str:
    """IHL and NPO with every start."""
    return _beside_gold(rows, split, MAIN, STARTS)


def others_table(rows: Sequence[Row]) -> str:
    """The other losses, at 10 %."""
    return _beside_gold(rows, "forget10", OTHERS, OTHER_STARTS)


def order(rows: Sequence[Row], metric: str) -> str:
    """The paper's order, by forget quality (higher is nearer to the gold) or by relearning (lower is better)."""
    sign = 1 if metric == "forget_quality_log10" else -1
    names = ("plain", "fila", "rila", "rol", "rila+rol")
    body = []
    for split, title in SPLITS.items():
        for loss in LOSSES if split == "forget10" else MAIN:
            found = {s: _mean(_of(rows, loss, s, split), metric) for s in names}
            if all(v is None for v in found.values()):
                continue
            cells = ["" if v is None else f"{v:.3g}" for v in found.values()]
            signed = {s: None if v is None else sign * v for s, v in found.items()}
            both = signed["rila+rol"]
            first = _ordered(both, signed["fila"], signed["plain"])
            second = _ordered(both, signed["rila"]), _ordered(both, signed["rol"])
            body.append([title, LOSS_TITLES[loss], *cells, first, " / ".join(second)])
    head = ["forgotten", "loss", *(TITLES[s] for s in names), "ReGLU > FILA > plain", "both > RILA / > ROL"]
    return _table(head, body) if body else ""


def _ordered(*values: float | None) -> str:
    found = [v for v in values if v is not None]
    if len(found) < len(values):
        return NOT_YET
    return "yes" if all(a > b for a, b in itertools.pairwise(found)) else "no"


def targets(rows: Sequence[Row]) -> str:
    """Every row of the study's main part against what is reached for."""
    body = []
    for split, title in SPLITS.items():
        gold = _one(rows, "gold", split)
        for row in (r for r in rows if r["group"] in ("main", "aimed") and r["split"] == split):
            quality, utility = value(row, "forget_quality_log10"), value(row, "model_utility")
            target = value(gold, "model_utility") if gold else None
            share = None if utility is None or not target else utility / target - 1
            low, high = row["privleak_90"]["low"], row["privleak_90"]["high"]
            leak = "not shown" if low is None else f"{low:.0f} to {high:.0f}"
            met = [quality is not None and quality > QUALITY, share is not None and share >= -UTILITY,
                   row["privleak_90"]["equivalent"]]  # fmt: skip
            body.append([
                title, _named(row),
                "not shown" if quality is None else f"{quality:.2f}: {_yes(met[0])}",
                "not shown" if share is None else f"{100 * share:+.1f} %: {_yes(met[1])}",
                f"{leak}: {_yes(met[2])}", str(sum(met)),
            ])  # fmt: skip
    head = ["forgotten", "row", f"log10 FQ above {QUALITY}", "utility within 3 % of the gold's",
            "PrivLeak, 90 % interval, within 10 points", "met"]  # fmt: skip
    return _table(head, body) if body else ""


def _named(row: Row) -> str:
    end = f"{row['changes']['schedule.steps']} steps" if row["group"] == "aimed" else f"seed {row['seed']}"
    return f"{LOSS_TITLES[row['loss']]}, {TITLES[row['start']]}, {end}"


def _yes(met: bool) -> str:
    return "**yes**" if met else "no"


def sweeps(rows: Sequence[Row], split: str, loss: str) -> str:
    """One thing changed in RILA or RILA + ROL, beside the row that is changed."""
    apart = ("main", "original", "gold", "longer", "aimed")
    found = [r for r in rows if r["group"].split(":")[0] not in apart and r["split"] == split]
    body = []
    for start in TITLES:
        changed = [r for r in found if r["start"] == start]
        as_main = [r for r in _of(rows, loss, start, split) if r["seed"] == 0]
        if changed and as_main:
            body.append([f"**{TITLES[start]}**", *_cells(as_main)])
        body += [[r["group"], *_cells([r])] for r in sorted(changed, key=lambda r: r["group"])]
    return _table(["changed", *COLUMNS], body) if body else ""


def longer(rows: Sequence[Row]) -> str:
    """The same losses and starts with four times the steps, beside the row of 40."""
    found, body = [r for r in rows if r["group"].startswith("longer")], []
    for loss, start in sorted({(r["loss"], r["start"]) for r in found}, key=lambda k: (k[0], list(TITLES).index(k[1]))):
        own = [r for r in found if (r["loss"], r["start"]) == (loss, start)]
        short = [r for r in _of(rows, loss, start, "forget10") if r["seed"] == 0]
        for row in (*short, *sorted(own, key=lambda r: r["lr"])):
            steps = row["changes"].get("schedule.steps", 40)
            body.append([f"{LOSS_TITLES[loss]}, {TITLES[start]}", f"{steps:g}", f"{row['lr']:.2g}", *_cells([row])])
    return _table(["run", "steps", "rate", *COLUMNS], body) if body else ""


def aimed(rows: Sequence[Row]) -> str:
    """Ours: a loss with an aim, beside the original and the gold of each split."""
    found, body = [r for r in rows if r["group"] == "aimed"], []
    for split, title in SPLITS.items():
        own = [r for start in TITLES for r in found if (r["start"], r["split"]) == (start, split)]
        roles = [(role, r) for role in ("original", "gold") if own and (r := _one(rows, role, split))]
        body += [[title, f"**{role}**", "", *_cells([r])] for role, r in roles]
        body += [[title, TITLES[r["start"]], f"{r['changes']['schedule.steps']}", *_cells([r])] for r in own]
    return _table(["forgotten", "start", "steps", *COLUMNS], body) if body else ""


def widths(found: Mapping[str, Sequence[Row]]) -> str:
    """RILA with and without ROL in a small world at several widths: means over seeds."""
    body = []
    for size, own in sorted(found.items(), key=lambda item: int(item[0])):
        for role in ("original", "gold"):
            body += [[size, f"**{role}**", "", "", *(_cell([r], m) for m in width.COLUMNS)]
                     for r in own if r["group"] == role]  # fmt: skip
        for start, lr in sorted({(r["start"], r["lr"]) for r in own if "lr" in r}):
            same = [r for r in own if (r.get("start"), r.get("lr")) == (start, lr)]
            cells = [_cell(same, m) for m in width.COLUMNS]
            body.append([size, TITLES[start], f"{lr:.2g}", str(len(same)), *cells])
    head = ["width", "start", "rate", "seeds", "forget p", "untouched p", "relearned", "entanglement"]
    return _table(head, body) if body else ""


def rol_share(rows: Sequence[Row]) -> str:
    """The share of B's directions that the retain basis holds, when training begins and when it ends."""
    body = []
    for row in rows:
        for key, (first, last) in row.get("monitor", {}).items():
            if key.endswith("retain_share"):
                weight = row["changes"].get("objective.regularise.rol.weight", "")
                lost = [_cell([row], m) for m in ("forget_probability", "retain_probability", "relearned_probability")]
                title = f"{LOSS_TITLES[row['loss']]}, {TITLES[row['start']]}, {SPLITS[row['split']]}"
                label = "" if row["group"] == "main" else row["group"]
                body.append([title, label or str(weight), str(row["seed"]), f"{first:.3f}", f"{last:.3f}", *lost])
    head = ["row", "changed", "seed", "share, first", "share, last", "forget p", "untouched p", "relearned"]
    return _table(head, body) if body else ""


def geometry_table(rows: Sequence[Row]) -> str:
    """Which share of either side's variance the update's directions hold."""
    body = []
    for row in (r for r in rows if r["group"] == "main" and r.get("geometry")):
        own, title = row["geometry"], f"{LOSS_TITLES[row['loss']]}, {TITLES[row['start']]}, {SPLITS[row['split']]}"
        shares = [own.get(when, {}).get(side) for when in ("before", "after") for side in ("forget", "retain")]
        cells = ["" if share is None else f"{share:.3f}" for share in shares]
        body.append([title, str(row["seed"]), *cells, f"{own['chance']['any']:.3f}"])
    head = ["row", "seed", "forget, start", "retain, start", "forget, trained", "retain, trained", "by chance"]
    return _table(head, body) if body else ""


def cost_table(costs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Seconds of one core and memory before training, beside an epoch of it."""
    body = []
    for start in STARTS:
        if start in costs:
            own = costs[start].get("start")
            seconds = f"{own['cpu_seconds']:.2f}" if own else "0"
            body.append([TITLES[start], seconds, f"{own['peak_mib']:.0f}" if own and own["peak_mib"] else "0"])
    if "plain" in costs:
        own = costs["plain"]["training"]
        peak = own["peak_mib"]
        body.append(["(training, one epoch over the same rows)", f"{own['cpu_seconds']:.2f}", f"{peak or 0:.0f}"])
    return _table(["start", "seconds of one core", "peak memory, MiB"], body) if body else ""


def tuning_table(tuned: Mapping[str, Mapping[str, Any]]) -> str:
    """What four trials at 5 % on authors 86-90 reached."""
    body = []
    for loss in LOSSES:
        for start in STARTS:
            if (found := tuned.get(f"{loss}-{start}")) is None:
                continue
            best = found["best"]["optimiser.lr"]
            tried = [f"{t['lr']:g}: {t['forget']:.3g} / {t['untouched']:.3f}" for t in found["tried"]]
            title = f"{LOSS_TITLES[loss]}, {TITLES[start]}"
            body.append([title, f"{best:g}", f"{found['value']:.3g}", str(found["trials"]), "; ".join(tried)])
    head = ["row", "chosen rate", "distance", "trials", "rate: forget p / untouched p"]
    return _table(head, body) if body else ""


def status(study: Study) -> str:
    """Which rows there are, and the names of those that were not run."""
    planned = list(study.rows())
    missing = [row for row in planned if not study.done(row)]
    groups: dict[str, int] = {}
    for row in missing:
        part = {"main": f"seed {row.seed}", "aimed": "ours"}.get(row.group, "sweeps")
        kind = "IHL and NPO" if row.loss in MAIN and row.group == "main" else "other losses"
        title = f"{SPLITS[row.split]}, {part}" + (f", {kind}" if row.group == "main" else "")
        groups[title] = groups.get(title, 0) + 1
    named = "; ".join(f"{title}: {count}" for title, count in groups.items())
    text = f"**Rows run: {len(planned) - len(missing)} of {len(planned)}.**"
    return f"{text} Not run yet: {named}. The command goes on where it stopped." if missing else text
