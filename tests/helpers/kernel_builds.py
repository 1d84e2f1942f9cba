"""The kernels as other processors build them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nanochat import hardware
from nanochat.kernels import build


@contextmanager
def bf16_pairs() -> Iterator[None]:
    """matmul.c and attention.c, on a machine with AMX too, which leaves them out by itself; else skip."""
    if build.has("matmul"):
        yield
        return
    if "avx512_bf16" not in hardware.cpu_features() or build.library() is None:
        pytest.skip("this processor has no AVX512-BF16, or there is no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "TUNING", (("-march=native", "-mno-amx-bf16", "-fopenmp"),))
        library = build._build.__wrapped__()
        patch.setattr(build, "_build", lambda: library)
        build.has.cache_clear()
        if not build.has("matmul"):
            build.has.cache_clear()
            pytest.skip("the compiler cannot leave AMX out")
        yield
    build.has.cache_clear()
