"""FlashAttention-3 (Hopper, sm_90): a binary from the kernel hub, taken only from a recorded revision and
content hash.

No pin is known to this repository yet, so the backend refuses until somebody records one on a machine that
reaches the hub:

    python -m nanochat.flash_attention.fa3 REVISION      # 40 hex digits of a commit

which downloads that revision, hashes every file of it and writes fa3.json beside this file. From then on a
kernel of other
content is refused. Training, prefill, decoding and paged decoding run here; packed documents go to sdpa.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import errors
from nanochat.flash_attention import sdpa
from nanochat.flash_attention.cache import Cache
from nanochat.flash_attention.intervals import Docs, Limit

REPOSITORY = "kernels-community/flash-attn3"
PIN = Path(__file__).with_name("fa3.json")
COMMAND = "python -m nanochat.flash_attention.fa3 REVISION"


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "it computes in bf16 and fp16 only"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        return "its kernel is for sm_90, this GPU is sm_{}{}".format(
            *torch.cuda.get_device_capability(device)
        )
    if not PIN.exists():
        return f"no revision is pinned ({COMMAND} records one)"
    try:
        kernel()
    except (ImportError, OSError, ValueError, errors.UserError) as error:
        return str(error).partition("\n")[0]
    return None


@functools.cache
def kernel() -> Any:
    """The kernel's module, after its files have been compared with the pin. Raises UserError if they
    differ."""
    import kernels

    pin = json.loads(PIN.read_text(encoding="utf-8"))
    found = digest(Path(kernels.install_kernel(REPOSITORY, revision=pin["revision"])))
    if found != pin["sha256"]:
        raise errors.UserError(
            f"{REPOSITORY} at {pin['revision']} has content {found[:12]}, the pin says {pin['sha256'][:12]}",
            f"look at what changed, then {COMMAND}",
        )
    return kernels.get_kernel(REPOSITORY, revision=pin["revision"])


def digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def record(revision: str) -> None:
    """Download a revision and write its pin. Raises UserError for anything but a commit's 40 hex digits."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise errors.UserError(
            f"a pin needs a commit of 40 hex digits, found {revision!r}", "a branch can change under us"
        )
    import kernels

    folder = Path(kernels.install_kernel(REPOSITORY, revision=revision))
    PIN.write_text(
        json.dumps({"revision": revision, "sha256": digest(folder)}, indent=1) + "\n", encoding="utf-8"
    )
    print(f"{REPOSITORY} {revision} is pinned in {PIN.name}")


def attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, left: Limit, right: Limit, doc_start_BT: Docs = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, (B, T, H, E); queries aligned with the last keys."""
    if doc_start_BT is not None:
        return sdpa.attend(q_BTHE, k_BSKE, v_BSKE, left, right, doc_start_BT)
    y = kernel().flash_attn_func(q_BTHE, k_BSKE, v_BSKE, causal=right == 0, window_size=_window(left, right))
    return y[0] if isinstance(y, tuple) else y


def attend_cache(q_BTHE: Tensor, cache: Cache, left: Limit, right: Limit) -> Tensor:
    """Attention of the newest T positions of each row over its cached keys (already appended)."""
    y = kernel().flash_attn_with_kvcache(
        q_BTHE, cache.k, cache.v, cache_seqlens=cache.starts_B.int(), page_table=cache.page_table,
        causal=right == 0, window_size=_window(left, right),
    )  # fmt: skip
    return y[0] if isinstance(y, tuple) else y


def _window(left: Limit, right: Limit) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


if __name__ == "__main__":
    raise SystemExit(errors.run(lambda argv: record(sys.argv[1] if len(sys.argv) > 1 else "")))
