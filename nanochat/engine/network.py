"""GPT's layers for generating: flat tokens, weights cast once, q, k and v from one product.

The same function as `GPT.forward_hidden`, which is its oracle in the tests. There each product casts its fp32
weight (8 bytes moved where 2 are read here) and each norm prepares for a backward pass. Letters: N tokens of
any sequences, D width, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import context as row_context
from nanochat import hardware
from nanochat.bigram import look_up
from nanochat.gpt import GPT, Embedding, rope_tables
from nanochat.kernels import decode as native_step
from nanochat.kernels.elementwise import inverse_rms

# (layer, q (N, H, E), keys and values (N, 2K, E)) -> (N, H, E)
Attend = Callable[[int, Tensor, Tensor], Tensor]
WIDENED = 1 << 20  # entries of a piece
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
    """The fastest way to run this model; dtype None is the model's own compute dtype.

    int8 halves what a token has to read (see Matrix). Raises ValueError for int8 of another model than GPT.
    """
    if type(model) is GPT:
        return FusedNetwork(model, dtype or model.compute_dtype)
    if dtype == torch.int8:
        raise ValueError(f"int8 weights need a GPT, found {type(model).__name__}; merge adapters first")
    return TrunkNetwork(model)


class TrunkNetwork:
    """Any model with GPT's `forward_hidden` and `logits`: single tokens as rows, chunks in one row."""

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model, getattr(model, "compute_dtype", torch.float32)

    def hidden(
        self, ids_N: Tensor, prev_N: Tensor, positions_N: Tensor, attend: Attend, lengths: Sequence[int]
    ) -> Tensor:
        """See Network."""
        shape = (len(lengths), 1) if max(lengths) == 1 else (1, len(ids_N))

        def attention(layer: int, window: int) -> row_context.Attend:
            def attend_flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                y_NHE = attend(layer, q.flatten(0, 1), torch.cat((k, v), dim=2).flatten(0, 1))
                return y_NHE.view(q.shape)

            return attend_flat

        context = row_context.Context(positions_N.view(shape), attention, prev_ids_BT=prev_N.view(shape))
        hidden_ND: Tensor = self.model.forward_hidden(ids_N.view(shape), context).flatten(0, 1)
        return hidden_ND

    def logits(self, hidden_ND: Tensor) -> Tensor:
        logits_NV: Tensor = self.model.logits(hidden_ND)
        return logits_NV


