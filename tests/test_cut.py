"""`excise cut`: what can be folded exactly and what is refused, the weights afterwards, the folder it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn

import excise
import tiny
from excise import artifacts, cli, folding, recipe
from excise.commands import cutting
from excise.commands.progress import Progress
from excise.erasure import least_change
from excise.errors import InputRefused, NotShown, UsageError
from excise.forward import Anatomy, Batch
from small_world import SmallWorld

QUIET = Progress(quiet=True)
EXACT = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "phi", "phi3")


def batches(seed: int, low: int, high: int, count: int = 3) -> list[Batch]:
    """Rows of tokens from a range of their own, of two lengths, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(low, high, (4, 9), generator=draw)
        mask = torch.ones_like(ids)
        mask[::2, 6:] = 0
        made.append(Batch(ids, mask, mask.bool()))
    return made


def watched(net: Any, found: folding.Writer, made: list[Batch], **settings: Any) -> folding.Seen:
    return folding.watch(net, Anatomy.of(net), found, iter(made), **settings)


@pytest.mark.parametrize("layer", [1, 2, -1])
@pytest.mark.parametrize("kind", EXACT)
def test_means_agree_behind_the_block_after_folding(kind: str, layer: int) -> None:
    net = tiny.model(kind)
    anatomy = Anatomy.of(net)
    forget, other, kept = batches(0, 5, 30), batches(1, 30, 60), batches(2, 5, 60, 12)
    found = folding.writer(net, anatomy, layer, kept[0])
    own, theirs, retain = (
        watched(net, found, forget),
        watched(net, found, other),
        watched(net, found, kept, moments=True),
    )
    change = least_change(
        own.states.mean(0) - theirs.states.mean(0), own.inputs.mean(0) - theirs.inputs.mean(0), retain.moments,
        biased=found.biased, ridge=1e-3,
    )  # fmt: skip
    before = float((own.states.mean(0) - theirs.states.mean(0)).norm())
    state = {name: p.clone() for name, p in net.state_dict().items()}
    expected = own.states + change.of(own.inputs)
    found.fold(change)
    after = watched(net, found, forget)
    assert torch.allclose(after.states, expected, atol=1e-4 * float(expected.abs().max())), (
        "the model does what was said"
    )
    gap = (after.states.mean(0) - watched(net, found, other).states.mean(0)).norm()
    assert float(gap) < 1e-4 * before
    changed = {name for name, p in net.state_dict().items() if not torch.equal(p, state[name])}
    assert changed <= {n for n in state if found.name in n}, "nothing else was touched"
    assert len(changed) == 1 + found.biased
    assert found.biased == (kind in ("gpt_neox", "gpt2", "phi"))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_norm_behind_the_output_is_refused(kind: str) -> None:
    net = tiny.model(kind)
    with pytest.raises(InputRefused, match="folded into the weights exactly"):
        folding.writer(net, Anatomy.of(net), -1, batches(0, 5, 60)[0])


def test_other_blocks_that_cannot_be_folded() -> None:
    net = tiny.model("llama")
    batch, anatomy = batches(0, 5, 60)[0], Anatomy.of(net)
    with pytest.raises(InputRefused, match="blocks 1 to 3"):
        folding.writer(net, anatomy, 0, batch)
    with pytest.raises(InputRefused, match="blocks 1 to 3"):
        folding.writer(net, anatomy, 4, batch)
    blocks = net.model.layers
    blocks[1].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight
    with pytest.raises(InputRefused, match="exactly"):  # a shared weight would change two blocks
        folding.writer(net, anatomy, 1, batch)
    assert folding.writer(net, anatomy, 3, batch).name == "mlp.down_proj"
    blocks[2].mlp.register_forward_hook(lambda _m, _a, out: 0.5 * out)  # a scaled residual
    with pytest.raises(InputRefused, match="exactly"):
        folding.writer(net, anatomy, 3, batch)


def test_later_layers_are_not_run_and_padding_does_not_count() -> None:
    net = tiny.model("llama")
    anatomy, made = Anatomy.of(net), batches(3, 5, 60, 1)
    found = folding.writer(net, anatomy, 2, made[0])
    seen = watched(net, found, made, moments=True)
    outputs = net(input_ids=made[0].input_ids, attention_mask=made[0].attention_mask, output_hidden_states=True)
    states = outputs.hidden_states[2].double()
    for row in range(4):
        length = int(made[0].attention_mask[row].sum())
        assert torch.allclose(seen.states[row], states[row, :length].mean(0), atol=1e-5)
    assert seen.moments is not None
    assert seen.moments.count == int(made[0].attention_mask.sum())


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "run"
    excise.run(small.recipe(out, evaluate__generate=0, evaluate__map="none", data__untouched=0.3), progress=QUIET)
    return out


@pytest.fixture(scope="module")
def done(run: Path) -> Path:
    out = run.parent / "cut"
    excise.cut(run, out=out, progress=QUIET)
    return out


