"""GPT's layers for generating: flat tokens, weights cast once, q, k and v from one product.

The same function as `GPT.trunk`, which is its oracle in the tests. There each product casts its fp32 weight
(8 bytes moved where 2 are read here) and each norm prepares for a backward pass. Letters: N tokens of any
sequences, D width, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.cross_entropy import softcap
from nanochat.fused import inverse_rms, rope_tables
from nanochat.gpt import GPT, QK_SCALE, SMEAR_CHANNELS, VE_GATE_CHANNELS, Embedding

# (layer, q (N, H, E), keys and values (N, 2K, E)) -> (N, H, E)
Attend = Callable[[int, Tensor, Tensor], Tensor]


class Network(Protocol):
    """What the runner needs of a model."""

    dtype: torch.dtype

    def hidden(
        self, ids_N: Tensor, prev_N: Tensor, positions_N: Tensor, attend: Attend, lengths: Sequence[int]
    ) -> Tensor:
        """Hidden states (N, D). prev_N: the token before each, -1 for none; lengths: of the chunks in N."""

    def logits(self, hidden_ND: Tensor) -> Tensor: ...


def network_of(model: Any, dtype: torch.dtype | None = None) -> Network:
    """The fastest way to run this model; dtype None is the model's own compute dtype."""
    if type(model) is GPT:
        return FusedNetwork(model, dtype or model.compute_dtype)
    return TrunkNetwork(model)


