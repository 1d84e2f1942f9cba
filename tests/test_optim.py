"""MuonAdamW against a slow oracle: one matrix at a time, fp64, straight from the formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.optim import MuonAdamW
from nanochat.optim.groups import param_groups
from nanochat.optim.muon import POLAR_EXPRESS, muon_, normalize, orthogonalize

SHAPES = {
    "transformer.wte.weight": (40, 32),
    "transformer.h.0.attn.c_q.weight": (32, 32),
    "transformer.h.0.attn.c_k.weight": (16, 32),
    "transformer.h.0.attn.c_proj.weight": (32, 32),
    "transformer.h.0.attn.ve_gate.weight": (2, 12),
    "transformer.h.0.mlp.c_fc.weight": (128, 32),
    "transformer.h.0.mlp.c_proj.weight": (32, 128),
    "value_embeds.0.weight": (40, 16),
    "lm_head.weight": (40, 32),
    "resid_lambdas": (1,),
    "x0_lambdas": (1,),
    "smear_gate.weight": (1, 24),
    "smear_lambda": (1,),
    "backout_lambda": (1,),
}


def make_params(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(0.1 * torch.randn(shape, generator=gen)) for name, shape in SHAPES.items()
    }


def make_optimizer(params: dict[str, torch.nn.Parameter], **options) -> MuonAdamW:
    return MuonAdamW(
        param_groups(params.items(), model_dim=32, batch_tokens=2**12, weight_decay=0.3, **options)
    )


def make_grads(params: dict[str, torch.nn.Parameter], seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=gen)


class MuonOracle:
    """training.md section 2, steps 1 to 8, one matrix."""

    def __init__(self, W: torch.Tensor):
        rows, cols = W.shape
        self.W, self.M = W.double(), torch.zeros(rows, cols, dtype=torch.float64)
        self.S = torch.zeros(rows if rows >= cols else cols, dtype=torch.float64)

    def step(self, G: torch.Tensor, lr: float, mu: float, wd: float) -> torch.Tensor:
        R, C = G.shape
        G = G.double()
        self.M = mu * self.M + (1 - mu) * G
        X = (1 - mu) * G + mu * self.M
        norm = X.pow(2).sum().sqrt()
        for r in range(R):
            X[r] = X[r] * (norm / math.sqrt(R)) / max(X[r].pow(2).sum().sqrt().item(), 1e-6)
        X = X / (1.01 * X.pow(2).sum().sqrt() + 1e-6)
        for alpha, beta, gamma in POLAR_EXPRESS:
            if R <= C:
                A = X @ X.T
                X = alpha * X + (beta * A + gamma * A @ A) @ X
            else:
                A = X.T @ X
                X = alpha * X + X @ (beta * A + gamma * A @ A)
        O = X * math.sqrt(min(R, C)) / max(X.pow(2).sum().sqrt().item(), 1e-6)
        axis = 1 if R >= C else 0
        v, c = O.pow(2).mean(axis), O.shape[axis]
        self.S = 0.9 * self.S + 0.1 * v
        s = self.S.clamp(min=1e-10) ** -0.5
        scale = s * math.sqrt(c * v.sum()) / max(math.sqrt((c * v * s**2).sum()), 1e-10)
        U = O * (scale[:, None] if R >= C else scale[None, :])
        eta = lr * math.sqrt(max(1, R / C))
        agree = (U * self.W >= 0).double()
        self.W = self.W - eta * U - eta * wd * self.W * agree
        return U


def adamw_oracle(p, g, m, v, t, lr, betas, eps, wd):
    p, g = p * (1 - lr * wd), g.double()
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def test_six_steps_equal_the_oracle():
    params = make_params()
    opt = make_optimizer(params)
    before = {name: p.detach().clone() for name, p in params.items()}
    kinds = {name: group for group in opt.param_groups for name in group["param_names"]}
    oracles = {name: MuonOracle(p.detach()) for name, p in params.items() if kinds[name]["kind"] == "muon"}
    adam = {name: (p.detach().double(), 0.0, 0.0) for name, p in params.items() if name not in oracles}
    for step in range(1, 7):
        make_grads(params, step)
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * step / 6
            group["momentum"] = 0.8 + 0.02 * step
        for name, p in params.items():
            group = kinds[name]
            if name in oracles:
                oracles[name].step(p.grad, group["lr"], group["momentum"], group["weight_decay"])
            else:
                hyper = [group[key] for key in ("lr", "betas", "eps", "weight_decay")]
                adam[name] = adamw_oracle(adam[name][0], p.grad, adam[name][1], adam[name][2], step, *hyper)
        opt.step()
    for name, p in params.items():
        expected = oracles[name].W if name in oracles else adam[name][0]
        assert relative(p, expected) < 1e-6, name
        assert relative(p, before[name]) > 1e-3, name
