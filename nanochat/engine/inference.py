"""The same GPT with its linear layers swapped for inference ones: weights are cast or quantised once.

In training every weight is fp32 and each product casts it (8 bytes moved where 2 are read here). Letters:
I and O sizes of a layer, N tokens of any sequences, D width, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import hardware
from nanochat.context import Attend, Context
from nanochat.gpt import GPT
from nanochat.kernels import decode
from nanochat.protocols import Model

# Entries of int8 weights that are widened at a time on a CPU, so that they stay in its cache.
WIDENED_ENTRIES = 1 << 20
LARGE_BYTES = 64 << 20  # of the layers' fp32 matrices: more than the caches of the CPUs we know

# (layer, q (N, H, E), keys and values (N, 2K, E)) -> (N, H, E)
AttendTokens = Callable[[int, Tensor, Tensor], Tensor]


class InferenceLinear(nn.Module):
    """x (..., I) -> x W^T (..., O) in the dtype of x.

    Args:
        weight: (O, I), in the dtype in which it is read; int8 codes come with scale (O,), see `quantize`.
        wide: what many tokens times int8 codes are computed in.

    On a CPU with a compiler up to `max_native_tokens` tokens at once go through decode.c.
    """

    def __init__(self, weight_OI: Tensor, scale_O: Tensor | None, wide: torch.dtype) -> None:
        super().__init__()
        self.weight_OI = weight_OI
        self.scale_O = scale_O
        self.wide = wide
        self.native = decode.describe_matrix(weight_OI, scale_O)
        self.max_native_tokens = decode.most_tokens(weight_OI.nbytes, weight_OI.dtype) if self.native else 0

    @classmethod
    def of(cls, weight_OI: Tensor, dtype: torch.dtype, wide: torch.dtype = torch.float32) -> InferenceLinear:
        """A copy of a weight in `dtype`."""
        weight_OI = weight_OI.detach()
        scale_O = None
        if dtype == torch.int8:
            weight_OI, scale_O = quantize(weight_OI)
        return cls(decode.in_huge_pages(weight_OI.to(dtype)), scale_O, wide)

    def rows(self, start: int, stop: int) -> InferenceLinear:
        """A layer of some of the outputs, which shares the memory."""
        scale_O = None if self.scale_O is None else self.scale_O[start:stop]
        return InferenceLinear(self.weight_OI[start:stop], scale_O, self.wide)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x.reshape(-1, x.shape[-1])).to(x.dtype).unflatten(0, x.shape[:-1])

    def _product(self, x_NI: Tensor) -> Tensor:
        if self.native is not None and len(x_NI) <= self.max_native_tokens and decode.library() is not None:
            return decode.multiply(self.native, x_NI.float())
        if self.scale_O is None:
            return F.linear(x_NI.to(self.weight_OI.dtype), self.weight_OI)
        # int8 codes are exact in bf16 too. A GPU widens all of them at once.
        num_rows = len(self.weight_OI)
        if x_NI.device.type == "cpu":
            num_rows = max(1, WIDENED_ENTRIES // self.weight_OI.shape[1])
        x_NI = x_NI.to(self.wide)
        parts = [F.linear(x_NI, codes.to(self.wide)) for codes in self.weight_OI.split(num_rows)]
        return torch.cat(parts, dim=1).float() * self.scale_O


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 (O, I), scale fp32 (O,)) with weight = scale * code +- scale / 2.

    Symmetric: the largest entry of a row is 127. A product's error is at most scale / 2 times the sum of |x|.
    """
    weight_OI = weight_OI.detach().float()
    largest_O = weight_OI.abs().amax(dim=1)
    scale_O = torch.where(largest_O > 0, largest_O / 127, 1.0)
    codes_OI = (weight_OI / scale_O[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes_OI, scale_O


class InferenceGPT(GPT):
    """A GPT whose matrices are copies in `dtype` of another model's; its tables and scalars are shared.

    On a CPU everything but the matrices is fp32, whatever they are; on a GPU with int8 matrices it is in the
    model's compute dtype. The queries, keys and values of a layer come from one matrix, `attn.c_qkv`.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        on_cpu = model.get_device().type == "cpu"
        if on_cpu:
            wide = torch.bfloat16 if has_fast_bf16() else torch.float32
            compute_dtype = torch.float32
        else:
            wide = model.compute_dtype
            compute_dtype = wide if dtype == torch.int8 else dtype
        with torch.device("meta"):
            super().__init__(model.config, compute_dtype)
        self.requires_grad_(False)

        # What is not a matrix is the model's own memory.
        self.transformer["wte"] = model.transformer["wte"]
        self.value_embeds = model.value_embeds
        self.bigram_embeds = model.bigram_embeds
        self.smear_gate = model.smear_gate
        for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
            setattr(self, name, getattr(model, name))

        def copied(weight: Tensor) -> Any:
            return InferenceLinear.of(weight, dtype, wide)

        self.lm_head = copied(model.lm_head.weight[: model.config.vocab_size])
        q_size, kv_size = model.config.n_embd, model.config.kv_dim
        for block, source in zip(self.blocks, model.blocks, strict=True):
            attn: Any = block.attn
            c_qkv = copied(
                torch.cat((source.attn.c_q.weight, source.attn.c_k.weight, source.attn.c_v.weight))
            )
            attn.c_qkv = c_qkv
            attn.c_q = c_qkv.rows(0, q_size)
            attn.c_k = c_qkv.rows(q_size, q_size + kv_size)
            attn.c_v = c_qkv.rows(q_size + kv_size, q_size + 2 * kv_size)
            attn.c_proj = copied(source.attn.c_proj.weight)
            attn.ve_gate = source.attn.ve_gate
            block.mlp.c_fc = copied(source.mlp.c_fc.weight)
            block.mlp.c_proj = copied(source.mlp.c_proj.weight)
        self.eval()


def prepare(model: Model, dtype: torch.dtype | None = None) -> Any:
    """The fastest way to run this model; dtype None is the model's own compute dtype.

    A model that is not exactly a GPT is run as it is. Raises ValueError for int8 of such a model.
    """
    if type(model) is GPT:
        return InferenceGPT(model, dtype or model.compute_dtype)
    if dtype == torch.int8:
        raise ValueError(f"int8 weights need a GPT, found {type(model).__name__}; merge adapters first")
    return model


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    return bool(set(hardware.cpu_features()) & {"amx", "avx512_bf16"})


def cpu_dtype(model: nn.Module) -> torch.dtype:
    """For a model's matrices on this CPU: bf16 if it multiplies that and they are too many for its caches.

    A rule and no measurement, so that a seed gives the same answer tomorrow.
    """
    num_bytes = 4 * sum(p.numel() for name, p in model.named_parameters() if "transformer.h" in name)
    return torch.bfloat16 if num_bytes > LARGE_BYTES and has_fast_bf16() else torch.float32


def forward_tokens(
    model: Model, ids_N: Tensor, prev_N: Tensor, positions_N: Tensor, attend: AttendTokens
) -> Tensor:
    """Hidden states (N, D) of tokens of any sequences, side by side in one row.

    prev_N: the token before each, -1 where there is none. `attend` knows which tokens belong together.
    """

    def attention(layer: int, window: int) -> Attend:
        def attend_row(q_1NHE: Tensor, k_1NKE: Tensor, v_1NKE: Tensor) -> Tensor:
            return attend(layer, q_1NHE[0], torch.cat((k_1NKE[0], v_1NKE[0]), dim=1)).unsqueeze(0)

        return attend_row

    context = Context(positions_N, attention, prev_ids_BT=prev_N.unsqueeze(0))
    hidden_1ND: Tensor = model.forward_hidden(ids_N.unsqueeze(0), context)
    return hidden_1ND[0]