class TrunkNetwork:
    """Any model with GPT's `trunk` and `logits`, called as they are: single tokens as rows, chunks in one."""

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model, getattr(model, "compute_dtype", torch.float32)

    def hidden(
        self, ids_N: Tensor, prev_N: Tensor, positions_N: Tensor, attend: Attend, lengths: Sequence[int]
    ) -> Tensor:
        """See Network."""
        shape = (len(lengths), 1) if max(lengths) == 1 else (1, len(ids_N))

        def attend_flat(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            y_NHE = attend(layer, q.flatten(0, 1), torch.cat((k, v), dim=2).flatten(0, 1))
            return y_NHE.view(q.shape)

        flat = (x.view(shape) for x in (ids_N, prev_N, positions_N))
        hidden_ND: Tensor = self.model.trunk(*flat, attend_flat).flatten(0, 1)
        return hidden_ND

    def logits(self, hidden_ND: Tensor) -> Tensor:
        logits_NV: Tensor = self.model.logits(hidden_ND)
        return logits_NV


class FusedNetwork:
    """A copy of a GPT's matrices in `dtype`, q, k, v side by side; embedding tables stay the model's."""

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.config, self.dtype = model.config, dtype
        self.head_dim = model.config.n_embd // model.config.n_head

        def narrow(*weights: Tensor) -> Tensor:
            weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).detach().to(dtype)
            return by_columns(weight)

        def number(value: Tensor) -> float:
            return float(value.detach().to(dtype))

        self.wte_VD = model.wte.weight.detach()
        self.head_VD = narrow(model.lm_head.weight)[: model.config.vocab_size]
        self.smear_gate, self.smear = narrow(model.smear_gate.weight), number(model.smear_lambda)
        self.backout = number(model.backout_lambda)
        values = cast("dict[str, Embedding]", model.value_embeds)
        self.layers = []
        for i, block in enumerate(model.blocks):
            attn = block.attn
            has_gate = attn.ve_gate is not None
            self.layers.append(
                (
                    number(model.resid_lambdas[i]),
                    number(model.x0_lambdas[i]),
                    narrow(attn.c_q.weight, attn.c_k.weight, attn.c_v.weight),
                    narrow(attn.c_proj.weight),
                    narrow(block.mlp.c_fc.weight),
                    narrow(block.mlp.c_proj.weight),
                    narrow(attn.ve_gate.weight) if attn.ve_gate is not None else None,
                    values[str(i)].weight.detach() if has_gate else None,
                )
            )

    def hidden(
        self, ids_N: Tensor, prev_N: Tensor, positions_N: Tensor, attend: Attend, lengths: Sequence[int] = ()
    ) -> Tensor:
        """See Network."""
        cfg, dtype, E = self.config, self.dtype, self.head_dim
        H, K, N = cfg.n_head, cfg.n_kv_head, len(ids_N)
        both_ND = F.embedding(torch.cat((ids_N, prev_N.clamp(min=0))), self.wte_VD).to(dtype)
        h_ND, before_ND = _norm(both_ND).split(N)
        gate_N1 = torch.sigmoid(F.linear(h_ND[:, :SMEAR_CHANNELS], self.smear_gate)).mul_(self.smear)
        x_ND = torch.addcmul(h_ND, gate_N1.masked_fill_((prev_N < 0).unsqueeze(1), 0), before_ND)
        x0_ND = middle_ND = x_ND
        cos, sin = rope_tables(positions_N, E, dtype)
        cos_N1E, sin_N1E = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
        for i, (a, b, qkv, proj, fc, out, gate, table_VC) in enumerate(self.layers):
            x_ND = (x_ND * a).add_(x0_ND, alpha=b)
            y_ND = _norm(x_ND)
            qkv_NGE = F.linear(y_ND, qkv).view(N, H + 2 * K, E)
            if gate is not None and table_VC is not None:
                gate_NK1 = F.linear(y_ND[:, :VE_GATE_CHANNELS], gate).sigmoid_().mul_(3).unsqueeze(2)
                ve_NKE = F.embedding(ids_N, table_VC).to(dtype).view(N, K, E)
                qkv_NGE[:, H + K :].addcmul_(gate_NK1, ve_NKE)
            qk_NGE = qkv_NGE[:, : H + K]
            scale = inverse_rms(qk_NGE).mul_(QK_SCALE).to(dtype)  # a rotation keeps the length
            turned_NGE = torch.roll(qk_NGE, E // 2, -1).mul_(sin_N1E).addcmul_(qk_NGE, cos_N1E).mul_(scale)
            qkv_NGE[:, H : H + K] = turned_NGE[:, H:]
            y_NHE = attend(i, turned_NGE[:, :H], qkv_NGE[:, H:])
            x_ND.add_(F.linear(y_NHE.reshape(N, H * E), proj))
            x_ND.add_(F.linear(F.linear(_norm(x_ND), fc).clamp_(min=0).square_(), out))
            if i == cfg.n_layer // 2:
                middle_ND = x_ND
        return _norm(x_ND - self.backout * middle_ND)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Softcapped fp32 logits (N, V)."""
        return softcap(F.linear(hidden_ND, self.head_VD).float())


def by_columns(weight: Tensor) -> Tensor:
    """The same matrix, laid out for products with one token: on CPUs fp32 is read along the outputs (5.0
    against 3.1 billion weights/s, one core of an AMD EPYC), bf16 as it is (7.5 against 5.2).
    """
    is_wide = weight.device.type == "cpu" and weight.dtype == torch.float32
    return weight.t().contiguous().t() if is_wide else weight


@torch.no_grad()
def fastest_dtype(model: GPT, seconds: float = 0.05) -> torch.dtype:
    """fp32 or bf16, whichever multiplies one token by this model's layers sooner on this CPU; timed here.

    Matrices that stay in the cache are best in fp32, larger ones in bf16 where the processor knows it.
    """
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = [by_columns(block.mlp.c_fc.weight.detach().to(dtype)) for block in model.blocks[:8]]
        x_1D = torch.ones(1, model.config.n_embd, dtype=dtype)
        best[dtype], until = float("inf"), time.perf_counter() + seconds / 2
        for repeat in itertools.count():
            begin = time.perf_counter()
            if repeat > 2 and begin > until:
                break
            for weight in weights:
                F.linear(x_1D, weight)
            if repeat:  # the first call builds the kernel
                best[dtype] = min(best[dtype], time.perf_counter() - begin)
    return min(best, key=lambda dtype: best[dtype])


def _norm(x: Tensor) -> Tensor:
    return x * inverse_rms(x).to(x.dtype)
