"""AdamW on lists of fp32 tensors: p ← p(1-η·wd), then p ← p - η·m̂/(√v̂+eps)."""

import torch
from torch.optim.adamw import adamw

DEFAULTS = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}


def adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place. `steps` are 0-dim fp32 counters on the params' device, raised by one here.

    torch's fused kernel is this formula in one pass over memory, on CPU, CUDA and MPS.
    """
    on_or_off = {
        "fused": params[0].device.type in ("cpu", "cuda", "mps"),
        "amsgrad": False,
        "maximize": False,
    }
    beta1, beta2 = betas
    rates = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": weight_decay, "eps": eps}
    adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, **on_or_off, **rates)  # type: ignore[arg-type]
    torch.autograd.graph.increment_version(
        params
    )  # the fused kernel does not; nanochat.kernels.linear looks at it
