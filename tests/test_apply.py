"""A start leaves the model's function, and what is saved after training is true on the untouched base."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from torch import Tensor, nn

import excise
import tiny
from excise import reference, train
from excise.errors import UsageError
from excise.forward import REFERENCE, Anatomy, Batch, lora_factors
from excise.initialise import apply, delivery, importance, store
from excise.initialise.collect import collect
from excise.initialise.starts import STARTS, Factors, Start, plain, rila
from excise.objectives.forget import dpo, npo
from excise.objectives.retain import kl, nll
from excise.objectives.value import value_of

KINDS = ("llama", "gpt2", "gpt_neox", "gemma2")
MOVING = [name for name in STARTS if name != "plain"]
DATA = tiny.Data({"forget": 12, "retain": 16, "forget_alternative": 12})
#: The step-0 gate: largest |logit difference| in fp32 at logits of size about 20.
GATE, SIZE = 1e-4, 20.0


def loud(kind: str) -> nn.Module:
    """A tiny model whose logits reach about 20."""
    more = {"final_logit_softcapping": 30.0} if kind == "gemma2" else {}
    net = tiny.model(kind, **more)
    head = net.get_output_embeddings().weight
    for _ in range(12):  # a tied embedding, or a cap, does not follow the factor at once
        with torch.no_grad():
            head.mul_(SIZE / float(logits(net).abs().max()))
    assert 18 < float(logits(net).abs().max()) < 22
    return net


#: Enough positions that the largest difference of some is not a matter of chance.
IDS = torch.randint(1, tiny.VOCABULARY, (64, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(net: nn.Module) -> Tensor:
    return net(IDS).logits.float()


def attached(base: nn.Module, **more: Any) -> Any:
    """A fresh adapter on all linear layers; the base is copied."""
    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**fields)).eval()


def batches(side: str) -> Iterator[Batch]:
    return (DATA.batch(side, range(i, min(i + 4, DATA.counts[side]))) for i in range(0, DATA.counts[side], 4))


def statistics(net: Any, start: Start) -> dict[str, dict[str, Any]]:
    """What a start reads, by parameter and layer."""
    anatomy, layers, out = Anatomy.of(net), apply.layers(net), {}
    for key, statistic in start.needs.items():
        loss = importance.label_loss(net, anatomy)
        if statistic.kind == "output_moments":
            out[key] = collect(net, anatomy, batches(statistic.side))
        elif statistic.kind == "squared_gradient":
            weights = {n: x.get_base_layer().weight for n, x in layers.items()}
            found = importance.squared_gradients(net, weights, batches(statistic.side), loss)
            out[key] = {n: v.T if layers[n].fan_in_fan_out else v for n, v in found.items()}
        else:
            out[key] = importance.adapter_variances(net, apply.factors_of(net), batches(statistic.side), loss)
    return out


def started(net: Any, name: str, base: str = "changed") -> dict[str, Factors]:
    """Apply a start to a model; the factors."""
    start = STARTS[name](base=base)
    taken = statistics(net, start)
    factors = {
        n: start.fn(apply.weight_of(x), apply.rank_of(x), apply.scale_of(x), **{k: v[n] for k, v in taken.items()})
        for n, x in apply.layers(net).items()
    }
    return apply.start(net, factors, base=start.base)


def jolted(net: Any) -> None:
    """As if the adapter had been trained for a while."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for pair in apply.factors_of(net).values():
            for p in pair:
                p.add_(0.3 * float(p.abs().mean()) * torch.randn(p.shape, generator=generator))


def apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


