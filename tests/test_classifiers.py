"""Classifiers in the engine: states, logits, views and gradients are those of transformers' own forward pass."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from excise.forward import (
    Anatomy,
    Batch,
    Step,
    View,
    at_labels,
    hidden,
    labels,
    logits,
    packing,
    pooled,
    running,
    seq_logp,
    token_logp,
)

VOCABULARY, WIDTH, DEPTH, CLASSES = 40, 16, 3, 5
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 24}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": {**SIZES, "pad_token_id": 1},
    "electra": {**SIZES, "embedding_size": WIDTH},
    "deberta-v2": {
        **SIZES,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
        "share_att_key": True,
        "position_buckets": 4,
    },
    "distilbert": {"dim": WIDTH, "n_layers": DEPTH, "n_heads": 2, "hidden_dim": 24},
    "modernbert": {**SIZES, "global_attn_every_n_layers": 2, "local_attention": 8, "reference_compile": False},
}
ENCODERS |= {kind: ENCODERS["roberta"] for kind in ("xlm-roberta", "camembert")}
DECODERS: dict[str, dict[str, Any]] = {"llama": SIZES, "qwen2": {**SIZES, "num_key_value_heads": 2}}


def model(kind: str, *, sequence: bool = False, attention: str = "eager") -> Any:
    own = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **(ENCODERS | DECODERS)[kind]}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, num_labels=CLASSES, initializer_range=0.3, attn_implementation=attention, **own
    )
    auto = AutoModelForSequenceClassification if sequence else AutoModelForTokenClassification
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_config(config, dtype=torch.float32).eval()


def batch(*, sequence: bool = False, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 5, 7)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    attended = torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        attended[row, :length], ids[row, length:] = 1, 0
    where = torch.zeros(3, 9, dtype=torch.bool)
    if sequence:
        where[:, 0] = True
    else:
        where[:, 1:4], where[0, 6] = True, True
    classes = torch.where(where, torch.randint(0, CLASSES, (3, 9), generator=generator), -100)
    return Batch(ids, attended, where, classes=classes)


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_states_and_logits_are_the_models_own(kind: str) -> None:
    net, rows = model(kind), batch()
    anatomy = Anatomy.of(net)
    assert (anatomy.depth, anatomy.classes, anatomy.shift) == (DEPTH, CLASSES, 0)
    needs = [
        token_logp("a"),
        seq_logp("a"),
        labels("a"),
        logits("a"),
        at_labels("a", -1),
        *(hidden("a", j) for j in (1, DEPTH)),
    ]
    made = Step(net, anatomy, {"a": rows}).run(needs)
    out = net(input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True)
    assert rows.classes is not None
    wanted = rows.classes[rows.label_mask]
    logp = out.logits[rows.label_mask].log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    torch.testing.assert_close(made[token_logp("a")], logp)
    assert torch.equal(made[labels("a")], wanted)
    torch.testing.assert_close(made[logits("a")].rows(0, len(wanted)), out.logits[rows.label_mask])
    attended = rows.attention_mask.bool()
    for layer in (1, DEPTH):
        torch.testing.assert_close(made[hidden("a", layer)][attended], out.hidden_states[layer][attended])
    torch.testing.assert_close(made[at_labels("a", -1)], out.hidden_states[-1][rows.label_mask])
    counts = rows.label_mask.sum(1).tolist()
    torch.testing.assert_close(made[seq_logp("a")], torch.stack([part.sum() for part in logp.split(counts)]))


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_a_sequence_has_one_label(kind: str) -> None:
    net, rows = model(kind, sequence=True), batch(sequence=True)
    made = Step(net, Anatomy.of(net), {"a": rows}).run([token_logp("a")])
    out = net(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
    assert rows.classes is not None
    logp = out.logits.log_softmax(-1).gather(1, rows.classes[:, :1])[:, 0]
    torch.testing.assert_close(made[token_logp("a")], logp)


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_a_view_without_dropout_is_the_pass_itself(kind: str) -> None:
    net, rows = model(kind), batch()
    again = View("a", from_layer=1, dropout=0.0)
    needs = [at_labels("a", -1), at_labels(again, -1), pooled("a", 2), pooled(again, 2)]
    made = Step(net, Anatomy.of(net), {"a": rows}).run(needs)
    torch.testing.assert_close(made[needs[1]], made[needs[0]])
    torch.testing.assert_close(made[needs[3]], made[needs[2]])


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_a_view_in_training_has_dropout_of_its_own(kind: str) -> None:
    net, rows = model(kind).train(), batch()
    again = View("a", from_layer=0, dropout=0.0)
    needs = [at_labels("a", -1), at_labels(again, -1)]
    made = Step(net, Anatomy.of(net), {"a": rows}).run(needs)
    assert not torch.allclose(made[needs[0]], made[needs[1]], atol=1e-3)


def uneven() -> Batch:
    """One long row and six short ones, labels at every second place."""
    lengths = torch.tensor([12, 3, 4, 2, 5, 3, 2])
    attended = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(3, VOCABULARY, attended.shape, generator=torch.Generator().manual_seed(1)) * attended
    where = attended.bool() & (torch.arange(12) % 2 == 1)
    return Batch(ids, attended, where, classes=torch.where(where, ids % CLASSES, -100), indices=tuple(range(7)))


@pytest.mark.parametrize("attention", sorted(packing.ATTENTION))
@pytest.mark.parametrize("kind", sorted(packing.ENCODERS | set(DECODERS)))
def test_packed_rows_are_read_as_if_they_stood_alone(
    kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, rows = model(kind, attention=attention), uneven()
    view = View("a", from_layer=1, dropout=0.2)
    needs = [token_logp("a"), hidden("a", 1), pooled("a", -1), at_labels(view, -1), pooled(view, -1)]

    def products() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        made = Step(net, Anatomy.of(net), {"a": rows}, seed=3).run(needs)
        read = [made[p] * rows.attention_mask[..., None] if p.what == "hidden" else made[p] for p in needs]
        loss = sum(((v * torch.linspace(-1, 1, v.numel()).view(v.shape)).sum() for v in read), torch.zeros(()))
        weights = [p for p in net.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [v.detach() for v in read], [g for g in found if g is not None]

    laid = running._inputs(Anatomy.of(net), rows)[0]
    assert laid is not None
    assert laid.position_ids.numel() < rows.input_ids.numel() / 2
    got, got_gradients = products()
    monkeypatch.setattr(running, "can_pack", lambda _: False)
    want, want_gradients = products()
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other)
    scale = max(float(g.abs().max()) for g in want_gradients)
    assert all(float((a - b).abs().max()) < 1e-5 * scale for a, b in zip(got_gradients, want_gradients, strict=True))


def test_what_reads_a_row_as_a_whole_is_not_packed() -> None:
    assert running._inputs(Anatomy.of(model("bert", sequence=True)), uneven())[0] is None
    assert running._inputs(Anatomy.of(model("modernbert")), uneven())[0] is None  # was not compared


def test_packed_rows_in_half_precision() -> None:
    for attention in sorted(packing.ATTENTION):
        net = model("bert", attention=attention).to(torch.bfloat16)
        made = Step(net, Anatomy.of(net), {"a": uneven()}).run([token_logp("a")])
        assert torch.isfinite(made[token_logp("a")]).all()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_gradients_are_those_of_a_plain_pass(kind: str) -> None:
    net, rows = model(kind), batch()
    made = Step(net, Anatomy.of(net), {"a": rows}).run([token_logp("a"), at_labels("a", 2)])
    (-made[token_logp("a")].mean() + made[at_labels("a", 2)].square().mean()).backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    out = net(input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True)
    assert rows.classes is not None
    loss = nn.functional.cross_entropy(out.logits[rows.label_mask], rows.classes[rows.label_mask])
    (loss + out.hidden_states[2][rows.label_mask].square().mean()).backward()
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padding_does_not_matter(kind: str) -> None:
    net, rows = model(kind), batch()
    pad = net.config.pad_token_id
    wide = Batch(
        nn.functional.pad(torch.where(rows.attention_mask.bool(), rows.input_ids, pad), (0, 4), value=pad),
        nn.functional.pad(rows.attention_mask, (0, 4)), nn.functional.pad(rows.label_mask, (0, 4)),
        classes=nn.functional.pad(rows.classes, (0, 4), value=-100),
    )  # fmt: skip
    own = Batch(
        torch.where(rows.attention_mask.bool(), rows.input_ids, pad),
        rows.attention_mask,
        rows.label_mask,
        classes=rows.classes,
    )
    values = [Step(net, Anatomy.of(net), {"a": b}).run([token_logp("a")])[token_logp("a")] for b in (own, wide)]
    torch.testing.assert_close(*values)


def test_blocks_above_the_highest_layer_do_not_run() -> None:
    net, rows = model("bert"), batch()
    ran: list[int] = []
    for index, block in enumerate(net.bert.encoder.layer):
        block.register_forward_hook(lambda *_, i=index: ran.append(i))
    made = Step(net, Anatomy.of(net), {"a": rows}).run([at_labels("a", 1)])
    assert ran == [0]
    assert made[at_labels("a", 1)].shape == (10, WIDTH)


def test_a_model_without_a_known_head_is_refused() -> None:
    from transformers import AutoModel

    with pytest.raises(ValueError, match="head"):
        Anatomy.of(AutoModel.from_config(model("bert").config))
