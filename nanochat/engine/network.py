"""GPT's layers for generating: flat tokens, weights cast once, q, k and v from one product.

The same function as `GPT.trunk`, which is its oracle in the tests. There each product casts its fp32 weight
(8 bytes moved where 2 are read here) and each norm prepares for a backward pass. Letters: N tokens of any
sequences, D width, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import hardware
from nanochat.bigram import look_up
from nanochat.cross_entropy import softcap
from nanochat.fused import inverse_rms, rope_tables
from nanochat.gpt import GPT, QK_SCALE, SMEAR_CHANNELS, VE_GATE_CHANNELS, Embedding

# (layer, q (N, H, E), keys and values (N, 2K, E)) -> (N, H, E)
Attend = Callable[[int, Tensor, Tensor], Tensor]
LARGE_BYTES = 64 << 20  # of the layers' fp32 matrices: more than the caches of the CPUs we know


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


class Matrix:
    """x -> x W^T in the dtype of x, with W kept as it is multiplied fastest, cast once.

    On a CPU fp32 is laid out by columns (one token: 5.0 against 3.1 billion weights/s). bf16, for many
    tokens, has an fp16 twin for one (9.9 against 7.0; one core of an AMD EPYC with AVX512-BF16): as many
    bytes, read by a better kernel, and three bits more exact. is_free: inputs have no bound, as relu^2 has
    none; they are scaled to at most 1, for fp16 ends at 65,504.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, is_free: bool = False) -> None:
        self.is_free, self.single = is_free, None
        self.many = weight.detach().to(dtype)
        if weight.device.type == "cpu" and dtype == torch.float32:
            self.many = self.many.t().contiguous().t()
        elif weight.device.type == "cpu" and dtype == torch.bfloat16 and weight.abs().max() < 1024:
            self.single = weight.detach().to(torch.float16)

    def __call__(self, x_ND: Tensor) -> Tensor:
        if self.single is None or len(x_ND) > 1:
            return F.linear(x_ND.to(self.many.dtype), self.many).to(x_ND.dtype)
        if not self.is_free:
            return F.linear(x_ND.half(), self.single).to(x_ND.dtype)
        size = x_ND.abs().amax().clamp_(min=1e-30)
        return F.linear((x_ND / size).half(), self.single).to(x_ND.dtype).mul_(size)


def cpu_dtype(model: Any) -> torch.dtype:
    """For a model's matrices on this CPU: bf16 if it multiplies that and they are too many for its caches.

    A rule and no measurement, so that a seed gives the same answer tomorrow.
    """
    features = set(hardware.cpu_features())
    num_bytes = 4 * sum(p.numel() for name, p in model.named_parameters() if "transformer.h" in name)
    is_large = num_bytes > LARGE_BYTES
    return torch.bfloat16 if is_large and features & {"amx", "avx512_bf16"} else torch.float32


class FusedNetwork:
    """A copy of a GPT's matrices in `dtype`, q, k, v side by side; embedding tables stay the model's.

    On a CPU all that is no product is fp32, whatever the matrices are.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.config = model.config
        self.dtype = torch.float32 if model.get_device().type == "cpu" else dtype
        self.head_dim = model.config.n_embd // model.config.n_head

        def number(value: Tensor) -> float:
            return float(value.detach().to(self.dtype))

        values = cast("dict[str, Embedding]", model.value_embeds)
        self.wte_VD = model.wte.weight.detach()
        self.bigram_RD = None if model.bigram_embeds is None else model.bigram_embeds.weight.detach()
        self.head = Matrix(model.lm_head.weight[: model.config.vocab_size], dtype)
        self.smear_gate = model.smear_gate.weight.detach().to(self.dtype)
        self.smear, self.backout = number(model.smear_lambda), number(model.backout_lambda)
        self.layers = []
        for i, block in enumerate(model.blocks):
            attn, gate = block.attn, block.attn.ve_gate
            self.layers.append(
                (
                    number(model.resid_lambdas[i]),
                    number(model.x0_lambdas[i]),
                    Matrix(torch.cat((attn.c_q.weight, attn.c_k.weight, attn.c_v.weight)), dtype),
                    Matrix(attn.c_proj.weight, dtype, is_free=True),
                    Matrix(block.mlp.c_fc.weight, dtype),
                    Matrix(block.mlp.c_proj.weight, dtype, is_free=True),
                    None if gate is None else gate.weight.detach().to(self.dtype),
                    None if gate is None else values[str(i)].weight.detach(),
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
        if self.bigram_RD is not None:
            x_ND = x_ND + look_up(ids_N, prev_N, self.bigram_RD).to(dtype)
        x0_ND = middle_ND = x_ND
        cos, sin = rope_tables(positions_N, E, dtype)
        cos_N1E, sin_N1E = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
        for i, (a, b, qkv, proj, fc, out, gate, table_VC) in enumerate(self.layers):
            x_ND = (x_ND * a).add_(x0_ND, alpha=b)
            y_ND = _norm(x_ND)
            qkv_NGE = qkv(y_ND).view(N, H + 2 * K, E)
            if gate is not None and table_VC is not None:
                gate_NK1 = F.linear(y_ND[:, :VE_GATE_CHANNELS], gate).sigmoid_().mul_(3).unsqueeze(2)
                ve_NKE = F.embedding(ids_N, table_VC).to(dtype).view(N, K, E)
                qkv_NGE[:, H + K :].addcmul_(gate_NK1, ve_NKE)
            qk_NGE = qkv_NGE[:, : H + K]
            scale = inverse_rms(qk_NGE).mul_(QK_SCALE).to(dtype)  # a rotation keeps the length
            turned_NGE = torch.roll(qk_NGE, E // 2, -1).mul_(sin_N1E).addcmul_(qk_NGE, cos_N1E).mul_(scale)
            qkv_NGE[:, H : H + K] = turned_NGE[:, H:]
            y_NHE = attend(i, turned_NGE[:, :H], qkv_NGE[:, H:])
            x_ND.add_(proj(y_NHE.reshape(N, H * E)))
            x_ND.add_(out(fc(_norm(x_ND)).clamp_(min=0).square_()))
            if i == cfg.n_layer // 2:
                middle_ND = x_ND
        return _norm(x_ND - self.backout * middle_ND)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Softcapped fp32 logits (N, V)."""
        return softcap(self.head(hidden_ND).float())


def _norm(x: Tensor) -> Tensor:
    return x * inverse_rms(x).to(x.dtype)
