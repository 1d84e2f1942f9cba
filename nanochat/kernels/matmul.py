"""bf16 matrix products of a training step on a CPU: matmul.c where it was built with its instructions, else
PyTorch's.

Letters: I and O features of a weight (O, I); n matrices of a stack, R x C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.kernels import build as native

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


def polar(X_nRC: Tensor, steps: Sequence[tuple[float, float, float]], is_pairwise: bool) -> Tensor | None:
    """Polar Express (nanochat.optim.muon) on a stack, whole matrices to a thread; None where it does not fit.

    is_pairwise: two steps at a time. Of symmetric products half is computed.
    """
    (n, R, C), threads = X_nRC.shape, torch.get_num_threads()
    if R > C:
        turned = polar(X_nRC.mT.contiguous(), steps, is_pairwise)
        return None if turned is None else turned.mT.contiguous()
    is_even = 3 * -(-n // threads) * threads <= 4 * n  # else more than a quarter of the threads would wait
    if R % 2 or R < SMALLEST or not is_even or not is_fast(X_nRC):
        return None
    Y_nRC, factors = X_nRC.clone(), torch.tensor(steps)
    native.call("polar", Y_nRC, factors, n, R, C, len(steps), int(is_pairwise))
    return Y_nRC


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _run(
    a: Tensor, b: Tensor, c: Tensor, m: int, n: int, k: int, *, a_by_k: bool = False, b_by_k: bool = False,
    end: int, other: Tensor | None = None,
) -> None:  # fmt: skip
    if k % 2 and not a_by_k:  # matmul.c would read a pair across the end of a row
        raise ValueError(
            f"the axis that is summed over must be even, found {k}; leave it to PyTorch's product"
        )
    native.call("matmul", a, b, c, other, m, n, k, int(a_by_k), int(b_by_k), end)
