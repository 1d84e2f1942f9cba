"""The tier that runs everywhere: torch's scaled_dot_product_attention on CPU, CUDA and MPS.

Full causal attention is one fused call without a mask. A window is cut into chunks of queries, each against
the keys that it can see, so that it costs O(T * (chunk + left)) in time and memory and no T x T mask exists.
Packed documents are separate calls on a CPU, chunks with a mask per row elsewhere. It leaves out skipping the
masked part of a chunk: flex does that.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.flash_attention.cache import Cache
from nanochat.flash_attention.intervals import Docs, Limit, intervals, keep

CHUNK = (
    128  # queries; bench_attention.py --chunks: 128 is the fastest or within noise of it, 64 and 384 are not
)
MIN_DOCUMENT = (
    8  # mean tokens a document from which a call per document is cheaper than masks (CPU, measured)
)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this tier cannot run, or None: it runs wherever torch does."""
    return None


def attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, left: Limit, right: Limit, doc_start_BT: Docs = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, (B, T, H, E); queries aligned with the last keys."""
    num_queries, num_keys = q_BTHE.shape[1], k_BSKE.shape[1]
    left = num_keys if left is None else left
    right = num_keys if right is None else right
    if doc_start_BT is None:
        unseen = max(0, num_keys - num_queries - left)  # old keys, out of every query's window
        if unseen:
            k_BSKE, v_BSKE, num_keys = k_BSKE[:, unseen:], v_BSKE[:, unseen:], num_keys - unseen
        is_causal = _causal_flag(num_queries, num_keys, num_keys - num_queries, left, right)
        if is_causal is not None:
            return _call(q_BTHE, k_BSKE, v_BSKE, is_causal=is_causal)
    elif right == 0 and q_BTHE.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = _document_lengths(doc_start_BT)
        if lengths is not None:
            parts = zip(*(x.flatten(0, 1).split(lengths) for x in (q_BTHE, k_BSKE, v_BSKE)))
            outputs = [attend(q[None], k[None], v[None], left, right)[0] for q, k, v in parts]
            return torch.cat(outputs).view_as(q_BTHE)
    return _chunks(q_BTHE, k_BSKE, v_BSKE, left, right, doc_start_BT)


def attend_cache(q_BTHE: Tensor, cache: Cache, left: Limit, right: Limit) -> Tensor:
    """Attention of the newest T positions of each row over its cached keys (already appended)."""
    if cache.host is None:
        return attend_ragged(q_BTHE, *cache.whole(), cache.starts_B, left, right)
    if cache.page_table is None and min(cache.host) == max(cache.host):
        return attend(q_BTHE, cache.k[:, : cache.host[0]], cache.v[:, : cache.host[0]], left, right)
    # Row by row: no mask, no work on padding, and a row's result is bit for bit the one that it has alone.
    rows = [attend(q_BTHE[b : b + 1], *cache.row(b, n), left, right) for b, n in enumerate(cache.host)]
    return torch.cat(rows)


def attend_ragged(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, lengths_B: Tensor, left: Limit, right: Limit
) -> Tensor:
    """Rows of different lengths in one call per chunk of queries, with nothing read back from the GPU.

    It looks at all S keys: a caller that knows a bound passes k_cache[:, :bound], a view, written in place.
    """
    low_BT, high_BT = intervals(q_BTHE.shape[1], lengths_B, left, right)
    chunks = zip(q_BTHE.split(CHUNK, 1), low_BT.split(CHUNK, 1), high_BT.split(CHUNK, 1))
    return torch.cat([_call(q, k_BSKE, v_BSKE, keep(lo, hi, 0, k_BSKE.shape[1])) for q, lo, hi in chunks], 1)


def _chunks(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, left: int, right: int, doc_start_BT: Docs
) -> Tensor:
    num_queries, num_keys, device = q_BTHE.shape[1], k_BSKE.shape[1], q_BTHE.device
    chunk, past = min(CHUNK, num_queries), num_keys - num_queries
    # The gradients of split and cat are views and one copy; a slice of k would get one as long as all of k.
    k_blocks, v_blocks = k_BSKE.split(chunk, 1), v_BSKE.split(chunk, 1)
    outputs: list[Tensor] = []
    bands: dict[tuple[int, int, int], Tensor] = {}
    for start, q in zip(range(0, num_queries, chunk), q_BTHE.split(chunk, 1)):
        first, size = past + start, q.shape[1]  # these queries stand at positions first .. first + size - 1
        blocks = slice(max(0, first - left) // chunk, -(-min(num_keys, first + size + right) // chunk))
        lo, hi = blocks.start * chunk, min(num_keys, blocks.stop * chunk)
        k, v = torch.cat(k_blocks[blocks], 1), torch.cat(v_blocks[blocks], 1)
        shape = size, hi - lo, first - lo
        is_causal = _causal_flag(*shape, left, right)
        if doc_start_BT is None and is_causal is not None:
            outputs.append(_call(q, k, v, is_causal=is_causal))
            continue
        if shape not in bands:  # all full chunks share one
            bands[shape] = _band(*shape, left, right, device)
        mask = bands[shape]
        if doc_start_BT is not None:
            seen_from = doc_start_BT[:, None, start : start + size, None]
            mask = mask & (torch.arange(lo, hi, device=device) >= seen_from)
        outputs.append(_call(q, k, v, mask))
    return torch.cat(outputs, 1)


def _document_lengths(doc_start_BT: Tensor) -> list[int] | None:
    """Lengths of the documents along the flattened rows; None if it is no such cut, or too fine."""
    position_T = torch.arange(doc_start_BT.shape[1], dtype=doc_start_BT.dtype)
    is_first = (doc_start_BT == position_T) | (position_T == 0)
    if not torch.equal((is_first * position_T).cummax(1).values.to(doc_start_BT.dtype), doc_start_BT):
        return None
    cuts = is_first.flatten().nonzero().flatten()
    if len(cuts) * MIN_DOCUMENT > doc_start_BT.numel():
        return None
    return torch.diff(cuts, append=cuts.new_tensor([doc_start_BT.numel()])).tolist()


def _causal_flag(num_queries: int, num_keys: int, past: int, left: int, right: int) -> bool | None:
    """is_causal for a call without a mask tensor; None where only a mask does it."""
    if past + num_queries - 1 > left:
        return None
    if num_keys - 1 <= past + right:
        return False  # every key is visible
    return True if past == right == 0 and num_keys == num_queries else None


def _band(num_queries: int, num_keys: int, past: int, left: int, right: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys), True where key s is at most `left` before and `right` after query past + t."""
    back = past + torch.arange(num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)
    return (back <= left) & (back >= -right)


def _call(
    q_BTHE: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """One SDPA call on transposed views; the fused kernels read strides, so nothing is copied."""
    groups = q_BTHE.shape[2] // k.shape[2]
    device, is_half = q_BTHE.device.type, q_BTHE.dtype in (torch.bfloat16, torch.float16)
    # The CPU kernel and CUDA's flash kernel share k and v among query heads; the others need them repeated.
    shares_heads = device == "cpu" or (device == "cuda" and mask is None and is_half)
    if groups > 1 and not shares_heads:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k, v))
    enable_gqa = groups > 1 and shares_heads
    y_BHTE = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)
    return y_BHTE.transpose(1, 2)
