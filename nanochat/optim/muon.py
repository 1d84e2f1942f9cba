"""Muon on a stack of n equal matrices, R × C (output × input), all state fp32.

Momentum, MuonEq row scaling, Polar Express orthogonalisation, Muon+ norm, NorMuon second moment and
cautious decay. Vectors and matrices of a stack are updated by lists, so that a single process needs no
copies of weights and gradients. On a CPU with a compiler what is not a product is muon.c; the PyTorch
lines serve everything else.
"""

import torch

from nanochat.kernels import build as native
from nanochat.kernels import matmul

# Polar Express (arXiv 2505.16932): X ← αX + (βA+γA²)X, five steps.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
DEFAULTS = {
    "momentum": 0.95,
    "beta2": 0.9,
    "ns_steps": len(POLAR_EXPRESS),
    "ns_dtype": torch.float32,
    "weight_decay": 0.0,
}


def orthogonalize(N_nRC: torch.Tensor, ns_steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Near-orthogonal X_nRC in `dtype`: MuonEq rows, then Polar Express; singular values near one constant.

    Row norms and the scale are fp32 and the rounding to `dtype` comes once, after them. Scales N in place.
    """
    row_norm = torch.linalg.vector_norm(N_nRC, dim=-1, keepdim=True)
    return polar(N_nRC.mul_(row_scale(row_norm)).to(dtype), ns_steps)


def row_scale(row_norm_nR1: torch.Tensor) -> torch.Tensor:
    """Factors (n, R, 1) that make all rows equally long (MuonEq) and the spectrum fit Polar Express."""
    norm = torch.linalg.vector_norm(row_norm_nR1, dim=-2, keepdim=True)
    scale = norm / row_norm_nR1.shape[1] ** 0.5 / row_norm_nR1.clamp(min=1e-6)
    norm = torch.linalg.vector_norm(scale * row_norm_nR1, dim=-2, keepdim=True)
    return scale / (1.01 * norm + 1e-6)


def polar(X: torch.Tensor, ns_steps: int) -> torch.Tensor:
    """The Polar Express steps on X (n, R, C), in its dtype.

    Long bf16 matrices take two steps at a time: with Q = αI + βA + γA² of A = XXᵀ, the next A is QAQ, which
    costs products of the short side alone. Up to a common length, which Muon+ removes, errors stay within
    1.6 times those of single bf16 steps and 0.01 (a test).
    """
    num_rows, num_cols = X.shape[1:]
    is_long = X.dtype == torch.bfloat16 and max(num_rows, num_cols) > 2 * min(num_rows, num_cols)
    done = matmul.polar(X, POLAR_EXPRESS[:ns_steps], is_long)
    if done is not None:
        return done
    if is_long and num_rows > num_cols:
        return polar(X.mT, ns_steps).mT.contiguous()
    steps = list(POLAR_EXPRESS[:ns_steps])
    while is_long and len(steps) > 1:
        A = torch.bmm(X, X.mT)
        Q = _polynomial(A, *steps.pop(0))
        X = torch.bmm(torch.bmm(_polynomial(torch.bmm(torch.bmm(Q, A), Q), *steps.pop(0)), Q), X)
    for alpha, beta, gamma in steps:
        A = torch.bmm(X, X.mT) if num_rows <= num_cols else torch.bmm(X.mT, X)
        B = torch.baddbmm(A, A, A, beta=beta, alpha=gamma)
        X = torch.baddbmm(X, B, X, beta=alpha) if num_rows <= num_cols else torch.baddbmm(X, X, B, beta=alpha)
    return X


def _polynomial(A: torch.Tensor, alpha: float, beta: float, gamma: float) -> torch.Tensor:
    """αI + βA + γA²."""
    Q = torch.baddbmm(A, A, A, beta=beta, alpha=gamma)
    Q.diagonal(dim1=-2, dim2=-1).add_(alpha)
    return Q


def normalize(X_nRC: torch.Tensor, second_nL: torch.Tensor, beta2: float) -> torch.Tensor:
    """U_nRC fp32: Muon+ and NorMuon as one scale per row (R >= C) or column; updates `second_nL` in place."""
    num_rows, num_cols = X_nRC.shape[1:]
    along = -1 if num_rows >= num_cols else -2
    X_nRC = X_nRC.float()
    sum_sq = torch.linalg.vector_norm(X_nRC, dim=along).square_()
    return X_nRC * unit_scale(sum_sq, num_rows, num_cols, second_nL, beta2).unsqueeze(along)


def unit_scale(
    sum_sq: torch.Tensor, num_rows: int, num_cols: int, second_nL: torch.Tensor, beta2: float
) -> torch.Tensor:
    """Factors (n, max(R, C)) of Muon+ and NorMuon from the squares along the shorter side."""
    count = min(num_rows, num_cols)
    unit = count**0.5 / sum_sq.sum(-1, keepdim=True).sqrt_().clamp_(min=1e-6)
    mean_sq = sum_sq * unit.square() / count
    second_nL.lerp_(mean_sq, 1 - beta2)
    s = second_nL.clamp(min=1e-10).rsqrt_()
    before = (count * mean_sq.sum(-1, keepdim=True)).sqrt_()
    after = (count * (mean_sq * s.square()).sum(-1, keepdim=True)).sqrt_().clamp_(min=1e-10)
    return s.mul_(unit * before / after)


@torch.no_grad()
def muon_(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    momentum_nRC: torch.Tensor,
    second_nL: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    beta2: float,
    ns_steps: int,
    ns_dtype: torch.dtype,
    weight_decay: float,
) -> None:
    """One step in place on `weights` (list of R × C) and the two stacked states."""
    num_rows, num_cols = momentum_nRC.shape[1:]
    lr = lr * max(1.0, num_rows / num_cols) ** 0.5
    if native.ready(momentum_nRC, *weights, *grads):
        rates = lr, weight_decay
        _native(weights, grads, momentum_nRC, second_nL, momentum, beta2, ns_steps, ns_dtype, rates)
        return
    torch._foreach_lerp_(list(momentum_nRC.unbind()), grads, 1 - momentum)
    nesterov_nRC = momentum_nRC * momentum
    torch._foreach_add_(list(nesterov_nRC.unbind()), grads, alpha=1 - momentum)
    U_nRC = normalize(orthogonalize(nesterov_nRC, ns_steps, ns_dtype), second_nL, beta2)
    if weight_decay:
        # nesterov_nRC serves as scratch: W·[U∘W >= 0], decay only where the step already shrinks the weight.
        W_nRC = torch.stack(weights, out=nesterov_nRC)
        W_nRC.mul_((U_nRC * W_nRC).ge_(0))
        U_nRC.add_(W_nRC, alpha=weight_decay)
    torch._foreach_sub_(weights, list(U_nRC.unbind()), alpha=lr)


def _native(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    momentum_nRC: torch.Tensor,
    second_nL: torch.Tensor,
    momentum: float,
    beta2: float,
    ns_steps: int,
    ns_dtype: torch.dtype,
    rates: tuple[float, float],
) -> None:
    """muon_ by muon.c; rates: (learning rate, decay)."""
    n, R, C = momentum_nRC.shape
    N_nRC, row_sq_nR = torch.empty_like(momentum_nRC), momentum_nRC.new_empty(n, R)
    for grad, state, nesterov, row_sq in zip(grads, momentum_nRC, N_nRC, row_sq_nR):
        native.call("muon_momentum", grad, state, nesterov, row_sq, R, C, 1 - momentum)
    scale = row_scale(row_sq_nR.sqrt_().unsqueeze(-1)).contiguous()
    is_half = int(ns_dtype == torch.bfloat16)
    X_nRC = torch.empty_like(N_nRC, dtype=ns_dtype)
    native.call("muon_rows", N_nRC, scale, X_nRC, n * R, C, is_half)
    X_nRC, by_column = polar(X_nRC, ns_steps), int(R < C)
    sum_sq = torch.empty_like(second_nL)
    for x, sums in zip(X_nRC, sum_sq):
        native.call("muon_squares", x, sums, R, C, by_column, is_half)
    scale = unit_scale(sum_sq, R, C, second_nL, beta2).contiguous()
    for x, factors, weight in zip(X_nRC, scale, weights):
        native.call("muon_update", x, factors, weight, R, C, *rates, by_column, is_half)
    torch.autograd.graph.increment_version(weights)  # casts are made anew by it (nanochat.kernels.linear)
