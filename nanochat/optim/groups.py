"""Parameter name -> optimizer rule: which group, which rate, which decay.

With a = (D/768)^-½ and b = √(B_tok/2¹⁹): rates tuned at width 768 and 2¹⁹ tokens a batch carry over.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

REFERENCE_DIM = 768
REFERENCE_BATCH_TOKENS = 2**19


class Rule(NamedTuple):
    """One AdamW row of the table; `scales` names the factors on its rate."""

    pattern: str
    lr: str
    scales: str
    betas: tuple[float, float]
    weight_decay: float


ADAMW_RULES = (
    Rule(r"lm_head\.weight", "lm_head_lr", "ab", (0.8, 0.96), 0.01),
    Rule(r"transformer\.wte\.weight", "wte_lr", "ab", (0.8, 0.995), 0.001),
    Rule(r"value_embeds\.\d+\.weight", "value_embeds_lr", "ab", (0.8, 0.995), 0.01),
    Rule(r"resid_lambdas", "resid_lambdas_lr", "b", (0.8, 0.95), 0.05),
    Rule(r"x0_lambdas", "x0_lambdas_lr", "b", (0.96, 0.95), 0.0),
    Rule(r"smear_gate\.weight|smear_lambda|backout_lambda", "smear_backout_lr", "", (0.8, 0.95), 0.0),
)
MUON_PATTERN = r"transformer\.h\..+"


def param_groups(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    *,
    model_dim: int,
    batch_tokens: int,
    weight_decay: float,
    ns_dtype: torch.dtype = torch.float32,
    lm_head_lr: float = 0.008,
    wte_lr: float = 0.3,
    value_embeds_lr: float = 0.15,
    resid_lambdas_lr: float = 0.005,
    x0_lambdas_lr: float = 0.5,
    smear_backout_lr: float = 0.2,
    matrix_lr: float = 0.02,
) -> list[dict[str, Any]]:
    """Groups for MuonAdamW, with lr = initial_lr scaled by width and batch. `weight_decay` is Muon's.

    Every parameter lands in exactly one group; ValueError names those that no rule knows.
    """
    if model_dim < 1 or batch_tokens < 1:
        raise ValueError(f"model_dim and batch_tokens must be positive, got {model_dim} and {batch_tokens}")
    lrs = {
        "lm_head_lr": lm_head_lr,
        "wte_lr": wte_lr,
        "value_embeds_lr": value_embeds_lr,
        "resid_lambdas_lr": resid_lambdas_lr,
        "x0_lambdas_lr": x0_lambdas_lr,
        "smear_backout_lr": smear_backout_lr,
    }
    width_scale = (model_dim / REFERENCE_DIM) ** -0.5
    batch_scale = (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5
    members: dict[Rule | None, list[tuple[str, torch.Tensor]]] = {rule: [] for rule in (*ADAMW_RULES, None)}
    unknown = []
    for name, p in named_parameters:
        if re.fullmatch(MUON_PATTERN, name) and p.ndim == 2:
            members[None].append((name, p))
        elif rule := next((rule for rule in ADAMW_RULES if re.fullmatch(rule.pattern, name)), None):
            members[rule].append((name, p))
        else:
            unknown.append(f"{name} {tuple(p.shape)}")
    if unknown:
        raise ValueError(f"no optimizer rule for {', '.join(unknown)}; add one to nanochat/optim/groups.py")
    groups: list[dict[str, Any]] = []
    for rule in ADAMW_RULES:
        lr = (
            lrs[rule.lr]
            * (width_scale if "a" in rule.scales else 1)
            * (batch_scale if "b" in rule.scales else 1)
        )
        options = {
            "lr": lr,
            "initial_lr": lr,
            "betas": rule.betas,
            "eps": 1e-10,
            "weight_decay": rule.weight_decay,
        }
        groups.append({"kind": "adamw", "params": members[rule], **options})
    lr = matrix_lr * batch_scale
    options = {"lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "ns_dtype": ns_dtype}
    groups.append({"kind": "muon", "params": members[None], **options})
    return [group for group in groups if group["params"]]
