"""bf16 matrix products of a training step on a CPU, by matmul.c; `is_fast` says for which tensors.

Elsewhere callers use PyTorch's products. Letters: I and O features of a weight (O, I); n matrices of a stack,
R x C; M, N, K of a product (M, K) x (K, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from nanochat.kernels import build

SMALLEST = 32  # rows or columns: below, packing costs more than it gives


class Epilogue(IntEnum):
    """What is stored for a product P, numbered as in matmul.c. All but FP32 and ADD give bf16."""

    FP32 = 0
    BF16 = 1
    RELU_SQUARED = 2  # relu(P)^2
    RELU_SQUARED_GRADIENT = 3  # 2 sqrt(other) P
    MIX = 4  # P + other
    ADD = 5  # the fp32 result's old value + P


def is_fast(*tensors: Tensor) -> bool:
    """Whether matmul.c multiplies these (..., rows, columns): contiguous bf16 on such a CPU, not tiny."""
    if tensors[0].dtype != torch.bfloat16 or not build.ready(*tensors) or not build.has("matmul"):
        return False
    for x in tensors:
        columns = x.shape[-1]
        if columns % 2 or columns < SMALLEST or x.numel() < SMALLEST * columns:
            return False
    return True


def forward(x: Tensor, w_OI: Tensor, plus: Tensor | None = None, is_squared: bool = False) -> Tensor:
    """x (..., I) @ w^T -> (..., O), or plus + that, or relu(.)^2 of it. For tensors that are fast."""
    y = x.new_empty(*x.shape[:-1], len(w_OI))
    other = None
    epilogue = Epilogue.RELU_SQUARED if is_squared else Epilogue.BF16
    if plus is not None:
        epilogue = Epilogue.MIX
        other = plus.contiguous()
    _run(x, w_OI, y, epilogue, other)
    return y


def gradient_of_input(
    grad: Tensor, w_OI: Tensor, add_to: Tensor | None = None, squared: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """grad (..., O) @ w -> (..., I), in `out` or added to a contiguous tensor if there is one.

    squared: relu(x)^2 that was the input; then the gradient is that of x.
    """
    dx = out if out is not None else add_to
    if dx is None:
        dx = grad.new_empty(*grad.shape[:-1], w_OI.shape[1])
    if squared is not None:
        _run(grad, w_OI, dx, Epilogue.RELU_SQUARED_GRADIENT, squared, b_is_kn=True)
    elif add_to is not None:
        _run(grad, w_OI, dx, Epilogue.MIX, add_to, b_is_kn=True)
    else:
        _run(grad, w_OI, dx, Epilogue.BF16, b_is_kn=True)
    return dx


def gradient_of_weight(grad: Tensor, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """grad (..., O)^T @ x (..., I) -> (O, I), fp32 and never rounded; or added to a contiguous tensor."""
    if add_to is not None:
        _run(grad, x, add_to, Epilogue.ADD, a_is_km=True, b_is_kn=True)
        return add_to
    dw_OI = x.new_empty(grad.shape[-1], x.shape[-1], dtype=torch.float32)
    _run(grad, x, dw_OI, Epilogue.FP32, a_is_km=True, b_is_kn=True)
    return dw_OI


def polar(X_nRC: Tensor, steps: Sequence[tuple[float, float, float]], is_pairwise: bool) -> Tensor | None:
    """Polar Express (nanochat.optim.muon) on a stack, whole matrices to a thread; None where it does not fit.

    is_pairwise: two steps at a time. Of symmetric products half is computed.
    """
    n, R, C = X_nRC.shape
    if R > C:
        transposed = polar(X_nRC.mT.contiguous(), steps, is_pairwise)
        return None if transposed is None else transposed.mT.contiguous()
    # Matrices do not divide evenly among threads; at most a quarter of the threads may wait.
    threads = torch.get_num_threads()
    is_balanced = 3 * -(-n // threads) * threads <= 4 * n
    if R % 2 or R < SMALLEST or not is_balanced or not is_fast(X_nRC):
        return None
    Y_nRC = X_nRC.clone()
    build.call("polar", Y_nRC, torch.tensor(steps), n, R, C, len(steps), int(is_pairwise))
    return Y_nRC


def _run(
    a: Tensor, b: Tensor, c: Tensor, epilogue: Epilogue, other: Tensor | None = None,
    a_is_km: bool = False, b_is_kn: bool = False,
) -> None:  # fmt: skip
    """c (M, N) from a (M, K), or (K, M) if a_is_km, and b (N, K), (K, N) if b_is_kn. Leading axes are rows.

    Raises ValueError where the shapes do not fit or K is odd: matmul.c would read beyond a row's end.
    """
    a_rows, a_columns = a.numel() // a.shape[-1], a.shape[-1]
    b_rows, b_columns = b.numel() // b.shape[-1], b.shape[-1]
    M, K = (a_columns, a_rows) if a_is_km else (a_rows, a_columns)
    N, b_K = (b_columns, b_rows) if b_is_kn else (b_rows, b_columns)
    if b_K != K or c.numel() != M * N or (other is not None and other.numel() != M * N):
        shapes = [tuple(x.shape) for x in (a, b, c, other) if x is not None]
        raise ValueError(f"the shapes of a product must fit, found {shapes}")
    if K % 2 and not a_is_km:
        raise ValueError(
            f"the axis that is summed over must be even, found {K}; leave it to PyTorch's product"
        )
    build.call("matmul", a, b, c, other, M, N, K, int(a_is_km), int(b_is_kn), int(epilogue))