# --- the gates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["changed", "kept"])
@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_leaves_the_function_and_what_is_saved_is_true(kind: str, name: str, base: str, tmp_path: Path) -> None:
    original = loud(kind)
    own, net = logits(original), attached(original)
    weights = store.fingerprint(net)
    factors = started(net, name, base)
    assert apart(logits(net), own) <= GATE
    assert (store.fingerprint(net) == weights) == (base == "kept")
    assert all(bool(b.any()) for b in lora_factors(net, "B").values()), "the adapter is at the start, not at zero"
    jolted(net)
    trained = logits(net)
    assert apart(trained, own) > 0.5
    delivery.save(net, factors, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path)).eval()
    assert apart(logits(stock), trained) <= GATE
    with stock.disable_adapter():
        assert apart(logits(stock), own) == 0, "rolled back: nothing is left"
    whole = PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path)).merge_and_unload()
    assert apart(logits(whole), trained) <= GATE
    stock.delete_adapter("default")
    assert store.fingerprint(stock) == weights
    assert apart(logits(net.merge_and_unload()), trained) <= GATE


@pytest.mark.parametrize("base", ["changed", "kept"])
@pytest.mark.parametrize("name", MOVING)
def test_in_bf16_a_start_costs_no_more_than_the_cast_itself(name: str, base: str) -> None:
    for kind in KINDS:
        original = loud(kind)
        own = logits(original)
        cast = copy.deepcopy(original).to(torch.bfloat16)
        error = apart(logits(cast), own)
        net = attached(cast)
        started(net, name, base)
        assert all(p.dtype == torch.float32 for pair in apply.factors_of(net).values() for p in pair)
        assert 0 < apart(logits(net), own) <= 2 * error, kind


def test_peft_converts_to_the_same_adapter(tmp_path: Path) -> None:
    """The doubled adapter is what PEFT itself makes of an initial and a trained one, patterns included."""
    net = attached(tiny.model("llama"), rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6, "down_proj": 12})
    factors = started(net, "pissa")
    net.peft_config["default"].init_lora_weights = True
    net.save_pretrained(tmp_path / "begun")
    jolted(net)
    delivery.save(net, factors, tmp_path)
    net.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    ours, theirs = load_peft_weights(str(tmp_path)), load_peft_weights(str(tmp_path / "theirs"))
    assert tiny.apart(ours, theirs) == 0
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, tmp_path / "theirs")]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert configs[0][key] == configs[1][key]
    assert {len(v) for k, v in ours.items() if "lora_A" in k} == {4, 8}


def test_saving_it_as_it_is_would_be_wrong(tmp_path: Path) -> None:
    """Why the doubled form exists: the trained factors alone mean something else on the untouched base."""
    original = tiny.model("llama")
    net = attached(original)
    started(net, "pissa")
    net.save_pretrained(tmp_path)
    assert apart(logits(PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path)).eval()), logits(net)) > 0.1


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["changed", "kept"])
@pytest.mark.parametrize("name", MOVING)
def test_the_reference_is_the_original_under_every_start(name: str, base: str, tmp_path: Path) -> None:
    """NPO, DPO and KL begin at the values that the unchanged model gives them: the reference was stored before."""
    terms = [npo(), dpo(), kl()]
    needs = [p for t in terms for p in t.needs() if p.model == REFERENCE]
    original = tiny.model("llama")

    def stored(net: nn.Module) -> reference.Reference:
        return reference.store(
            net, Anatomy.of(net), needs, DATA.counts, DATA.batch, autocast=lambda: train.autocast("fp32")
        )

    net = attached(original)
    kept = stored(net)
    started(net, name, base)
    plain_ = tiny.step_of(original, *((s, DATA.batch(s, range(4))) for s in DATA.counts), reference=stored(original))
    ours = tiny.step_of(net, *((s, DATA.batch(s, range(4))) for s in DATA.counts), reference=kept)
    for term in terms:
        wanted = value_of(term, plain_.run(term.needs()))
        found = value_of(term, ours.run(term.needs()))
        assert torch.allclose(found, wanted, atol=1e-5), term.name
    assert float(value_of(kl(), ours.run(kl().needs())).abs().max()) < 1e-5, "no distance from itself"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", ["changed", "kept"])
