"""The rival of bench_train.py: the same network and optimizer as plain PyTorch, the way such loops are
usually written.

Weights are cast at every use, norms and RoPE are separate operations, logits exist as a whole in fp32, and
Muon visits one
matrix after the other. It trains the parameters of a nanochat GPT, so that both start from the same loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.gpt import GPT, QK_SCALE, SMEAR_CHANNELS, VE_GATE_CHANNELS
from nanochat.optim.muon import POLAR_EXPRESS


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)


def loss_of(model: GPT, ids: Tensor, targets: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Mean cross entropy of rows (B, T); cos, sin (T, 1, E/2) in the compute dtype."""
    cfg, dtype = model.config, model.compute_dtype

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    (B, T), E = ids.shape, cfg.n_embd // cfg.n_head
    h = norm(F.embedding(ids, model.wte.weight).to(dtype))
    gate = model.smear_lambda.to(dtype) * torch.sigmoid(
        linear(h[:, 1:, :SMEAR_CHANNELS], model.smear_gate.weight)
    )
    x = torch.cat((h[:, :1], h[:, 1:] + gate * h[:, :-1]), dim=1)
    x0 = middle = x
    for i, block in enumerate(model.blocks):
        x = model.resid_lambdas[i].to(dtype) * x + model.x0_lambdas[i].to(dtype) * x0
        u, attn = norm(x), block.attn
        q = linear(u, attn.c_q.weight).view(B, T, -1, E)
        k = linear(u, attn.c_k.weight).view(B, T, -1, E)
        v = linear(u, attn.c_v.weight).view(B, T, -1, E)
        if attn.ve_gate is not None:
            table = model.value_embeds[str(i)].weight
            g = 3 * torch.sigmoid(linear(u[..., :VE_GATE_CHANNELS], attn.ve_gate.weight))
            v = v + g.unsqueeze(-1) * F.embedding(ids, table).to(dtype).view(v.shape)
        q, k = (QK_SCALE * norm(rotate(t, cos, sin)) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=cfg.n_head != cfg.n_kv_head)
        x = x + linear(y.transpose(1, 2).reshape(B, T, -1), attn.c_proj.weight)
        x = x + linear(F.relu(linear(norm(x), block.mlp.c_fc.weight)).square(), block.mlp.c_proj.weight)
        if i == cfg.n_layer // 2:
            middle = x
    x = norm(x - model.backout_lambda.to(dtype) * middle)
    logits = linear(x, model.lm_head.weight)[..., : cfg.vocab_size].float()
    logits = 15 * torch.tanh(logits / 15)
    return F.cross_entropy(logits.view(-1, cfg.vocab_size), targets.reshape(-1))


class PlainOptimizer:
    """Muon, one matrix after the other, and torch's AdamW, each group of its own; rates of nanochat's
    groups."""

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
