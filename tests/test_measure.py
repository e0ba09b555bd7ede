"""The sweep, generation and latent numbers against loops, one sequence at a time, and what they must leave alone."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from excise import geometry
from excise.errors import InputRefused, UsageError
from excise.forward import Anatomy
from excise.metrics import measure, states
from excise.metrics.generate import generation_columns, references
from excise.metrics.table import check
from excise.records import Record
from excise.tasks import causal_lm

HOW = causal_lm.Encoding(template="{prompt} ", max_length=64)


class Words:
    """A tokenizer of words: 0 pads and ends, the rest is numbered by a stable hash."""

    eos_token_id, pad_token_id, chat_template, size = 0, 0, None, 61

    def __init__(self) -> None:
        self.known: dict[int, str] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = [1 + zlib.crc32(w.encode()) % (self.size - 1) for w in text.split()]
        self.known.update(zip(ids, text.split(), strict=True))
        return {"input_ids": ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(self.known.get(i, f"w{i}") for i in ids if i or not skip_special_tokens)


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=Words.size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows(n: int, seed: int, *, more: bool = True, groups: bool = True) -> list[Record]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"v{k}" for k in rng.integers(0, 40, rng.integers(low, high)))

    return [
        Record(
            text(1, 9), text(1, 14),
            paraphrases=tuple((None, text(2, 9)) for _ in range(i % 3)) if more else (),
            false_answers=tuple(text(1, 6) for _ in range(2)) if more else (),
            group=f"p{i % 4}" if groups else None,
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def sides() -> dict[str, list[Record]]:
    return {
        "forget": rows(7, 1),
        "untouched": rows(5, 2),
        "never_seen": rows(4, 3, more=False, groups=False),
        "plain": [Record(None, "a b c d e f g"), Record(None, "h i j")],
    }


@torch.no_grad()
def oracle(
    model: Any, example: causal_lm.Example, layers: list[int]
) -> tuple[list[list[float]], dict[int, np.ndarray]]:
    """One sequence alone, all logits, one token after the other, in Python floats."""
    out = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True)
    columns: list[list[float]] = []
    for t in range(example.label_start, len(example.input_ids)):
        logits = [float(v) for v in out.logits[0, t - 1]]
        top = max(logits)
        log_total = top + math.log(sum(math.exp(v - top) for v in logits))
        logp = [v - log_total for v in logits]
        mu = sum(math.exp(v) * v for v in logp)
        variance = sum(math.exp(v) * (v - mu) ** 2 for v in logp)
        label = example.input_ids[t]
        columns.append([logp[label], float(logits.index(top) == label), mu, math.sqrt(variance)])
    return columns, {j: out.hidden_states[j][0].mean(0).numpy() for j in layers}


def test_sweep_agrees_with_one_sequence_at_a_time(model: Any, sides: dict[str, list[Record]]) -> None:
    layers, words = [0, 2, -1], Words()
    swept = measure.sweep(model, Anatomy.of(model), words, sides, HOW, batch_tokens=50, layers=layers)
    for side, records in sides.items():
        table = check(swept.tables[side])
        found, paraphrases = table.columns, 0
        sequences = causal_lm.sequences(records, words, HOW)
        assert found["row"].tolist() == [row for row, _, _ in sequences]
        assert found["kind"].tolist() == [kind for _, kind, _ in sequences]
        assert table.lengths.tolist() == [len(e.input_ids) - e.label_start for _, _, e in sequences]
        assert found["eos"].all()
        texts = [t for r in records for t in (r.completion, *(a for _, a in r.paraphrases), *r.false_answers)]
        assert found["zlib"].tolist() == [len(zlib.compress(t.encode())) for t in texts]
        for s, (row, kind, example) in enumerate(sequences):
            columns, pooled = oracle(model, example, layers)
            here = slice(found["offsets"][s], found["offsets"][s + 1])
            for i, name in enumerate(("logp", "hit", "mu", "sigma")):
                expected = [c[i] for c in columns]
                np.testing.assert_allclose(found[name][here], expected, rtol=1e-4, atol=2e-5, err_msg=name)
            for layer in layers:
                if kind == 0:
                    np.testing.assert_allclose(swept.states[side][layer][row], pooled[layer], rtol=1e-4, atol=1e-5)
                if kind == 1:
                    own = swept.paraphrase_states[side][layer][paraphrases]
                    np.testing.assert_allclose(own, pooled[layer], rtol=1e-4, atol=1e-5)
            paraphrases += kind == 1
    assert "never_seen" not in swept.paraphrase_states
    assert "group" not in swept.tables["never_seen"].columns
    assert swept.tables["forget"].columns["group"].tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_batch_size_and_company_do_not_matter(model: Any, sides: dict[str, list[Record]]) -> None:
    anatomy, words = Anatomy.of(model), Words()
    whole = measure.sweep(model, anatomy, words, sides, HOW, batch_tokens=4096, layers=[-1])
    single = measure.sweep(model, anatomy, words, sides, HOW, batch_tokens=1, layers=[-1])
    alone = measure.sweep(model, anatomy, words, {"forget": sides["forget"]}, HOW, batch_tokens=70, layers=[-1])
    turned = measure.sweep(model, anatomy, words, {"forget": sides["forget"][::-1]}, HOW, layers=[-1])
    for other in (single, alone):
        for name, values in whole.tables["forget"].columns.items():
            np.testing.assert_allclose(other.tables["forget"].columns[name], values, rtol=1e-4, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(other.states["forget"][-1], whole.states["forget"][-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(turned.states["forget"][-1][::-1], whole.states["forget"][-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["attended", "answer", "last"])
def test_pooling_reads_the_positions_that_it_names(model: Any, pooling: str) -> None:
    records, words = {"forget": rows(5, 9, more=False)}, Words()
    swept = measure.sweep(model, Anatomy.of(model), words, records, HOW, layers=[-1], pooling=pooling)
    for row, example in enumerate(causal_lm.encode_records(records["forget"], words, HOW)):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([example.input_ids])).last_hidden_state[0]
        part = {"attended": hidden, "answer": hidden[example.label_start :], "last": hidden[-1:]}[pooling]
        np.testing.assert_allclose(swept.states["forget"][-1][row], part.mean(0).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [4_000_000, 130])
def test_vocabulary_moments_in_any_chunk(model: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("excise.forward.head.CHUNK_ELEMENTS", size)
    generator = torch.Generator().manual_seed(0)
    vectors = (
        torch.randn(9, 32, generator=generator)
        * torch.tensor([0.0, 1e-3, 1.0, 3.0, 10.0, 30.0, 100.0, 1.0, 2.0])[:, None]
    )
    targets = torch.randint(0, Words.size, (9,), generator=generator)
    with torch.no_grad():
        found = measure.token_columns(vectors, targets, Anatomy.of(model))
        logp = model.lm_head(vectors).double().log_softmax(-1)
    p = logp.exp()
    mu = (p * logp).sum(-1)
    sigma = (p * (logp - mu[:, None]) ** 2).sum(-1).sqrt()
    expected = torch.stack((logp[torch.arange(9), targets], (logp.argmax(-1) == targets).double(), mu, sigma), 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    assert found[0].tolist() == pytest.approx([-math.log(Words.size), float(targets[0] == 0), -math.log(Words.size), 0])


def test_every_sequence_goes_through_the_model_once(model: Any, sides: dict[str, list[Record]]) -> None:
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    steps: list[tuple[int, int]] = []
    swept = measure.sweep(
        model, Anatomy.of(model), Words(), sides, HOW, batch_tokens=60, layers=[0, 1, 2, 3],
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    handle.remove()
    total = sum(t.sequences for t in swept.tables.values())
    assert sum(seen) == total
    assert steps[-1] == (total, total)
    assert len(steps) == len(seen)


def test_measuring_leaves_the_model_and_the_dice_alone(sides: dict[str, list[Record]]) -> None:
    model = llama(3).train()
    model.model.layers[1].eval()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, repetition_penalty=1.3, eos_token_id=[0, 5]
    )
    own = model.generation_config
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(11)
    dice, forward_method = torch.get_rng_state(), model.lm_head.forward
    measure.sweep(model, Anatomy.of(model), Words(), sides, HOW, layers=[1, -1])
    measure.generate(model, Words(), sides["forget"], HOW, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), dice)
    assert [m.training for m in model.modules()] == modes
    assert model.generation_config is own
    assert model.lm_head.forward == forward_method
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()  # still trains


def test_an_adapter_is_measured_like_the_merged_model(sides: dict[str, list[Record]]) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(4), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    mine = measure.sweep(adapted.train(), Anatomy.of(adapted), Words(), sides, HOW, layers=[-1])
    texts = measure.generate(adapted, Words(), sides["forget"], HOW, max_new_tokens=6)
    merged = adapted.merge_and_unload()
    theirs = measure.sweep(merged, Anatomy.of(merged), Words(), sides, HOW, layers=[-1])
    np.testing.assert_allclose(
        mine.tables["forget"].columns["logp"], theirs.tables["forget"].columns["logp"], atol=2e-4
    )
    assert texts == measure.generate(merged, Words(), sides["forget"], HOW, max_new_tokens=6)


def test_an_empty_side_gives_an_empty_table(model: Any) -> None:
    swept = measure.sweep(model, Anatomy.of(model), Words(), {"forget": rows(2, 1), "retain": []}, HOW, layers=[-1])
    assert check(swept.tables["retain"]).sequences == 0
    assert "retain" not in swept.states


def test_a_broken_model_is_named_not_averaged() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(InputRefused, match="forget table: column 'logp' holds a value that is not finite"):
        measure.sweep(model, Anatomy.of(model), Words(), {"forget": rows(3, 1)}, HOW)


# --- generation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Any, ids: tuple[int, ...], bound: int) -> list[int]:
    """One row alone, no cache, one token after the other."""
    out = list(ids)
    for _ in range(bound):
        token = int(model(input_ids=torch.tensor([out])).logits[0, -1].argmax())
        if token == 0:
            break
        out.append(token)
    return out[len(ids) :]


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_generation_is_greedy_and_each_row_its_own(batch_rows: int) -> None:
    words, model = Words(), llama(5)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=0)
    with torch.no_grad():  # now and then an end, so that rows stop at different places
        model.lm_head.weight[0] *= 1.5
    records = rows(9, 6, more=False)
    texts = measure.generate(model, words, records, HOW, max_new_tokens=12, batch_rows=batch_rows)
    for record, text, prompt in zip(records, texts, causal_lm.prompts(records, words, HOW), strict=True):
        bound = min(12, math.ceil(1.5 * (len(record.completion.split()) + 1)) + 8)
        assert text == words.decode(greedy(model, prompt, bound))


def test_a_row_is_cut_at_its_own_bound(model: Any) -> None:
    words = Words()
    short, long = Record("a b", "c"), Record("a b", " ".join("cdefghijkl"))
    both = measure.generate(model, words, [short, long], HOW, max_new_tokens=50)
    assert len(both[0].split()) <= 1.5 * 2 + 8
    assert both[0] == measure.generate(model, words, [short], HOW, max_new_tokens=50)[0]


def test_plain_text_is_continued_from_its_first_half(model: Any) -> None:
    words, record = Words(), Record(None, "a b c d e f g")
    ids = causal_lm.encode_records([record], words, HOW)[0].input_ids
    text = measure.generate(model, words, [record], HOW, max_new_tokens=4)[0]
    assert text == words.decode(greedy(model, ids[:4], 4))
    assert references([record], words, HOW) == ["e f g"]


def test_generation_stays_within_the_context(model: Any) -> None:
    record = Record(" ".join(f"q{i}" for i in range(58)), "a b")
    text = measure.generate(model, Words(), [record, Record("x", "y")], HOW, max_new_tokens=64, batch_rows=1)[0]
    assert len(text.split()) <= 64 - 58


def test_rouge_and_repetition_by_hand() -> None:
    def longest(a: list[str], b: list[str]) -> int:
        best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
        return best[-1][-1]

    answer, text = "ada met bob in oslo at noon", "at noon ada was in oslo"
    common = longest(answer.split(), text.split())
    recall, precision = common / 7, common / 6
    columns = generation_columns([text, "cats", "x"], [answer, "cat", "東京"])
    assert columns["rouge_l_recall"][0] == pytest.approx(recall)
    assert columns["rouge_l_f1"][0] == pytest.approx(2 * recall * precision / (recall + precision))
    assert columns["rouge1_recall"][0] == pytest.approx(5 / 7)
    assert columns["rouge_l_recall"][1] == 1  # stemmed
    assert np.isnan(columns["rouge_l_recall"][2])  # what ROUGE cannot read is not a miss
    assert generation_columns(["a b c d a b c d"], ["a"])["repetition"][0] == pytest.approx(1 - 4 / 5)
    assert generation_columns([], [])["rouge_l_recall"].shape == (0,)


def test_with_generations_adds_columns_that_a_table_accepts(model: Any, sides: dict[str, list[Record]]) -> None:
    words = Words()
    swept = measure.sweep(model, Anatomy.of(model), words, sides, HOW)
    table, texts = measure.with_generations(
        swept.tables["forget"], model, words, sides["forget"], HOW, max_new_tokens=8
    )
    assert check(table).has("rouge_l_recall", "rouge_l_f1", "rouge1_recall", "repetition", "logp")
    assert len(texts) == len(sides["forget"])


# --- latent numbers -----------------------------------------------------------------------------------------------


def clouds(gap: float, n: int = 40, d: int = 6, seed: int = 0) -> dict[str, dict[int, np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = {
        side: rng.normal(size=(n, d)).astype(np.float32) for side in ("forget", "retain", "untouched", "never_seen")
    }
    made["forget"] += gap
    return {side: {1: 0.5 * x, 2: x} for side, x in made.items()}


def test_latent_numbers_are_those_of_the_geometry() -> None:
    own, before = clouds(1.0), clouds(0.0)
    found = measure.latent(own, {}, reference_states=before)
    a, b = (torch.from_numpy(own[s][2]) for s in ("forget", "untouched"))
    assert found.values["entanglement"]["value"] == pytest.approx(geometry.entanglement(a, b))
    assert (
        found.values["entanglement"]["low"]
        < found.values["entanglement"]["value"]
        < found.values["entanglement"]["high"]
    )
    assert found.values["w2_exact"]["value"] == pytest.approx(geometry.w2_exact(a, b))
    assert found.values["mk_mmd"]["p"] <= 0.01
    assert found.values["retain_drift"]["value"] == 0
    assert found.values["latent_projection_auc"]["value"] > 0.9
    assert found.layers == [1, 2]
    assert found.entanglement_by_layer == pytest.approx([geometry.entanglement(a, b)] * 2)
    assert all(set(v) >= {"value", "low", "high", "n"} and v["n"] == 40 for v in found.values.values())
    assert not found.not_shown


def test_what_cannot_be_measured_is_said() -> None:
    own = clouds(1.0)
    alone = measure.latent({"forget": own["forget"]})
    assert not alone.values
    assert {"entanglement", "mk_mmd", "latent_projection_auc", "retain_drift"} <= set(alone.not_shown)
    assert "p" not in measure.latent(own, {"forget": [f"p{i % 5}" for i in range(40)]}).values["mk_mmd"]
    same = {"forget": {1: np.ones((6, 2))}, "retain": {1: np.ones((6, 2))}}
    assert "entanglement" in measure.latent(same).not_shown


def test_memory_of_a_group_is_not_membership_of_its_kind() -> None:
    """Each person has a direction of its own and nothing else: by row it is found, by group it is not."""
    rng, people = np.random.default_rng(0), [f"p{i // 8}" for i in range(64)]
    groups = {"forget": people, "never_seen": [f"n{p}" for p in people]}
    by_row, by_group = [], []
    for _ in range(6):
        layered = {
            side: {1: np.repeat(rng.normal(size=(8, 200)), 8, 0) * 3 + rng.normal(size=(64, 200))}
            for side in ("forget", "never_seen")
        }
        by_row.append(measure.latent(layered).values["latent_membership_auc"]["value"])
        by_group.append(measure.latent(layered, groups).values["latent_membership_auc"]["value"])
    assert min(by_row) > 0.95
    assert 0.3 < np.mean(by_group) < 0.7


@pytest.mark.parametrize("normalize", [False, True])
def test_jackknife_by_leaving_rows_out(normalize: bool) -> None:
    own = clouds(0.8, n=12)
    a, b = (torch.from_numpy(own[s][2]).double() for s in ("forget", "retain"))
    variance = 0.0
    for one, other in ((a, b), (b, a)):
        logs = []
        for i in range(len(one)):
            rest = torch.cat((one[:i], one[i + 1 :]))
            logs.append(math.log(geometry.entanglement(rest, other, normalize=normalize)))
        mean = sum(logs) / len(logs)
        variance += (len(one) - 1) / len(one) * sum((v - mean) ** 2 for v in logs)
    value = geometry.entanglement(a, b, normalize=normalize)
    low, high = states.entanglement_interval(a, b, normalize=normalize)
    assert low == pytest.approx(value * math.exp(-1.959964 * math.sqrt(variance)))
    assert high == pytest.approx(value * math.exp(1.959964 * math.sqrt(variance)))
    near = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert states.entanglement_interval(near, near + 1e-3) == (None, None)


def test_the_map_has_one_pair_of_axes() -> None:
    original, changed = clouds(3.0), clouds(6.0)
    last = {name: {s: v[2] for s, v in own.items()} for name, own in (("original", original), ("unlearned", changed))}
    picture = measure.state_map(last)
    assert picture["method"] == "pca"
    assert len(picture["explained"]) == 2
    assert set(picture["models"]["original"]) == {"forget", "untouched", "never_seen"}
    basis = np.concatenate([last["original"][s] for s in last["original"] if s != "retain"])
    fitted = geometry.fit_pca(torch.from_numpy(basis))
    expected = fitted(torch.from_numpy(last["unlearned"]["forget"])).numpy()
    np.testing.assert_allclose(picture["models"]["unlearned"]["forget"], expected, atol=1e-4)
    with pytest.raises(UsageError, match="original"):
        measure.state_map({"gold": last["original"]})
    with pytest.raises(UsageError, match="pca, umap"):
        measure.state_map(last, method="tsne")