def test_only_the_adapter_trains(base: str, checkpointing: bool, tmp_path: Path) -> None:
    net = attached(tiny.model("llama"))
    net.enable_input_require_grads()
    names = {n for n, p in net.named_parameters() if p.requires_grad}
    started(net, "rila", base)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == names
    assert all("lora_" in n and ".default." in n for n in names)
    model = {"gradient_checkpointing": checkpointing}
    run = tiny.Run(tmp_path, [npo(), nll()], net=net, data=DATA, model=model)
    before = tiny.weights(run.net)
    gradients: dict[str, float] = {}
    step = run.trainer._get_grad_norm

    def watched(*args: Any, **kwargs: Any) -> Any:
        gradients.update({n: float(p.grad.norm()) for n, p in run.net.named_parameters() if p.grad is not None})
        return step(*args, **kwargs)

    run.trainer._get_grad_norm = watched
    run.go()
    assert gradients.keys() == names
    assert min(gradients.values()) > 0, "both factors of every layer have a gradient from the first step on"
    moved = {n for n, value in run.weights.items() if not torch.equal(value, before[n])}
    assert moved == names


def test_both_adapters_act_and_one_trains_after_peft_switched_them(tmp_path: Path) -> None:
    """PEFT's own switches thaw what they activate; `activate` sets it right again."""
    net = attached(tiny.model("llama"))
    trained = {n: p.requires_grad for n, p in net.named_parameters()}
    started(net, "rila", "kept")
    own = logits(net)
    net.set_adapter("default")
    assert apart(logits(net), own) > 0.1, "the frozen adapter no longer takes the start off"
    apply.activate(net, trained)
    assert apart(logits(net), own) == 0
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {n for n, yes in trained.items() if yes}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_out_by_in(kind: str) -> None:
    net = attached(tiny.model(kind, depth=1))
    for name, layer in apply.layers(net).items():
        x = torch.randn(3, layer.in_features)
        base, bias = layer.get_base_layer(), getattr(layer.get_base_layer(), "bias", None)
        out = x @ apply.weight_of(layer).T + (0 if bias is None else bias)
        assert torch.allclose(out, base(x), atol=1e-5), name


# --- PEFT models of one's own -------------------------------------------------------------------------------------


def loader(side: str) -> list[dict[str, Tensor]]:
    return [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches(side)]


@pytest.mark.parametrize("base", ["changed", "kept"])
def test_any_peft_model_can_be_started(base: str, tmp_path: Path) -> None:
    original = tiny.model("llama")
    net, same = attached(original), attached(original)
    factors = excise.initialize_lora_rila_weights(net, loader("forget"), loader("retain"), beta=0.5, base=base)
    ours = started(same, "rila", base)
    for name, own in factors.items():
        assert torch.allclose(own.B @ own.A, ours[name].B @ ours[name].A, atol=1e-5)
    assert apart(logits(net), logits(original)) < 1e-5
    jolted(net)
    excise.save_lora_adapter(net, factors, tmp_path / "saved")
    stock = PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path / "saved")).eval()
    assert apart(logits(stock), logits(net)) < 1e-5


def test_the_directions_can_be_kept_and_given_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    original = tiny.model("llama")
    state = excise.get_rila_state_dict(attached(original), loader("forget"), loader("retain"), beta=0.7)
    save_file(state, tmp_path / "rila.safetensors")
    first, second = attached(original), attached(original)
    excise.initialize_lora_rila_weights(first, rila_state_dict=load_file(tmp_path / "rila.safetensors"))
    excise.initialize_lora_rila_weights(second, loader("forget"), loader("retain"), beta=0.7)
    assert tiny.apart(tiny.weights(first), tiny.weights(second)) < 1e-6
    other = attached(tiny.model("gpt_neox"))
    with pytest.raises(UsageError, match="of another model, other targets or another rank"):
        excise.initialize_lora_rila_weights(other, rila_state_dict=state)
    with pytest.raises(UsageError, match="another rank"):
        excise.initialize_lora_rila_weights(attached(original, r=2), rila_state_dict=state)


