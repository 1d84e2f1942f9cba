"""The rival of bench_train.py: a plain network and a plain optimizer, as such loops are usually written.

The network is gpt.py with nanochat.kernels switched off: norms and RoPE are separate operations, and the
logits exist as a whole in fp32. Muon visits one matrix after the other. It trains the parameters of a
nanochat GPT, so that both loops start from the same loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanochat import kernels
from nanochat.gpt import GPT
from nanochat.optim.muon import POLAR_EXPRESS


def forward_backward(
    model: GPT, ids: Tensor, targets: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Mean cross entropy of rows (B, T), its gradients added to the parameters. loss_of: a compiled model."""
    with kernels.disabled():
        loss = (loss_of or model)(ids, targets)
        loss.backward()
    return loss


class PlainOptimizer:
    """Muon, one matrix after the other, and torch's AdamW, with the rates of nanochat's groups."""

    def __init__(self, groups: list[dict], dtype: torch.dtype) -> None:
        self.muon = [g for g in groups if g["kind"] == "muon"]
        rest = [{k: g[k] for k in ("params", "lr", "betas", "eps", "weight_decay")} for g in groups
                if g["kind"] == "adamw"]  # fmt: skip
        self.adamw, self.dtype = torch.optim.AdamW(rest, foreach=False), dtype
        self.state: dict[Tensor, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        for group in self.muon:
            for p in group["params"]:
                self.update(p, group)
                p.grad = None
        self.adamw.zero_grad()

    def update(self, p: Tensor, group: dict) -> None:
        rows, cols = p.shape
        if p not in self.state:
            self.state[p] = torch.zeros_like(p), p.new_zeros((rows, 1) if rows >= cols else (1, cols))
        momentum, second = self.state[p]
        momentum.lerp_(p.grad, 1 - group["momentum"])
        x = p.grad.lerp(momentum, group["momentum"]).to(self.dtype)
        x = x * (x.norm() / rows**0.5 / x.norm(dim=-1, keepdim=True).clamp(min=1e-6))
        x = x / (1.01 * x.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            if rows > cols:
                s = x.T @ x
                x = a * x + x @ (b * s + c * (s @ s))
            else:
                s = x @ x.T
                x = a * x + (b * s + c * (s @ s)) @ x
        o = x.float() * (min(rows, cols) ** 0.5 / x.float().norm().clamp(min=1e-6))
        v = o.square().mean(-1 if rows >= cols else 0, keepdim=True)
        second.lerp_(v, 1 - group["beta2"])
        u = o * second.clamp(min=1e-10).rsqrt()
        u = u * (o.norm() / u.norm().clamp(min=1e-10))
        lr = group["lr"] * max(1, rows / cols) ** 0.5
        p.sub_(lr * group["weight_decay"] * p * (u * p >= 0) + lr * u)