def test_the_folder_of_a_cut(run: Path, done: Path, small: SmallWorld) -> None:
    folder = artifacts.open_run(done)
    record = json.loads((done / cutting.CUT).read_text())
    assert record["gap_left"] < 1e-3
    assert (record["layer"], record["writes"], record["like"]) == (2, "mlp.down_proj", "never_seen")
    assert record["rows"] == {"forget": 20, "never_seen": 20, "retain": record["rows"]["retain"]}
    assert 0 < record["retained_moved"] < 1
    assert set(record["held_out"]) == {"before", "after", "split_by"}
    results = artifacts.read_results(folder)
    assert set(results.models) == {"original", "gold", "unlearned", "before_cut"}
    earlier = artifacts.read_results(artifacts.open_run(run))
    own = results.number("before_cut", "forget_probability").value
    assert own == pytest.approx(earlier.number("unlearned", "forget_probability").value, rel=1e-4)
    assert results.number("unlearned", "relearned_probability").shown
    manifest = artifacts.read_manifest(folder)
    assert manifest["status"] == "done"
    assert manifest["verify"] == artifacts.read_manifest(artifacts.open_run(run))["verify"]
    assert not artifacts.changed_files(folder, manifest["files"])
    assert any(w.startswith("cut behind block 2: made from the same rows") for w in manifest["warnings"])
    changed = [n for n, p in _weights(done).items() if not torch.equal(p, _weights(run)[n])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert (
        int(torch.linalg.matrix_rank((_weights(done)[changed[0]] - _weights(run)[changed[0]]).double(), rtol=1e-3)) == 1
    )
    text = "".join(p.read_text() for p in (done / "report.html", done / cutting.CUT, done / "manifest.json"))
    assert "erase" not in text.casefold()


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def test_a_probe_on_the_saved_model_is_at_chance_on_these_rows(run: Path, done: Path) -> None:
    """On its own path: the saved models through transformers, mean states behind block 2, logistic regression."""
    from excise import models
    from excise.commands.starting import sides

    settings = recipe.load(str(done / "recipe.yaml"))
    given = sides.of(settings)
    losses = {}
    for name, place in (("before", run), ("after", done)):
        model = models.load_result(place / "model").eval()
        tokenizer = models.load_tokenizer(str(place / "model"))
        rows = sides.encode(given, ["forget", "never_seen"], tokenizer, settings.data, seed=0, context=96)
        states = [np.array(list(_means(model, rows, side))) for side in ("forget", "never_seen")]
        x, y = np.concatenate(states), np.arange(40) < 20
        x = (x - x.mean(0)) / x.std()
        probe = LogisticRegression(C=100, max_iter=20000, tol=1e-8).fit(x, y)
        losses[name] = float(-np.mean(np.log(np.where(y, (p := probe.predict_proba(x)[:, 1]), 1 - p))))
    assert losses["before"] < 0.6
    assert losses["after"] == pytest.approx(np.log(2), abs=1e-3)


def _means(model: nn.Module, rows: Any, side: str) -> Iterator[np.ndarray]:
    layers = Anatomy.of(model).blocks
    for i in range(len(rows.examples[side])):
        batch, kept = rows.batch(side, [i]), []
        handle = layers[1].register_forward_hook(
            lambda _m, _a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        handle.remove()
        yield kept[0][0].double().mean(0).numpy()


def test_a_cut_folder_is_a_run_folder(done: Path, tmp_path: Path) -> None:
    assert excise.verify(done).outcome in ("passed", "failed", "not shown")
    assert excise.report(done).is_file()
    found = excise.evaluate(done, suite="memorisation", progress=QUIET)
    assert found["models"]["unlearned"]["forget_probability"]["n"] == 10
    excise.export(done, to="merged", out=tmp_path / "out")


def test_an_adapter_is_merged_and_another_side_and_layer_can_be_taken(small: SmallWorld, tmp_path: Path) -> None:
    fast: dict[str, Any] = {"evaluate__relearn_steps": [], "evaluate__generate": 0, "evaluate__latent": False}
    settings = small.recipe(tmp_path / "run", model__lora={"r": 2}, data__never_seen=None, **fast)
    excise.run(settings, progress=QUIET)
    excise.cut(tmp_path / "run", out=tmp_path / "cut", layer=1, progress=QUIET)
    record = json.loads((tmp_path / "cut" / cutting.CUT).read_text())
    assert (record["like"], record["layer"]) == ("retain", 1)
    assert not (tmp_path / "cut/model/adapter_config.json").exists()
    assert record["gap_left"] < 1e-3
    with pytest.raises(UsageError, match="no such rows"):
        excise.cut(tmp_path / "run", out=tmp_path / "other", like="never_seen", progress=QUIET)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layer": 9}, InputRefused, "blocks 1 to 2"),
        ({"layer": 0}, InputRefused, "blocks 1 to 2"),
        ({"ridge": 0.0}, UsageError, "--ridge"),
        ({"like": "gold"}, UsageError, "--like gold"),
    ],
)
def test_refusals_write_nothing(
    options: dict[str, Any], error: type[Exception], match: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        excise.cut(run, out=tmp_path / "cut", progress=QUIET, **options)
    assert not (tmp_path / "cut").exists()


def test_rows_that_nothing_tells_apart(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = folding.watch

    def same(*args: Any, **settings: Any) -> folding.Seen:
        seen = watch(*args, **settings)
        return folding.Seen(seen.states, torch.zeros_like(seen.inputs), seen.moments, seen.size)

    monkeypatch.setattr(folding, "watch", same)
    with pytest.raises(NotShown, match="block 2: what the map reads does not differ"):
        excise.cut(run, out=tmp_path / "cut", progress=QUIET)
    with pytest.raises(UsageError, match="not empty"):
        excise.cut(run, out=run, progress=QUIET)


def test_the_command_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setitem(vars(excise), "cut", lambda *a, **s: asked.append((a, s)))
    assert cli.main(["cut", str(run), "--out", str(tmp_path), "--layer", "-2", "--like", "retain"]) == 0
    assert asked == [((run,), {"out": tmp_path, "layer": -2, "like": "retain", "ridge": 1e-3})]
    assert cli.main(["cut", str(run)]) == 2