class Matrix:
    """x -> x W^T in the dtype of x, with W kept as it is multiplied fastest, cast once.

    dtype int8 keeps codes and a scale a row (see quantize). On a CPU with a compiler tokens go through
    decode.c, as many as are faster there. Without one, fp32 is laid out by columns (one token:
    5.0 against 3.1 billion weights/s), and bf16 has an fp16 twin for one token (9.9 against 7.0; one core of
    an AMD EPYC with AVX512-BF16): as many bytes, read by a better kernel, and three bits more exact.
    is_free: inputs have no bound, as relu^2 has none; they are scaled to at most 1, for fp16 ends at 65,504.
    wide: what many tokens times int8 are computed in.
    """

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        is_free: bool = False,
        wide: torch.dtype = torch.float32,
    ) -> None:
        self.is_free, self.wide = is_free, wide
        self.single: Tensor | None = None
        self.scale: Tensor | None = None
        on_cpu = weight.device.type == "cpu"
        is_native = on_cpu and native_step.library() is not None
        weight = weight.detach()
        if dtype == torch.int8:
            self.many, self.scale = quantize(weight)
        elif on_cpu and dtype == torch.float32 and not is_native:
            self.many = weight.to(dtype).t().contiguous().t()
        else:
            self.many = weight.to(dtype, copy=not is_native).contiguous()
        if is_native:
            self.many = native_step.in_huge_pages(self.many)
        if not is_native and on_cpu and dtype == torch.bfloat16 and weight.abs().max() < 1024:
            self.single = weight.to(torch.float16)
        self._native = native_step.describe(self) if is_native else None
        self._most = 0
        if self._native is not None:
            self._most = native_step.most_tokens(self.many.nbytes, self.many.dtype)

    def __call__(self, x_ND: Tensor) -> Tensor:
        if self._native is not None and len(x_ND) <= self._most and native_step.library() is not None:
            return native_step.multiply(self._native, x_ND.float()).to(x_ND.dtype)
        if self.scale is not None:
            return self._widened(x_ND.to(self.wide)).to(x_ND.dtype)
        if self.single is None or len(x_ND) > 1:
            return F.linear(x_ND.to(self.many.dtype), self.many).to(x_ND.dtype)
        if not self.is_free:
            return F.linear(x_ND.half(), self.single).to(x_ND.dtype)
        size = x_ND.abs().amax().clamp_(min=1e-30)
        return F.linear((x_ND / size).half(), self.single).to(x_ND.dtype).mul_(size)

    def _widened(self, x_ND: Tensor) -> Tensor:
        """int8 codes, exact in bf16 too, widened some rows at a time so that they stay in the cache."""
        assert self.scale is not None
        rows = len(self.many) if x_ND.device.type != "cpu" else max(1, WIDENED // self.many.shape[1])
        parts = [F.linear(x_ND, codes.to(x_ND.dtype)) for codes in self.many.split(rows)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).float() * self.scale


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 (rows, cols), scale fp32 (rows,)), weight = scale * code +- scale / 2: symmetric, the
    largest entry of a row is 127. A product's error is at most scale / 2 times the sum of |x|.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


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

    On a CPU all that is no product is fp32, whatever the matrices are; on a GPU with int8 matrices it is the
    model's compute dtype.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.config = model.config
        on_cpu, wide = model.get_device().type == "cpu", model.compute_dtype
        if on_cpu:
            wide = torch.bfloat16 if set(hardware.cpu_features()) & {"amx", "avx512_bf16"} else torch.float32
        self.dtype = torch.float32 if on_cpu else wide if dtype == torch.int8 else dtype
        self.head_dim = model.config.n_embd // model.config.n_head

        def matrix(weight: Tensor, is_free: bool = False) -> Matrix:
            return Matrix(weight, dtype, is_free, wide)

        def number(value: Tensor) -> float:
            return float(value.detach().to(self.dtype))

        values = cast("dict[str, Embedding]", model.value_embeds)
        self.wte_VD = model.wte.weight.detach()
        self.head = matrix(model.lm_head.weight[: model.config.vocab_size])
        self.bigram_RD = None if model.bigram_embeds is None else model.bigram_embeds.weight.detach()
        self.smear_gate = model.smear_gate.weight.detach().to(self.dtype)
        self.smear, self.backout = number(model.smear_lambda), number(model.backout_lambda)
        self.layers = []
        for i, block in enumerate(model.blocks):
            attn, gate = block.attn, block.attn.ve_gate
            self.layers.append(
                (
                    number(model.resid_lambdas[i]),
                    number(model.x0_lambdas[i]),
                    matrix(torch.cat((attn.c_q.weight, attn.c_k.weight, attn.c_v.weight))),
                    matrix(attn.c_proj.weight, is_free=True),
                    matrix(block.mlp.c_fc.weight),
                    matrix(block.mlp.c_proj.weight, is_free=True),
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
        gate_N1 = torch.sigmoid(F.linear(h_ND[:, : self.config.smear_channels], self.smear_gate)).mul_(
            self.smear
        )
        x_ND = torch.addcmul(h_ND, gate_N1.masked_fill_((prev_N < 0).unsqueeze(1), 0), before_ND)
        pairs_ND = self.pair_embeddings(ids_N, prev_N)
        if pairs_ND is not None:
            x_ND = x_ND + pairs_ND.to(dtype)
        x0_ND = middle_ND = x_ND
        cos, sin = self.rope_tables(positions_N, dtype)
        cos_N1E, sin_N1E = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
        for i, (a, b, qkv, proj, fc, out, gate, table_VC) in enumerate(self.layers):
            x_ND = (x_ND * a).add_(x0_ND, alpha=b)
            y_ND = _norm(x_ND)
            qkv_NGE = qkv(y_ND).view(N, H + 2 * K, E)
            if gate is not None and table_VC is not None:
                gate_NK1 = F.linear(y_ND[:, : cfg.ve_gate_channels], gate).sigmoid_().mul_(3).unsqueeze(2)
                ve_NKE = F.embedding(ids_N, table_VC).to(dtype).view(N, K, E)
                qkv_NGE[:, H + K :].addcmul_(gate_NK1, ve_NKE)
            qk_NGE = qkv_NGE[:, : H + K]
            scale = inverse_rms(qk_NGE).mul_(cfg.qk_scale).to(dtype)  # a rotation keeps the length
            turned_NGE = torch.roll(qk_NGE, E // 2, -1).mul_(sin_N1E).addcmul_(qk_NGE, cos_N1E).mul_(scale)
            qkv_NGE[:, H : H + K] = turned_NGE[:, H:]
            y_NHE = attend(i, turned_NGE[:, :H], qkv_NGE[:, H:])
            x_ND.add_(proj(y_NHE.reshape(N, H * E)))
            x_ND.add_(out(fc(_norm(x_ND)).clamp_(min=0).square_()))
            if i == cfg.n_layer // 2:
                middle_ND = x_ND
        return _norm(x_ND - self.backout * middle_ND)

    def rope_tables(self, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (N, 1, E/2) of these positions."""
        return rope_tables(positions_N, self.head_dim, self.config.rope_base, dtype)

    def pair_embeddings(self, ids_N: Tensor, prev_N: Tensor) -> Tensor | None:
        """What the hashed table adds (N, D), or None without one."""
        return None if self.bigram_RD is None else look_up(ids_N, prev_N, self.bigram_RD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Softcapped fp32 logits (N, V)."""
        cap = self.config.softcap
        return cap * torch.tanh(self.head(hidden_ND).float() / cap)


def _norm(x: Tensor) -> Tensor:
    return x * inverse_rms(x).to(x.dtype)
