"""What every number is called, what it says in plain words, which way it should point, and where it comes from.

Direction "gold": the target is the value of the model that was trained without the forget rows, so neither lower nor
higher is better by itself; "up" and "down" are kept for what the gold does not decide. Names are stable: reports and
results use them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from excise.metrics.evidence_catalogue import EVIDENCE, FAMILIES
from excise.metrics.metric import (
    ABOVE,
    AUC,
    CLOUDS,
    CLREG,
    MEMBER,
    MUSE,
    OU,
    RETAIN,
    SHARE,
    TOFU,
    UTILITY,
    Metric,
)

__all__ = ["FAMILIES", "METRICS", "Metric", "find", "label"]

METRICS: Mapping[str, Metric] = {
    "forget_probability": Metric(
        "forget_probability", "Probability of forgotten answers",
        "How likely the model still finds the exact answers it should have forgotten, word piece by word piece.",
        SHARE, "gold", TOFU, ("forget",), against_gold=ABOVE),
    "retain_probability": Metric(
        "retain_probability", "Probability of retained answers",
        "How likely the model finds the answers it should keep, on rows that unlearning did not touch where there are "
        "any.",
        SHARE, "up", TOFU, RETAIN, against_gold=UTILITY),
    "paraphrase_probability": Metric(
        "paraphrase_probability", "Probability of reworded forgotten answers",
        "How likely the model finds the same forgotten facts in other words: forgetting a wording is not forgetting a "
        "fact.",
        SHARE, "gold", OU, ("forget",), against_gold=ABOVE),
    "forget_truth_ratio": Metric(
        "forget_truth_ratio", "Truth ratio on forgotten rows",
        "Whether the model finds false answers about as likely as true ones; 1 means that it cannot tell them apart.",
        SHARE, "gold", TOFU, ("forget",),
        against_gold="near the gold: as undecided as a model that never saw the rows"),
    "retain_truth_ratio": Metric(
        "retain_truth_ratio", "Truth ratio on retained rows",
        "How clearly the model prefers true answers to false ones where it should know them.",
        SHARE, "up", TOFU, RETAIN, against_gold=UTILITY),
    "forget_rouge": Metric(
        "forget_rouge", "Overlap with forgotten answers",
        "How much of the forgotten answer appears, in order, in what the model writes when asked.",
        SHARE, "gold", TOFU, ("forget",), against_gold=ABOVE),
    "retain_rouge": Metric(
        "retain_rouge", "Overlap with retained answers",
        "How much of the right answer appears, in order, in what the model writes where it should still know.",
        SHARE, "up", TOFU, RETAIN, against_gold=UTILITY),
    "exact_memorization": Metric(
        "exact_memorization", "Exact memorisation",
        "Share of the words of a forgotten answer that the model would put next if it were given all words before.",
        SHARE, "gold", "Tirumala et al., arXiv:2205.10770", ("forget",), against_gold=ABOVE),
    "extraction_strength": Metric(
        "extraction_strength", "Extraction strength",
        "How much of a forgotten answer's end follows by itself once its beginning is given.",
        SHARE, "gold", "Carlini et al., arXiv:2012.07805", ("forget",), against_gold=ABOVE),
    "forget_perplexity": Metric(
        "forget_perplexity", "Perplexity on forgotten answers",
        "How surprised the model is by the forgotten answers: 1 is no surprise.",
        "at least 1", "gold", "Jelinek et al. 1977 (no arXiv)", ("forget",),
        against_gold="below the gold: still remembered; far above: answers were made implausible, which stands out"),
    "retain_perplexity": Metric(
        "retain_perplexity", "Perplexity on retained answers",
        "How surprised the model is by answers it should keep: 1 is no surprise.",
        "at least 1", "down", "Jelinek et al. 1977 (no arXiv)",
        RETAIN, against_gold="above the gold: knowledge was lost"),
    "forget_quality_log10": Metric(
        "forget_quality_log10", "Forget quality (log10 p)",
        "Whether the truth ratios can be told from the gold's by a statistical test: near 0 they cannot, below -1.3 "
        "they can.",
        "log10 of a p-value, at most 0", "up", TOFU, ("forget",), needs_gold=True,
        against_gold="near 0: not told apart with this many rows, which on few rows says little"),
    "model_utility": Metric(
        "model_utility", "Model utility",
        "One number for everything the model should still know; a single lost ability brings it to 0.",
        SHARE, "up", TOFU, ("untouched", "retain", "real_authors", "world_facts"), against_gold=UTILITY),
    "mia_loss_auc": Metric(
        "mia_loss_auc", "Membership attack: loss",
        "How well an outsider tells forgotten rows from rows never trained on, by how likely the model finds them.",
        AUC, "gold", "Yeom et al., arXiv:1709.01604", MEMBER, against_gold=ABOVE),
    "mia_zlib_auc": Metric(
        "mia_zlib_auc", "Membership attack: zlib",
        "The same attack, corrected for how compressible a text is.",
        AUC, "gold", "Carlini et al., arXiv:2012.07805", MEMBER, against_gold=ABOVE),
    "mia_min_k_auc": Metric(
        "mia_min_k_auc", "Membership attack: Min-40 %",
        "The same attack, looking only at the least likely words of each row.",
        AUC, "gold", "Shi et al., arXiv:2310.16789", MEMBER, against_gold=ABOVE),
    "mia_min_k_plus_plus_auc": Metric(
        "mia_min_k_plus_plus_auc", "Membership attack: Min-40 %++",
        "The same attack, correcting each word for how sure the model was at that place.",
        AUC, "gold", "Zhang et al., arXiv:2404.02936", MEMBER, against_gold=ABOVE),
    "mia_loss_tpr": Metric(
        "mia_loss_tpr", "Membership attack: found at 1 % false alarms",
        "Share of forgotten rows that the loss attack finds while it accuses at most one in a hundred never-seen rows.",
        SHARE, "gold", "Carlini et al., arXiv:2112.03570", MEMBER, against_gold=ABOVE),
    "privleak": Metric(
        "privleak", "Privacy leak (PrivLeak)",
        "How far the membership attack differs from the gold: negative means too little was unlearned, positive too "
        "much.",
        "per cent, -100 to unbounded; 0 as the gold", "gold", MUSE, MEMBER, needs_gold=True,
        against_gold="0 is the target; -100 is no unlearning, above 0 is over-unlearning, which is a leak too"),
    "forget_score": Metric(
        "forget_score", "Forget score",
        "Four signs of memory in one number: 1 when none is left, 0 when one is complete. Empty babble would get 1 "
        "too.",
        SHARE, "gold", OU, ("forget",),
        against_gold="below the gold: still remembered; above the gold: more was destroyed than forgetting needs"),
    "unlearning_score": Metric(
        "unlearning_score", "Unlearning score",
        "Forget score and model utility in one number. Above the gold means that more was destroyed than needed.",
        SHARE, "gold", CLREG + " (our reading of the name)", ("forget", *RETAIN),
        against_gold="below the gold: memory left or knowledge lost; above the gold: past the target"),
    "forget_repetition": Metric(
        "forget_repetition", "Repetition in answers to forgotten questions",
        "Share of repeated four-word runs in what the model writes: high means that it stammers instead of answering.",
        SHARE, "gold", "Welleck et al., arXiv:1908.04319", ("forget",),
        against_gold="above the gold: broken language"),
    "entanglement": Metric(
        "entanglement", "Entanglement",
        "How mixed forgotten and retained rows are inside the model: spread within each set against the gap between "
        "them.",
        "ratio, at least 0", "gold", "Zhao et al., arXiv:2406.01257", ("forget", *RETAIN), "states",
        against_gold="far below the gold: the two sets were pulled apart, which is a trace of unlearning, not a goal"),
    "entanglement_normalised": Metric(
        "entanglement_normalised", "Entanglement (directions only)",
        "The same, ignoring how long the internal vectors are.",
        "ratio, at least 0", "gold", "Zhao et al., arXiv:2406.01257; normalisation ours", ("forget", *RETAIN),
        "states",
        against_gold="far below the gold: the two sets were pulled apart, which is a trace of unlearning, not a goal"),
    "entanglement_shuffled": Metric(
        "entanglement_shuffled", "Entanglement, rows shuffled",
        "Control: the same number when rows are dealt to the two sets at random; it should be far larger.",
        "ratio, at least 0", "gold", "ours", ("forget", *RETAIN), "states",
        against_gold="only a control: read it next to the entanglement itself"),
    "mk_mmd": Metric(
        "mk_mmd", "Separation of forgotten and retained rows (MK-MMD)",
        "How different the two clouds of internal vectors are, over five scales; 0 when they are alike.",
        "squared distance, about 0 to 2", "gold", "Gretton et al. 2012; Long et al., arXiv:1502.02791", ("forget",
        *RETAIN),
        "states", against_gold=CLOUDS),
    "w2_gaussian": Metric(
        "w2_gaussian", "Transport distance, Gaussian",
        "How far one cloud of internal vectors must be moved to become the other, by mean and spread.",
        "units of the states, at least 0", "gold", "Dowson and Landau 1982", ("forget", *RETAIN), "states",
        against_gold=CLOUDS),
    "w2_exact": Metric(
        "w2_exact", "Transport distance, exact",
        "The same, row by row with the best matching.",
        "units of the states, at least 0", "gold", "Kantorovich 1942", ("forget", *RETAIN), "states",
        against_gold=CLOUDS),
    "w2_sliced": Metric(
        "w2_sliced", "Transport distance, sliced",
        "The same, averaged over random directions.",
        "units of the states, at least 0", "gold", "Bonneel et al. 2015", ("forget", *RETAIN), "states",
        against_gold=CLOUDS),
    "probe_auc_retain": Metric(
        "probe_auc_retain", "Probe: forgotten against retained",
        "How well a simple classifier on the internal vectors tells forgotten from retained rows it has not seen.",
        AUC, "gold", "Alain and Bengio, arXiv:1610.01644", ("forget", *RETAIN), "states",
        against_gold="above the gold: forgotten rows are marked inside the model"),
    "latent_membership_auc": Metric(
        "latent_membership_auc", "Membership attack on internal vectors",
        "How well a simple classifier on the internal vectors tells forgotten rows from rows never trained on.",
        AUC, "gold", "Alain and Bengio, arXiv:1610.01644", MEMBER, "states",
        against_gold="above the gold: the model still shows inside which rows it once knew"),
    "latent_projection_auc": Metric(
        "latent_projection_auc", "Membership along one internal direction",
        "How well one direction inside the model, from retained towards forgotten, tells forgotten from never-seen "
        "rows.",
        AUC, "gold", "ours", ("forget", "never_seen", *RETAIN), "states",
        against_gold="above the gold: the model still shows inside which rows it once knew"),
    "retain_drift": Metric(
        "retain_drift", "Drift of retained rows",
        "How far the internal vectors of retained rows moved from where they were before unlearning, relative to their "
        "length.",
        "ratio, at least 0", "down", "ours", RETAIN, "states",
        against_gold="the gold has its own training and its own coordinates: not comparable with it"),
    "relearned_probability": Metric(
        "relearned_probability", "Probability after relearning",
        "How likely forgotten answers become again after a few training steps on other forgotten rows.",
        SHARE, "gold", "Hu et al., arXiv:2406.13356", ("forget",), "attack",
        against_gold="above the gold: the knowledge was hidden rather than removed"),
    "memorisation_savings": Metric(
        "memorisation_savings", "Memorisation savings",
        "How likely forgotten answers become once all of them are trained again for a few steps: what was known before "
        "is learned faster.",
        SHARE, "gold", "ours; Ebbinghaus 1885 (no arXiv)", ("forget",), "attack",
        against_gold="above the gold: a trace of the answers is left, even where the relearning curve is low"),
    "muse_verbatim": Metric(
        "muse_verbatim", "MUSE: passages by heart",
        "How much of a forgotten passage's continuation appears, in order, in how the model goes on.",
        SHARE, "gold", MUSE, ("muse_passages",), "muse", against_gold=ABOVE),
    "muse_knowledge_forget": Metric(
        "muse_knowledge_forget", "MUSE: knowledge to forget",
        "How far the model's short answers to questions about the forgotten texts agree with the true ones.",
        SHARE, "gold", MUSE, ("muse_forget_questions",), "muse", against_gold=ABOVE),
    "muse_knowledge_retain": Metric(
        "muse_knowledge_retain", "MUSE: knowledge to keep (utility)",
        "How far the model's short answers to questions about the texts it should keep agree with the true ones.",
        SHARE, "up", MUSE, ("muse_retain_questions",), "muse", against_gold=UTILITY),
    "muse_privleak": Metric(
        "muse_privleak", "MUSE: privacy leak (PrivLeak)",
        "How far the membership attack on MUSE's texts differs from the gold: negative means too little was unlearned, "
        "positive too much.",
        "per cent, -100 to unbounded; 0 as the gold", "gold", MUSE, ("muse_members", "muse_non_members"), "muse",
        needs_gold=True,
        against_gold="0 is the target; -100 is no unlearning, above 0 is over-unlearning, which is a leak too"),
    "mcq_accuracy": Metric(
        "mcq_accuracy", "Multiple-choice accuracy",
        "Share of multiple-choice questions whose right letter is the one the model finds most likely; guessing gives "
        "the chance level named beside it.",
        SHARE, "gold", "WMDP, arXiv:2403.03218; MMLU, arXiv:2009.03300", ("tasks",), "choices",
        against_gold="above the gold: still known; below chance: right answers are avoided, which shows what they are"),
} | EVIDENCE  # fmt: skip


def find(name: str) -> Metric | None:
    """The metric of a number: ``mcq_accuracy/TASK`` (and ``/TASK/PART``) is that of its family; None for a stranger.

    Example:
        >>> find("mcq_accuracy/wmdp_bio").title, find("attack/sample/64").title, find("nothing")
        ('Multiple-choice accuracy: wmdp_bio', 'Under attack: sample, 64', None)
    """
    family, _, part = name.partition("/")
    metric = METRICS.get(family) or (FAMILIES.get(family) if part else None)
    if metric is None or not part:
        return metric
    return dataclasses.replace(metric, name=name, title=f"{metric.title}: {part.replace('/', ', ')}")


def label(name: str, entry: Mapping[str, object] | None = None) -> str:
    """Heading of a number: the title, except that an incomplete utility is not called model utility.

    Args:
        name: metric name.
        entry: its value in results.json; ``parts`` and ``complete`` are read when they are there.

    Example:
        >>> label("model_utility", {"value": 0.5, "parts": 9, "complete": True})
        'Model utility'
        >>> label("model_utility", {"value": 0.5, "parts": 4, "complete": False})
        'Utility over 4 parts (not the nine of TOFU)'
    """
    if entry is not None and entry.get("complete") is False:
        prefix = "Utility" if name == "model_utility" else f"{METRICS[name].title}, utility"
        return f"{prefix} over {entry.get('parts')} parts (not the nine of TOFU)"
    metric = find(name)
    return metric.title if metric else name.replace("_", " ")
