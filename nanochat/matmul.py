"""bf16 matrix products of a training step on a CPU: matmul.c where it was built with its instructions, else
PyTorch's.

Letters: M rows (tokens), I and O features of a weight (O, I), n matrices of a stack, R x C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat import native

FP32, BF16, RELU_SQUARED, RELU_SQUARED_GRADIENT, MIX, ADD = range(6)  # as in matmul.c
SMALLEST = 32  # rows or columns: below, packing costs more than it gives


def is_fast(*tensors: Tensor) -> bool:
    """Whether matmul.c multiplies these (..., rows, columns): contiguous bf16 on such a CPU, not tiny."""
    if tensors[0].dtype != torch.bfloat16 or not native.ready(*tensors) or not native.has("matmul"):
        return False
    for x in tensors:
        columns = x.shape[-1]
        if columns % 2 or columns < SMALLEST or x.numel() < SMALLEST * columns:
            return False
    return True


def is_fast_stack(X_nRC: Tensor) -> bool:
    """The same for a stack of matrices, with their transposes and X X^T."""
    rows, columns = X_nRC.shape[1:]
    return rows % 2 == 0 and min(rows, columns) >= SMALLEST and is_fast(X_nRC)


def forward(x: Tensor, w_OI: Tensor, plus: Tensor | None = None, is_squared: bool = False) -> Tensor:
    """x (..., I) @ w^T -> (..., O), or plus + that, or relu(.)^2 of it. For tensors that are fast."""
    y = x.new_empty(*x.shape[:-1], len(w_OI))
    end = RELU_SQUARED if is_squared else BF16 if plus is None else MIX
    _run(x, w_OI, y, _rows(x), *w_OI.shape, end=end, other=None if plus is None else plus.contiguous())
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
    end = RELU_SQUARED_GRADIENT if squared is not None else BF16 if add_to is None else MIX
    other = squared if squared is not None else add_to
    _run(grad, w_OI, dx, _rows(grad), w_OI.shape[1], len(w_OI), b_by_k=True, end=end, other=other)
    return dx


def gradient_of_weight(grad: Tensor, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """grad (..., O)^T @ x (..., I) -> (O, I), fp32 and never rounded; or added to a contiguous tensor."""
    shape = grad.shape[-1], x.shape[-1]
    dw_OI = x.new_empty(shape, dtype=torch.float32) if add_to is None else add_to
    end = FP32 if add_to is None else ADD
    _run(grad, x, dw_OI, *shape, _rows(x), a_by_k=True, b_by_k=True, end=end)
    return dw_OI


def gram(X_nRC: Tensor, of_product: float = 1.0, of_itself: float = 0.0, of_identity: float = 0.0) -> Tensor:
    """of_product X X^T + of_itself X + of_identity I (n, R, R); the second for symmetric X alone."""
    n, R, C = X_nRC.shape
    Y_nRR = X_nRC.new_empty(n, R, R)
    factors = of_product, of_itself, of_identity
    other = X_nRC if of_itself else None
    _run(X_nRC, X_nRC, Y_nRR, R, R, C, end=MIX, other=other, count=n, is_symmetric=True, factors=factors)
    return Y_nRR


def times(A_nRR: Tensor, X_nRC: Tensor, of_itself: float = 0.0) -> Tensor:
    """A X + of_itself X."""
    n, R, C = X_nRC.shape
    Y_nRC, other = torch.empty_like(X_nRC), X_nRC if of_itself else None
    _run(
        A_nRR,
        X_nRC,
        Y_nRC,
        R,
        C,
        R,
        b_by_k=True,
        end=MIX,
        other=other,
        count=n,
        factors=(1.0, of_itself, 0.0),
    )
    return Y_nRC


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _run(
    a: Tensor, b: Tensor, c: Tensor, m: int, n: int, k: int, *, a_by_k: bool = False, b_by_k: bool = False,
    end: int, other: Tensor | None = None, count: int = 1, is_symmetric: bool = False,
    factors: tuple[float, float, float] = (1.0, 1.0, 0.0),
) -> None:  # fmt: skip
    flags = int(a_by_k), int(b_by_k), end, int(is_symmetric)
    native.call("matmul", a, b, c, other, count, m, n, k, *flags, *factors)
