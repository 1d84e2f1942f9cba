"""Parameter name -> optimizer rule: which group, which rate, which decay.

Rates were tuned at width 768 and 2¹⁹ tokens a batch; a = (D/768)^-½ and b = √(B_tok/2¹⁹) carry them over.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

REFERENCE_DIM = 768
REFERENCE_BATCH_TOKENS = 2**19
LM_HEAD_EPS = 1e-10


class Rule(NamedTuple):
    """One row of the table: `scales` names the factors on lr, `options` go into the group as they are."""

    rate: str
    pattern: str
    lr: float
    scales: str
    options: dict[str, Any]


EMBEDDING, SCALAR = (0.8, 0.995), (0.8, 0.95)
RULES = (
    Rule("lm_head_lr", r"lm_head\.weight", 0.008, "ab", {"betas": (0.8, 0.96), "weight_decay": 0.01}),
    Rule("wte_lr", r"transformer\.wte\.weight", 0.3, "ab", {"betas": EMBEDDING, "weight_decay": 0.001}),
    Rule("value_embeds_lr", r"value_embeds\..+", 0.15, "ab", {"betas": EMBEDDING, "weight_decay": 0.01}),
    Rule(
        "bigram_embeds_lr", r"bigram_embeds\.weight", 0.004, "ab", {"betas": EMBEDDING, "weight_decay": 0.0}
    ),
    Rule("resid_lambdas_lr", r"resid_lambdas", 0.005, "b", {"betas": SCALAR, "weight_decay": 0.05}),
    Rule("x0_lambdas_lr", r"x0_lambdas", 0.5, "b", {"betas": (0.96, 0.95), "weight_decay": 0.0}),
    Rule("smear_backout_lr", r"smear_.+|backout_lambda", 0.2, "", {"betas": SCALAR, "weight_decay": 0.0}),
    Rule("matrix_lr", r"transformer\.h\..+\.weight", 0.02, "b", {"kind": "muon"}),
)


def param_groups(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    *,
    model_dim: int,
    batch_tokens: int,
    weight_decay: float,
    ns_dtype: torch.dtype = torch.float32,
    lr_scale: float = 1.0,
    lm_head_eps: float = LM_HEAD_EPS,
    **rates: float,
) -> list[dict[str, Any]]:
    """Groups for MuonAdamW; `weight_decay` is Muon's, `rates` replace the table's (wte_lr=0.2, ...).

    `lm_head_eps` is Adam's epsilon for lm_head. A target pulls its row with about 1/B_tok; without an epsilon
    near that, rows of rare tokens, pushed down a little at every step, sink at the full rate (decisions, 29).

    `lr_scale` corrects the factor b, so it multiplies only the rates that have it: the scalars of smear and
    backout keep theirs, whatever the batch.

    Every parameter lands in exactly one group; ValueError names those that no rule knows, and unknown rates.
    """
    if model_dim < 1 or batch_tokens < 1:
        raise ValueError(f"model_dim and batch_tokens must be positive, got {model_dim} and {batch_tokens}")
    if wrong := sorted(rates.keys() - {rule.rate for rule in RULES}):
        raise ValueError(
            f"unknown rates {', '.join(wrong)}; there are {', '.join(rule.rate for rule in RULES)}"
        )
    members: dict[str, list[tuple[str, torch.Tensor]]] = {rule.rate: [] for rule in RULES}
    unknown = []
    for name, p in named_parameters:
        rule = next((rule for rule in RULES if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            unknown.append(f"{name} {tuple(p.shape)}")
        else:
            members[rule.rate].append((name, p))
    if unknown:
        raise ValueError(f"no optimizer rule for {', '.join(unknown)}; add one to nanochat/optim/groups.py")
    b = lr_scale * (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5
    factors = {"a": (model_dim / REFERENCE_DIM) ** -0.5, "b": b}
    own: dict[str, dict[str, Any]] = {
        "lm_head_lr": {"eps": lm_head_eps},
        "matrix_lr": {"weight_decay": weight_decay, "ns_dtype": ns_dtype},
    }
    groups = []
    for rule in RULES:
        lr = rates.get(rule.rate, rule.lr)
        for scale in rule.scales:
            lr *= factors[scale]
        group = {"kind": "adamw", "params": members[rule.rate], "lr": lr, "initial_lr": lr, **rule.options}
        groups.append(group | own.get(rule.rate, {}))
    return [group for group in groups if group["params"]]
