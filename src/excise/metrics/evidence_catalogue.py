"""What the numbers of evidence are called: fluency, further attacks, groups, aggregates, controls, neighbours."""

from __future__ import annotations

from excise.metrics.metric import ABOVE, AUC, CLOUDS, MEMBER, OU, RETAIN, SHARE, UTILITY, Metric

_FLUENCY = "ours; Witten and Bell 1991 (no arXiv)"
_CONTROL = "only a control: about 0.5 with the gold and without"
_PRIVATE = "1 is the gold; lower: an outsider learns something from the likelihoods, by memory or by its absence"
_PROBING = "Alain and Bengio, arXiv:1610.01644"
_ALL = ("forget", "never_seen", *RETAIN)
_UNEVEN = "above the gold: some people's rows fared otherwise than others'"
_ASKED_OFTEN = "above the gold: whoever asks often enough gets more than from a model that never knew"

EVIDENCE: dict[str, Metric] = {
    "forget_fluency": Metric(
        "forget_fluency", "Fluent answers to forgotten questions",
        "Share of what the model writes to forgotten questions that reads like real answers: letters, order of words, "
        "no stammering.",
        SHARE, "gold", _FLUENCY, ("forget",),
        against_gold="below the gold: babble, which a model that never saw the rows does not write"),
    "retain_fluency": Metric(
        "retain_fluency", "Fluent answers to retained questions",
        "The same where the model should still know the answers; real answers reach about 0.95.",
        SHARE, "up", _FLUENCY, RETAIN, against_gold="below the gold: the model's language was damaged"),
    "logit_lens_probability": Metric(
        "logit_lens_probability", "Forgotten answers inside the model (logit lens)",
        "How likely the forgotten answers are when the model's head is put on an inner layer, at the layer that tells "
        "most.",
        SHARE, "gold", "nostalgebraist 2020 (no arXiv)", ("forget",),
        against_gold="above the gold: the answers are still worked out inside and hidden above"),
    "never_seen_gap": Metric(
        "never_seen_gap", "Likelihood beside never-seen rows",
        "How much likelier forgotten answers are than answers that were never trained on; below 0 they are less "
        "likely.",
        "nats per word piece; 0 as likely", "gold", "ours", MEMBER,
        against_gold="above the gold: still remembered; below the gold: pushed under what no model ever saw"),
    "mia_reference_auc": Metric(
        "mia_reference_auc", "Membership attack: reference model",
        "How well an outsider who also has the gold tells forgotten rows from rows never trained on, each text "
        "measured against how hard it is for the gold.",
        AUC, "gold", "Mireshghallah et al., arXiv:2203.03929", MEMBER, needs_gold=True, against_gold=ABOVE),
    "mia_gradient_norm_auc": Metric(
        "mia_gradient_norm_auc", "Membership attack: gradient norm",
        "How well an outsider who has the weights tells forgotten rows from rows never trained on, by how little they "
        "would still teach the model.",
        AUC, "gold", "Wang et al., arXiv:2402.17012", MEMBER, against_gold=ABOVE),
    "privacy_score": Metric(
        "privacy_score", "Privacy score (scale: the original)",
        "Four membership attacks in one number: 1 where none tells more than of the gold, 0 where one tells as much as "
        "before unlearning.",
        SHARE, "gold", OU, MEMBER, needs_gold=True, against_gold=_PRIVATE),
    "privacy_score_relative": Metric(
        "privacy_score_relative", "Privacy score (scale: the gold)",
        "The same with another scale: distance from the gold's attacks as a share of the gold's own.",
        SHARE, "gold", OU + " (as its re-implementations compute it)", MEMBER, needs_gold=True, against_gold=_PRIVATE),
    "utility_score": Metric(
        "utility_score", "Utility score",
        "Model utility and the fluency of answers to forgotten questions in one number.",
        SHARE, "gold", OU + " (fluency ours)", ("forget", *RETAIN), against_gold=UTILITY),
    "utility_score_relative": Metric(
        "utility_score_relative", "Utility score beside the original's",
        "The same as a share of what the original had, at most 1.",
        SHARE, "gold", OU + " (fluency ours)", ("forget", *RETAIN), against_gold=UTILITY),
    "aggregate_score": Metric(
        "aggregate_score", "Aggregate score (privacy on the original's scale)",
        "Forget score, privacy score and utility beside the original's in one number; one failure brings it to 0.",
        SHARE, "gold", OU + " (fluency ours)", _ALL, needs_gold=True,
        against_gold="below the gold: one of the three is lacking; look at them one by one"),
    "aggregate_score_relative": Metric(
        "aggregate_score_relative", "Aggregate score (privacy on the gold's scale)",
        "The same with the other privacy score.",
        SHARE, "gold", OU + " (fluency ours)", _ALL, needs_gold=True,
        against_gold="below the gold: one of the three is lacking; look at them one by one"),
    "forget_group_gap": Metric(
        "forget_group_gap", "Uneven forgetting",
        "How much likelier the answers of the person remembered most are than those of the person remembered least.",
        SHARE, "gold", "ours", ("forget",), against_gold=_UNEVEN),
    "retain_group_gap": Metric(
        "retain_group_gap", "Uneven keeping",
        "The same over the people whose rows should be kept: whether unlearning cost some of them more than others.",
        SHARE, "gold", "ours", RETAIN, against_gold=_UNEVEN),
    "neighbours_retain": Metric(
        "neighbours_retain", "Forgotten rows among themselves, beside retained ones",
        "Share of forgotten rows among the ten nearest of a forgotten row inside the model, beside as many retained "
        "rows; rows of one person do not count for each other.",
        SHARE, "gold", "ours", ("forget", *RETAIN), "states", against_gold=CLOUDS),
    "neighbours_never_seen": Metric(
        "neighbours_never_seen", "Forgotten rows among themselves, beside never-seen ones",
        "The same beside as many rows that were never trained on.",
        SHARE, "gold", "ours", MEMBER, "states", against_gold=CLOUDS),
    "leak_any": Metric(
        "leak_any", "Questions that leak in many tries",
        "Share of forgotten questions of which at least one of many sampled answers gives the true one away.",
        SHARE, "gold", "Scholten et al., arXiv:2410.03523", ("forget",), "attack", against_gold=_ASKED_OFTEN),
    "leak_rate_upper": Metric(
        "leak_rate_upper", "Worst question: bound of its leak rate",
        "No sampled question gives its answer away oftener than this share of the time, as far as so many samples can "
        "show; more samples make it smaller.",
        SHARE, "gold", "Clopper and Pearson 1934; arXiv:2410.03523", ("forget",), "attack", against_gold=_ASKED_OFTEN),
    "leak_score_upper": Metric(
        "leak_score_upper", "Bound of how much leaks on average",
        "How much of the true answer sampled answers hold, at most, as far as so many samples can show.",
        SHARE, "gold", "Scholten et al., arXiv:2410.03523", ("forget",), "attack", against_gold=_ASKED_OFTEN),
    "probe_auc_retain_shuffled": Metric(
        "probe_auc_retain_shuffled", "Probe against retained rows, labels dealt at random",
        "Control: the same classifier when rows are dealt to the two sets at random; it should find nothing.",
        AUC, "gold", _PROBING, ("forget", *RETAIN), "states", against_gold=_CONTROL),
    "latent_membership_shuffled": Metric(
        "latent_membership_shuffled", "Membership attack on internal vectors, labels dealt at random",
        "Control: the same classifier when rows are dealt to the two sets at random; it should find nothing.",
        AUC, "gold", _PROBING, MEMBER, "states", against_gold=_CONTROL),
    "latent_projection_shuffled": Metric(
        "latent_projection_shuffled", "Membership along one direction, labels dealt at random",
        "Control: the same direction when rows are dealt to the two sets at random; it should find nothing.",
        AUC, "gold", "ours", _ALL, "states", against_gold=_CONTROL),
}  # fmt: skip

#: Families of numbers that have a name for each part only: what ``attack/NAME/BUDGET`` is.
FAMILIES: dict[str, Metric] = {
    "attack": Metric(
        "attack", "Under attack",
        "What is left of the forgotten answers after an attack with this budget: how likely they are, or how often "
        "they come out.",
        SHARE, "gold", "docs/metrics.md names the source of each", ("forget",), "attack",
        against_gold="above the gold: the attack brings back what a model that never knew does not have"),
}  # fmt: skip
