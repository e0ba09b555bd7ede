"""Each objective's formula again, with Python loops over plain numbers: what the vectorised functions must agree with.

An oracle takes the tensors of a term (as the term's ``inputs`` name them) and the factory's options, and returns one
float per row or token. Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Inputs = dict[str, Any]
Options = dict[str, Any]


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def log_sigmoid(x: float) -> float:
    return -softplus(-x)


def log_softmax(z: list[float]) -> list[float]:
    top = max(z)
    normaliser = top + math.log(sum(math.exp(v - top) for v in z))
    return [v - normaliser for v in z]


def softmax(z: list[float]) -> list[float]:
    return [math.exp(v) for v in log_softmax(z)]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def ga(given: Inputs, _: Options) -> list[float]:
    return list(given["logp"].tolist())


def nll(given: Inputs, _: Options) -> list[float]:
    return [-v for v in given["logp"].tolist()]


def wga(given: Inputs, options: Options) -> list[float]:
    return [math.exp(v) ** options["beta"] * v for v in given["logp"].tolist()]


def satimp(given: Inputs, options: Options) -> list[float]:
    out = []
    for v in given["logp"].tolist():
        p = math.exp(v)
        out.append(p ** options["beta1"] * (1 - p) ** options["beta2"] * v)
    return out


def npo(given: Inputs, options: Options) -> list[float]:
    beta = options["beta"]
    out = []
    for own, ref in zip(given["logp"].tolist(), given["ref_logp"].tolist(), strict=True):
        out.append(2 / beta * math.log(1 + math.exp(beta * own) / math.exp(beta * ref)))
    return out


def simnpo(given: Inputs, options: Options) -> list[float]:
    beta = options["beta"]
    out = []
    for own, count in zip(given["logp"].tolist(), given["count"].tolist(), strict=True):
        out.append(-2 / beta * log_sigmoid(beta * (-own / count - options["delta"])))
    return out


def dpo(given: Inputs, options: Options) -> list[float]:
    beta = options["beta"]
    out = []
    for row in range(len(given["winner"])):
        up = float(given["winner"][row]) - float(given["ref_winner"][row])
        down = float(given["loser"][row]) - float(given["ref_loser"][row])
        out.append(-2 / beta * log_sigmoid(beta * up - beta * down))
    return out


def ihl(given: Inputs, _: Options) -> list[float]:
    out = []
    for z, y in zip(given["logits"].tolist(), given["labels"].tolist(), strict=True):
        p = softmax(z)
        out.append(max(0.0, 1 + p[y] - max(v for token, v in enumerate(p) if token != y)))
    return out


def undial(given: Inputs, options: Options) -> list[float]:
    out = []
    triples = zip(given["logits"].tolist(), given["ref_logits"].tolist(), given["labels"].tolist(), strict=True)
    for z, z_ref, y in triples:
        teacher = softmax([v - options["beta"] if token == y else v for token, v in enumerate(z_ref)])
        out.append(-sum(q * lp for q, lp in zip(teacher, log_softmax(z), strict=True)))
    return out


def pdu(given: Inputs, _: Options) -> list[float]:
    return [(max(z) - sum(z) / len(z)) ** 2 for z in given["logits"].tolist()]


def ceu(given: Inputs, options: Options) -> list[float]:
    out = []
    for z, y, place in zip(
        given["logits"].tolist(), given["labels"].tolist(), given["token_index"].tolist(), strict=True
    ):
        if place < options["skip"]:
            out.append(0.0)
            continue
        others = [token for token in range(len(z)) if token != y]
        target = softmax([z[token] for token in others])
        lp = log_softmax(z)
        out.append(-sum(q * lp[token] for q, token in zip(target, others, strict=True)))
    return out


def kl(given: Inputs, _: Options) -> list[float]:
    out = []
    for z, z_ref in zip(given["logits"].tolist(), given["ref_logits"].tolist(), strict=True):
        lp, lq = log_softmax(z), log_softmax(z_ref)
        out.append(sum(math.exp(b) * (b - a) for a, b in zip(lp, lq, strict=True)))
    return out


def _mean_square(states: Any, where: Any, target: Callable[[int, int, int], float]) -> list[float]:
    out = []
    for row in range(states.shape[0]):
        per_token = []
        for place in range(states.shape[1]):
            if bool(where[row, place]):
                width = states.shape[2]
                squares = [(float(states[row, place, d]) - target(row, place, d)) ** 2 for d in range(width)]
                per_token.append(sum(squares) / width)
        out.append(sum(per_token) / len(per_token) if per_token else 0.0)
    return out


def rmu(given: Inputs, options: Options) -> list[float]:
    u = given["direction"].tolist()
    return _mean_square(given["states"], given["where"], lambda _r, _t, d: options["steering"] * u[d])


def rmu_retain(given: Inputs, _: Options) -> list[float]:
    ref = given["ref_states"]
    return _mean_square(given["states"], given["where"], lambda r, t, d: float(ref[r, t, d]))


def clreg(given: Inputs, options: Options) -> list[float]:
    layers = len(given["anchor"])
    count = len(given["positive"]) // layers
    tau, out = options["temperature"], []
    for row in range(len(given["anchor"][0])):
        total = 0.0
        for layer in range(layers):
            z = given["anchor"][layer][row].tolist()
            negatives = [cosine(z, other) for other in given["negative"][layer].tolist()]
            if options["reduce"] == "mean_sim":
                negatives = [sum(negatives) / len(negatives)]
            if options["reduce"] == "hardest":
                negatives = [max(negatives)]
            for view in range(count):
                s_pos = cosine(z, given["positive"][view * layers + layer][row].tolist())
                total += _contrast(s_pos, negatives, tau, options) / count
            never = given["never_seen"][layer].tolist() if "never_seen" in given else []
            total += sum(_contrast(cosine(z, other), negatives, tau, options) for other in never) / max(1, len(never))
        out.append(total / layers)
    return out


def _contrast(s_pos: float, negatives: list[float], tau: float, options: Options) -> float:
    if options["loss"] == "dpo":
        return sum(-2 * tau * log_sigmoid((s_pos - s) / tau) for s in negatives) / len(negatives)
    own = math.exp(s_pos / tau)
    value = -math.log(own / (own + sum(math.exp(s / tau) for s in negatives)))
    return 2 * tau * value if options["scale_infonce"] else value


ORACLES: dict[str, Callable[[Inputs, Options], list[float]]] = {
    "ga": ga,
    "wga": wga,
    "satimp": satimp,
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "altpo": dpo,
    "idk_nll": nll,
    "ihl": ihl,
    "undial": undial,
    "pdu": pdu,
    "ceu": ceu,
    "rmu": rmu,
    "nll": nll,
    "kl": kl,
    "rmu_retain": rmu_retain,
    "primal_dual": nll,
    "clreg": clreg,
}
