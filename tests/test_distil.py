"""A language model learns to say of the forget rows what a model says that never saw them: `distil`, `likelihood`."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from excise import artifacts, models, recipe
from excise.commands import matching
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import sides
from excise.errors import InputRefused, UsageError
from excise.tasks.causal_lm import Example, encode_records
from small_world import SmallWorld, rows, write

QUIET = Progress(quiet=True)
QUICK = {
    "evaluate__generate": 0, "evaluate__relearn_steps": [], "evaluate__latent": False, "evaluate__map": "none",
    "objective": {"forget": {"distil": {}}, "retain": {"nll": {}}, "regularise": {}}, "log_every": 1,
}  # fmt: skip


def settings(small: SmallWorld, out: Path, never_saw: Any = None, **changes: Any) -> recipe.Recipe:
    named = str(small.gold) if never_saw is None else never_saw
    return small.recipe(out, **{**QUICK, "data__never_saw": named, **changes})


def examples(small: SmallWorld, own: recipe.Recipe) -> list[Example]:
    tokens = AutoTokenizer.from_pretrained(small.original)
    return encode_records(sides.of(own).records["forget"], tokens, sides.encoding(own.data))


def spread(model: Path | str, example: Example) -> torch.Tensor:
    """``[n, V]`` log-probabilities at the labels, with transformers alone."""
    with torch.no_grad():
        logp = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    return logp[example.label_start - 1 : -1].double()


def divergence(said: torch.Tensor, mine: torch.Tensor, label: int, kept: int) -> float:
    """The ``kept`` likeliest tokens one by one, the label in place of the last if need be; the others as one."""
    order = sorted(range(len(said)), key=lambda c: -float(said[c]))[:kept]
    if label not in order:
        order[-1] = label
    value, left, mine_left = 0.0, 1.0, 1.0
    for c in order:
        value += math.exp(said[c]) * float(said[c] - mine[c])
        left, mine_left = left - math.exp(said[c]), mine_left - math.exp(mine[c])
    return value + left * math.log(left / mine_left)


@pytest.mark.parametrize("kept", [2, 5])
def test_the_first_loss_is_the_divergence_from_who_never_saw_them(
    kept: int, small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "KEPT", kept)
    count = len(rows(small.sides["forget"]))
    own = settings(small, tmp_path / "run", schedule__steps=1, schedule__forget_batch=count)
    run(own, progress=QUIET)
    found, replaced = [], 0
    for example in examples(small, own):
        labels = example.input_ids[example.label_start :]
        said, mine = spread(small.gold, example), spread(small.original, example)
        found += [divergence(t, p, y, kept) for t, p, y in zip(said, mine, labels, strict=True)]
        replaced += sum(int(y not in t.topk(kept).indices) for t, y in zip(said, labels, strict=True))
    log = artifacts.read_log(artifacts.RunFolder(tmp_path / "run"))
    assert log[0]["terms"]["distil"] == pytest.approx(sum(found) / len(found), rel=1e-3)
    assert replaced > 0  # labels that who never saw them finds unlikely are what a leak would be


def test_each_label_is_held_to_its_likelihood_to_who_never_saw_it(small: SmallWorld, tmp_path: Path) -> None:
    count = len(rows(small.sides["forget"]))
    objective = {"forget": {"likelihood": {"delta": 2.0}}, "retain": {"nll": {}}, "regularise": {}}
    run(settings(small, tmp_path / "run", schedule__steps=1, schedule__forget_batch=count, objective=objective),
        progress=QUIET)  # fmt: skip
    found = []
    for example in examples(small, settings(small, tmp_path / "run")):
        labels = torch.tensor(example.input_ids[example.label_start :])[:, None]
        said, mine = (spread(model, example).gather(-1, labels)[:, 0] for model in (small.gold, small.original))
        found += [d * d / 2 if d <= 2 else 2 * (d - 1) for d in (mine - said).abs().tolist()]
    log = artifacts.read_log(artifacts.RunFolder(tmp_path / "run"))
    assert log[0]["terms"]["likelihood"] == pytest.approx(sum(found) / len(found), rel=1e-3)
    assert min(found) < 0.1 < max(found)


def test_it_ends_nearer_to_who_never_saw_them(small: SmallWorld, tmp_path: Path) -> None:
    own = settings(small, tmp_path / "run", schedule__steps=30)
    run(own, progress=QUIET)

    def apart(model: Path) -> float:
        pairs = [(spread(small.gold, e), spread(model, e)) for e in examples(small, own)]
        return float(torch.cat([(t.exp() * (t - p)).sum(-1) for t, p in pairs]).mean())

    assert apart(tmp_path / "run" / "model") < apart(small.original) / 2


def test_each_row_is_told_by_the_one_to_whom_it_is_news(small: SmallWorld, tmp_path: Path) -> None:
    own = settings(small, tmp_path / "run", [str(small.original), str(small.gold)])
    matching.match(own, found := sides.of(own), QUIET)
    for example, told in zip(examples(small, own), found.unseen["forget"], strict=True):
        labels = torch.tensor(example.input_ids[example.label_start :])[:, None]
        by = [spread(model, example).gather(-1, labels)[:, 0] for model in (small.original, small.gold)]
        assert told.logp.tolist() == pytest.approx(min(by, key=lambda logp: float(logp.mean())).tolist(), abs=1e-4)
    assert any("new to one of 2 models" in warning for warning in found.warnings)


def test_never_seen_rows_are_chosen_too_where_some_are_read(small: SmallWorld, tmp_path: Path) -> None:
    objective = {"forget": {"distil": {}, "quantile": {}}, "retain": {"nll": {}}, "regularise": {}}
    own = settings(small, tmp_path / "run", objective=objective)
    whole, found = sides.of(own), sides.of(own)
    matching.match(own, found, QUIET)
    assert 0 < len(found.records["never_seen_training"]) <= len(whole.records["never_seen_training"]) / 2
    assert found.records["never_seen"] == whole.records["never_seen"]
    assert len(found.unseen["forget"]) == len(whole.records["forget"])


def test_one_that_knows_them_is_asked_about_and_what_is_measured_stays_whole(small: SmallWorld, tmp_path: Path) -> None:
    own = settings(small, tmp_path / "run", str(small.original))
    whole, found = sides.of(own), sides.of(own)
    matching.match(own, found, QUIET)
    assert any("make sure that it never saw them" in warning for warning in found.warnings)
    assert found.records == whole.records


def test_a_language_model_that_knows_less_is_asked_about(small: SmallWorld, tmp_path: Path) -> None:
    weak = tmp_path / "weak"
    shutil.copytree(small.gold, weak)
    net = AutoModelForCausalLM.from_pretrained(weak)
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(0.1)
    net.save_pretrained(weak)
    for name in (weak, small.original):
        own = settings(small, tmp_path / "run", str(name))
        matching.match(own, found := sides.of(own), QUIET)
        theirs, mine = (share_found(small, own, model) for model in (name, small.original))
        words = f"find {theirs:.0%} of the labels, the model itself {mine:.0%}: what learns"
        assert any(words in w for w in found.warnings) == (name == weak)
        assert mine > 0.1


def share_found(small: SmallWorld, own: recipe.Recipe, model: Path) -> float:
    """Which share of the labels of never-seen rows a model finds likeliest of all tokens: the mean over rows."""
    tokens, shares = AutoTokenizer.from_pretrained(small.original), []
    for example in encode_records(sides.of(own).records["never_seen"], tokens, sides.encoding(own.data)):
        labels = torch.tensor(example.input_ids[example.label_start :])
        shares.append(float((spread(model, example).argmax(-1) == labels).double().mean()))
    return sum(shares) / len(shares)


def test_who_cuts_text_into_other_tokens_cannot_teach(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, out = tmp_path / "other", tmp_path / "run"
    shutil.copytree(small.gold, place)
    texts = ["a text of something else, zyx, qqq " * 9]
    models.new_tokenizer(texts, 300).save_pretrained(place)
    with pytest.raises(InputRefused, match=r"data\.never_saw: .* the same tokenizer"):
        run(settings(small, out, str(place)), progress=QUIET)
    wider = tmp_path / "wider"
    shutil.copytree(small.gold, wider)
    net = AutoModelForCausalLM.from_pretrained(wider)
    size = net.config.vocab_size
    net.resize_token_embeddings(size + 8, mean_resizing=False)
    with torch.no_grad():
        net.get_output_embeddings().weight[size:] = net.get_output_embeddings().weight[:1]  # as likely as another
    net.save_pretrained(wider)
    with monkeypatch.context() as every:
        every.setattr(matching, "KEPT", 10**6)  # all tokens of the wider one are told apart
        with pytest.raises(InputRefused, match=r"data\.never_saw: .* the same tokenizer"):
            run(settings(small, out, str(wider)), progress=QUIET)
    with pytest.raises(UsageError, match=r"name them as data\.never_saw"):
        run(settings(small, out, []), progress=QUIET)
    assert not out.exists()


def test_models_that_only_choose_rows_may_cut_text_as_they_like(small: SmallWorld, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small.gold, other)
    models.new_tokenizer(["another text, of other words"] * 9, 300).save_pretrained(other)
    objective = {"forget": {"quantile": {}}, "retain": {"nll": {}}, "regularise": {}}
    own = settings(small, tmp_path / "run", [str(small.gold), str(other)], objective=objective)
    matching.match(own, found := sides.of(own), QUIET)
    assert "never_seen_training-alike" in found.sources
    with pytest.raises(InputRefused, match="the same tokenizer"):
        run(settings(small, tmp_path / "run", [str(small.gold), str(other)]), progress=QUIET)


def test_long_texts_are_told_piece_by_piece(small: SmallWorld, tmp_path: Path) -> None:
    """Texts without a question are cut to fit; every piece is told what was said of its own tokens."""
    text = " ".join(row["answer"] for row in rows(small.sides["forget"]))
    path = write(tmp_path / "long.jsonl", [{"text": text}, {"text": text[:40]}])
    own = settings(small, tmp_path / "run", data__forget=str(path), data__max_length=48, schedule__steps=2)
    run(own, progress=QUIET)
    log = artifacts.read_log(artifacts.RunFolder(tmp_path / "run"))
    assert all(math.isfinite(row["terms"]["distil"]) for row in log)
    matching.match(own, found := sides.of(own), QUIET)
    tokens = AutoTokenizer.from_pretrained(small.original)
    sides.cut(found, tokens, sides.encoding(own.data))
    encoded = sides.encode(found, ["forget"], tokens, own.data, seed=0, context=None)
    made = matching.taught(encoded, found.unseen["forget"])
    assert len(made["starts"]) == encoded.counts["forget"] > 2
    last = encoded.examples["forget"][-1]
    at = int(made["starts"][-1])
    said = spread(small.gold, last)
    assert made["logp"][at:, 0].tolist() == pytest.approx(said.max(-1).values.tolist(), abs=1e-4)
