"""Embedding rows of tokens that only the forget set uses: which they are, what replaces them, and runs that do it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import excise
import oracles_gold
import small_world
import tiny
from excise import cli, editing, models, recipe
from excise.commands import folders, training
from excise.commands.progress import Progress
from excise.commands.starting import preparing, sides
from excise.editing import Chosen, Draw, choose, counts, replacements, reset_rows
from excise.errors import UsageError
from small_world import SmallWorld

FAST = {
    "evaluate__relearn_steps": [], "evaluate__generate": 0, "evaluate__map": "none", "evaluate__gold": None,
    "evaluate__latent": False,
}  # fmt: skip
#: Embeddings stay as they were reset.
FROZEN = {"model__train_only": r"layers\.", "edit": {"reset_rows": {}}}
ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5)


# --- which --------------------------------------------------------------------------------------------------------


@given(forget=ROWS, kept=ROWS, share=st.sampled_from([1.0, 0.9, 0.5, 0.3]))
def test_which_rows_and_how_far_by_loops(forget: list, kept: list, share: float) -> None:
    found = choose(counts(forget, 10), counts(kept, 10), share=share)
    wanted = oracles_gold.own_tokens(forget, kept, share)
    assert dict(zip(found.tokens.tolist(), found.weights.tolist(), strict=True)) == pytest.approx(wanted)
    used = {t for row in [*forget, *kept] for t in row}
    assert found.unused.tolist() == [t for t in range(10) if t not in used]


def test_special_tokens_are_neither_reset_nor_drawn_from_and_single_ones_not_drawn_from() -> None:
    ones, none = torch.tensor([1, 1, 0, 0, 0]), torch.zeros(5, dtype=torch.int64)
    found = choose(ones, none, special=[0, 4], single=[1, 3])
    assert found.tokens.tolist() == [1]
    assert found.unused.tolist() == [2]


def test_a_smaller_share_takes_more_rows_and_none_less_far() -> None:
    forget, kept = torch.tensor([9, 5, 1, 7]), torch.tensor([1, 5, 9, 0])
    before: dict[int, float] = {}
    for share in (1.0, 0.8, 0.4, 0.05):
        found = choose(forget, kept, share=share)
        now = dict(zip(found.tokens.tolist(), found.weights.tolist(), strict=True))
        assert all(now[token] >= way for token, way in before.items())
        before = now
    assert set(before) == {0, 1, 2, 3}


# --- what replaces them -------------------------------------------------------------------------------------------


def chosen_of(tokens: list[int], weights: list[float], unused: list[int]) -> Chosen:
    return Chosen(torch.tensor(tokens), torch.tensor(weights), torch.tensor(unused))


def test_what_replaces_a_row_by_loops() -> None:
    table = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    chosen = chosen_of([1, 5, 7], [1.0, 0.3, 1.0], [0, 2, 3, 9, 10])
    draw = Draw.of(chosen, 3)
    made, rows = replacements(table, chosen, draw), table.tolist()
    unused = [rows[i] for i in chosen.unused.tolist()]
    for i, (token, way) in enumerate(zip(chosen.tokens.tolist(), chosen.weights.tolist(), strict=True)):
        a, b = (unused[int(which[i])] for which in (draw.first, draw.second))
        assert made[i].tolist() == pytest.approx(oracles_gold.drawn_row(rows[token], a, b, unused, way), abs=1e-6)


def test_new_rows_are_spread_like_unused_ones_and_are_none_of_them() -> None:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(2100, 6, generator=generator) * torch.tensor([3.0, 1, 1, 1, 1, 0.1]) + 5
    table[:1000] *= 40
    chosen = chosen_of(list(range(1000)), [1.0] * 1000, list(range(1000, 2100)))
    made = replacements(table, chosen, Draw.of(chosen, 0))
    unused = table[1000:]
    assert torch.allclose(made.mean(0), unused.mean(0), atol=0.3)
    assert torch.allclose(made.std(0), unused.std(0), rtol=0.1)
    assert float(torch.cdist(made, unused).min()) > 0


@given(n=st.integers(1, 30), m=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_two_that_are_drawn_differ_and_the_seed_decides(n: int, m: int, seed: int) -> None:
    chosen = chosen_of(list(range(n)), [1.0] * n, list(range(n, n + m)))
    draw, again = Draw.of(chosen, seed), Draw.of(chosen, seed)
    assert not bool((draw.first == draw.second).any())
    assert torch.equal(draw.first, again.first)
    assert torch.equal(draw.second, again.second)
    assert int(max(draw.first.max(), draw.second.max())) < m


def test_there_must_be_something_to_draw_from() -> None:
    with pytest.raises(ValueError, match="two or more"):
        reset_rows(tiny.model(), chosen_of([1], [1.0], [2]), seed=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("output", [True, False])
def test_both_tables_and_no_other_weight(tied: bool, output: bool) -> None:
    net = tiny.model(tie_word_embeddings=tied)
    before = tiny.weights(net)
    chosen = chosen_of([3, 8], [1.0, 0.5], list(range(20, 40)))
    assert reset_rows(net, chosen, seed=0, output=output) == (2 if output and not tied else 1)
    changed = {n for n, v in tiny.weights(net).items() if not torch.equal(v, before[n])}
    both = {"model.embed_tokens.weight", "lm_head.weight"}
    assert changed == (both if tied or output else {"model.embed_tokens.weight"})
    for name in changed:
        rows = (tiny.weights(net)[name] != before[name]).any(1).nonzero().squeeze(1)
        assert rows.tolist() == [3, 8]
    draw = Draw.of(chosen, 0)
    for name in changed:
        assert torch.allclose(tiny.weights(net)[name][[3, 8]], replacements(before[name], chosen, draw))


def test_a_bias_of_the_output_becomes_that_of_unused_tokens() -> None:
    net = tiny.model("phi")
    with torch.no_grad():
        net.lm_head.bias.copy_(torch.arange(tiny.VOCABULARY))
    reset_rows(net, chosen_of([3, 8], [1.0, 0.5], [20, 40]), seed=0)
    assert net.lm_head.bias[[3, 8]].tolist() == [30.0, 19.0]
    assert net.lm_head.bias[[4, 20]].tolist() == [4.0, 20.0]


def test_an_encoder_has_an_input_table_only() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    assert reset_rows(Encoder(), chosen_of([0], [1.0], [1, 2, 3]), seed=0) == 1


# --- runs ---------------------------------------------------------------------------------------------------------


def go(small: SmallWorld, out: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    settings = small.recipe(out, **{**FAST, "schedule__steps": 3, **changes})
    excise.run(settings, resume=resume, progress=Progress(quiet=True))
    return json.loads((out / "manifest.json").read_text())


def table(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def own_tokens(small: SmallWorld, *kept: str) -> set[int]:
    """By hand: what the forget rows' text is encoded to, without what the others' is."""
    tokenizer = models.load_tokenizer(str(small.tokenizer))
    seen: dict[str, set[int]] = {}
    for side in ("forget", *kept):
        texts = (t for r in small_world.rows(small.sides[side]) for t in (f"{r['question']}\n", r["answer"]))
        seen[side] = {t for text in texts for t in tokenizer(text)["input_ids"]}
    return seen["forget"].difference(*(seen[s] for s in kept), tokenizer.all_special_ids)


@pytest.fixture(scope="module")
def done(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reset") / "run"
    go(small, out, **FROZEN, checkpoint_every=1)
    return out


def test_a_run_resets_the_rows_of_the_forget_sets_own_tokens(done: Path, small: SmallWorld) -> None:
    before, after = table(small.original), table(done / "model")
    moved = set((before != after).any(1).nonzero().squeeze(1).tolist())
    assert moved == own_tokens(small, "retain", "untouched")
    assert len(moved) > 5
    found = json.loads((done / "manifest.json").read_text())["edit"]["reset_rows"]
    assert found["rows"] == found["whole"] == len(moved)
    assert found["kept"] == ["retain", "untouched"]
    assert found["tables"] == 1
    assert "edit.json" in json.loads((done / "manifest.json").read_text())["files"]


def test_the_record_counts_and_never_names(done: Path, small: SmallWorld) -> None:
    """Tokens that only the forget rows have are the names of those who are forgotten."""
    text = (done / "edit.json").read_text()
    allowed = {"rows": int, "whole": int, "unused": int, "share": float, "kept": list, "tables": int}
    assert {k: type(v) for k, v in json.loads(text)["reset_rows"].items()} == allowed
    tokenizer = models.load_tokenizer(str(small.tokenizer))
    names = [n for n in tokenizer.convert_ids_to_tokens(sorted(own_tokens(small, "retain", "untouched"))) if len(n) > 4]
    assert names
    assert not [n for n in names if n.lstrip("Ġ") in text]


def test_a_resumed_run_has_the_same_rows(done: Path, small: SmallWorld, tmp_path: Path) -> None:
    own = small.recipe(tmp_path / "run", **{**FAST, **FROZEN, "schedule__steps": 3, "checkpoint_every": 1})
    prepared = preparing.prepare_unlearning(own, sides.of(own), resume=False)

    def interrupt(module: nn.Module, *_: Any) -> None:
        left[0] -= module.training
        if left[0] < 0:
            raise KeyboardInterrupt

    left = [3]
    prepared.model.register_forward_hook(interrupt)
    with folders.opened(own, resume=False) as run, pytest.raises(KeyboardInterrupt):
        training.train_into(prepared, run, Progress(quiet=True), stage="unlearn", resume=False)
    excise.run(own, resume=True, progress=Progress(quiet=True))
    assert tiny.apart(*(load_file(d / "model" / "model.safetensors") for d in (done, tmp_path / "run"))) == 0
    edits = [json.loads((d / "manifest.json").read_text())["edit"] for d in (done, tmp_path / "run")]
    assert edits[0] == edits[1]


def test_the_sides_that_are_kept_and_the_share_decide(small: SmallWorld, tmp_path: Path) -> None:
    def planned(**own: Any) -> dict[str, Any]:
        return excise.plan(small.recipe(tmp_path / "run", edit={"reset_rows": own}))["edit"]["reset_rows"]

    everything = planned()
    assert everything["kept"] == ["retain", "untouched"]
    assert planned(kept=["retain"])["rows"] >= everything["rows"]
    named = planned(kept=["retain", "untouched", "never_seen"])
    assert named["rows"] == len(own_tokens(small, "retain", "untouched", "never_seen")) < everything["rows"]
    nearly = planned(share=0.5)
    assert nearly["rows"] > nearly["whole"] == everything["whole"]


def test_nothing_to_reset_is_said(small: SmallWorld, tmp_path: Path) -> None:
    """A further set with all their words: no token is the forget rows' own."""
    edit = {"reset_rows": {"kept": ["retain", "same"]}}
    manifest = go(small, tmp_path / "run", edit=edit, data__utility={"same": str(small.sides["forget"])})
    assert manifest["edit"]["reset_rows"]["rows"] == 0
    assert any("nothing was reset" in w for w in manifest["warnings"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"model__lora": {"r": 4}}, "leave model.lora or the edit out"),
    "new": ({"model__config": {"model_type": "llama"}}, "nothing to reset"),
    "side": ({"edit": {"reset_rows": {"kept": ["retian"]}}}, "did you mean 'retain'"),
    "forget": ({"edit": {"reset_rows": {"kept": ["forget"]}}}, "name sides that are kept"),
    "share": ({"edit": {"reset_rows": {"share": 0}}}, "above 0 and up to 1"),
    "key": ({"edit": {"reset_row": {}}}, "did you mean 'reset_rows'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_where_it_makes_no_sense(
    case: str, small: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = REFUSED[case]
    file = small.file(tmp_path / "r.yaml", tmp_path / "run", **{**FAST, "edit": {"reset_rows": {}}, **changes})
    assert cli.main(["run", str(file)]) == UsageError.exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("excise: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_finetuning_has_nobody_to_forget(small: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="counts the side 'forget'"):
        excise.finetune(small.recipe(tmp_path / "run", edit={"reset_rows": {}}), progress=Progress(quiet=True))


def test_what_the_first_layer_sees_of_the_forgotten_is_gone(small: SmallWorld, done: Path) -> None:
    """The reset rows lie among unused ones: a planted direction in them is found before and not after."""
    net = models.load(recipe.Model(name=str(small.original)))
    rows = sorted(own_tokens(small, "retain", "untouched"))
    planted = torch.zeros(net.get_input_embeddings().weight.shape[1])
    planted[7] = 4 * float(net.get_input_embeddings().weight.detach().std())
    with torch.no_grad():
        net.get_input_embeddings().weight[rows] += planted
    manifest = json.loads((done / "manifest.json").read_text())
    unused = torch.tensor([i for i in range(300, 900) if i not in rows])[: manifest["edit"]["reset_rows"]["unused"]]
    chosen = editing.Chosen(torch.tensor(rows), torch.ones(len(rows)), unused)

    def shift() -> float:
        w = net.get_input_embeddings().weight.detach()
        others = w[unused]
        return abs(float((w[rows].mean(0) - others.mean(0))[7] / (others[:, 7].std() / math.sqrt(len(rows)))))

    assert shift() > 8
    reset_rows(net, chosen, seed=0)
    assert shift() < 4