def test_a_base_in_four_bits_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="NOT TESTED: 4-bit bases need bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=how).eval()
    net = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {n: dequantize_module_weight(x.get_base_layer()).clone() for n, x in apply.layers(net).items()}
    with pytest.raises(UsageError, match="is quantised and cannot be changed: set base: kept"):
        excise.initialize_lora_rila_weights(net, loader("forget"), loader("retain"))
    excise.initialize_lora_rila_weights(net, loader("forget"), loader("retain"), base="kept")
    net.eval()
    for name, layer in apply.layers(net).items():
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():  # layer by layer: inside, the library rounds to bf16, which magnifies any difference
            assert apart(layer(x), layer.base_layer(x)) < 1e-5, name
        assert torch.allclose(apply.weight_of(layer), before[name], atol=0.02 * float(before[name].abs().max())), name
        assert bool(layer.lora_B["default"].weight.any())


def test_what_a_peft_model_must_be() -> None:
    original = tiny.model("llama")
    with pytest.raises(UsageError, match="an adapter named 'default'"):
        excise.initialize_lora_rila_weights(original, loader("forget"), loader("retain"))
    with pytest.raises(UsageError, match="give forget_dataloader and retain_dataloader, or a rila_state_dict"):
        excise.initialize_lora_rila_weights(attached(original))
    with pytest.raises(UsageError, match="the adapter changes the model already"):
        excise.initialize_lora_rila_weights(tiny.adapted(original), loader("forget"), loader("retain"))
    with pytest.raises(UsageError, match=r"use_dora and initialise\.rila"):
        excise.initialize_lora_rila_weights(attached(original, use_dora=True), loader("forget"), loader("retain"))
    with pytest.raises(UsageError, match="beta is 2"):
        excise.initialize_lora_rila_weights(attached(original), loader("forget"), loader("retain"), beta=2)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["use_dora", "use_rslora", "lora_bias"])
@pytest.mark.parametrize("base", ["changed", "kept"])
def test_other_forms_of_lora_are_refused(field: str, base: str) -> None:
    for name in MOVING:
        with pytest.raises(UsageError, match=rf"model\.lora\.{field} and initialise\.{name}"):
            apply.check_config(STARTS[name](base=base), {"r": 4, field: True})
    apply.check_config(plain(), {"r": 4, field: True})


@pytest.mark.parametrize("own", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_initialisations_of_peft_that_change_the_base_are_refused(own: str) -> None:
    with pytest.raises(UsageError, match="changes the base, so that the saved adapter would be wrong"):
        apply.check_config(plain(), {"init_lora_weights": own})
    apply.check_config(plain(), {"init_lora_weights": "gaussian"})
    with pytest.raises(UsageError, match=r"init_lora_weights: gaussian and initialise\.rila"):
        apply.check_config(rila(), {"init_lora_weights": "gaussian"})


def test_what_a_second_adapter_cannot_share_is_refused() -> None:
    for field in ({"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [1]}):
        with pytest.raises(UsageError, match="base: kept needs a second adapter"):
            apply.check_config(rila(base="kept"), field)
        apply.check_config(rila(), field)


def test_heads_and_embeddings_are_refused_with_the_reason() -> None:
    tied = attached(tiny.model("llama", tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    with pytest.raises(UsageError, match="lm_head is tied to the embedding"):
        apply.check_layers(tied, rila())
    loose = attached(tiny.model("llama", tie_word_embeddings=False), target_modules=["lm_head", "q_proj"])
    with pytest.raises(UsageError, match="lm_head has the vocabulary as its output"):
        apply.check_layers(loose, rila())
    table = attached(tiny.model("llama"), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UsageError, match="embed_tokens is an embedding"):
        apply.check_layers(table, rila())
    apply.check_layers(tied, plain())


def test_a_rank_above_a_layers_directions_is_refused() -> None:
    net = attached(tiny.model("llama"), r=17)  # keys and values have 16 outputs
    with pytest.raises(UsageError, match=r"rank 17 is above the 16 directions of .*k_proj"):
        apply.check_layers(net, rila())


def test_factors_of_another_model_are_refused() -> None:
    net, other = attached(tiny.model("llama")), attached(tiny.model("llama", depth=2))
    factors = started(other, "pissa")
    before = tiny.weights(net)
    with pytest.raises(ValueError, match="the factors are not those of this model"):
        apply.start(net, factors)
    assert tiny.apart(before, tiny.weights(net)) == 0
