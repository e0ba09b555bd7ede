"""What can be asked of a forward pass, what that costs, and one pass per side that computes each tensor once.

A `Product` names a tensor. `passes` says which forward passes a set of products costs, before anything loads; a `Step`
runs them: no logits where no label is, none at all when only states are read, no block above the highest layer read,
and the reference from a store instead of a second model.
"""

from excise.forward.anatomy import Anatomy
from excise.forward.batch import Batch, masked_mean
from excise.forward.compute import Step, lora_factors
from excise.forward.head import Logits, chunked, label_logp, logp_of
from excise.forward.products import (
    AMONG,
    PER_TOKEN,
    POLICY,
    REFERENCE,
    Pass,
    Product,
    Side,
    View,
    among,
    at_labels,
    base_side,
    column,
    constant,
    hidden,
    label_count,
    labels,
    logits,
    lora,
    mask,
    passes,
    pooled,
    population,
    row_numbers,
    seq_logp,
    token_index,
    token_logp,
    token_rows,
)
from excise.forward.running import PassResult, rows_seen, run_pass

__all__ = [
    "AMONG",
    "PER_TOKEN",
    "POLICY",
    "REFERENCE",
    "Anatomy",
    "Batch",
    "Logits",
    "Pass",
    "PassResult",
    "Product",
    "Side",
    "Step",
    "View",
    "among",
    "at_labels",
    "base_side",
    "chunked",
    "column",
    "constant",
    "hidden",
    "label_count",
    "label_logp",
    "labels",
    "logits",
    "logp_of",
    "lora",
    "lora_factors",
    "mask",
    "masked_mean",
    "passes",
    "pooled",
    "population",
    "row_numbers",
    "rows_seen",
    "run_pass",
    "seq_logp",
    "token_index",
    "token_logp",
    "token_rows",
]
