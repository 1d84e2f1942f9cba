"""FlashAttention-4 (CuTe DSL, compiled at first use): Hopper and Blackwell, from the package flash-attn-4.

The package has pre-releases only, so this backend takes the one it was written for and refuses others by
name. Training
and prefill run here; packed documents, head sizes that the kernel lacks and decoding go to sdpa.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from nanochat.flash_attention import sdpa
from nanochat.flash_attention.intervals import Docs, Limit

PACKAGE, VERSION = "flash-attn-4", "4.0.0b36"
ARCHITECTURES = (9, 10, 12)  # sm_90, sm_100, sm_120
HEAD_SIZES = (64, 96, 128)
attend_cache = sdpa.attend_cache


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "it computes in bf16 and fp16 only"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major not in ARCHITECTURES:
            return f"it has no kernel for sm_{major}{minor}"
    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed (pip install {PACKAGE}=={VERSION})"
    return None if found == VERSION else f"{PACKAGE} is {found}, this version is written for {VERSION}"


@functools.cache
def kernel() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


def attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, left: Limit, right: Limit, doc_start_BT: Docs = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, (B, T, H, E); queries aligned with the last keys."""
    if doc_start_BT is not None or q_BTHE.shape[-1] not in HEAD_SIZES:
        return sdpa.attend(q_BTHE, k_BSKE, v_BSKE, left, right, doc_start_BT)
    is_causal = right == 0
    window = (None, None) if left is None and is_causal else (left, right)
    y = kernel()(q_BTHE, k_BSKE, v_BSKE, causal=is_causal and left is None, window_size=window)
    return y[0] if isinstance(y, tuple) else y
