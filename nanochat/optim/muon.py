"""Muon on a stack of n equal matrices, R × C (output × input), all state fp32.

Momentum, MuonEq row scaling, Polar Express orthogonalisation, Muon+ norm, NorMuon second moment and
cautious decay. Vectors and matrices of a stack are updated by lists, so that a single process needs no
copies of weights and gradients.
"""

import torch

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
    num_rows, num_cols = N_nRC.shape[1:]
    row_norm = torch.linalg.vector_norm(N_nRC, dim=-1, keepdim=True)
    norm = torch.linalg.vector_norm(row_norm, dim=-2, keepdim=True)
    row_scale = norm / num_rows**0.5 / row_norm.clamp(min=1e-6)
    norm = torch.linalg.vector_norm(row_scale * row_norm, dim=-2, keepdim=True)
    X = N_nRC.mul_(row_scale / (1.01 * norm + 1e-6)).to(dtype)
    for alpha, beta, gamma in POLAR_EXPRESS[:ns_steps]:
        A = torch.bmm(X, X.mT) if num_rows <= num_cols else torch.bmm(X.mT, X)
        B = torch.baddbmm(A, A, A, beta=beta, alpha=gamma)
        X = torch.baddbmm(X, B, X, beta=alpha) if num_rows <= num_cols else torch.baddbmm(X, X, B, beta=alpha)
    return X


def normalize(X_nRC: torch.Tensor, second_nL: torch.Tensor, beta2: float) -> torch.Tensor:
    """U_nRC fp32: Muon+ and NorMuon as one scale per row (R >= C) or column; updates `second_nL` in place."""
    num_rows, num_cols = X_nRC.shape[1:]
    along = -1 if num_rows >= num_cols else -2
    X_nRC = X_nRC.float()
    count = X_nRC.shape[along]
    sum_sq = torch.linalg.vector_norm(X_nRC, dim=along).square_()
    unit = min(num_rows, num_cols) ** 0.5 / sum_sq.sum(-1, keepdim=True).sqrt_().clamp_(min=1e-6)
    mean_sq = sum_sq * unit.square() / count
    second_nL.lerp_(mean_sq, 1 - beta2)
    s = second_nL.clamp(min=1e-10).rsqrt_()
    before = (count * mean_sq.sum(-1, keepdim=True)).sqrt_()
    after = (count * (mean_sq * s.square()).sum(-1, keepdim=True)).sqrt_().clamp_(min=1e-10)
    return X_nRC * (s.mul_(unit * before / after)).unsqueeze(along)


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
    torch._foreach_lerp_(list(momentum_nRC.unbind()), grads, 1 - momentum)
    nesterov_nRC = momentum_nRC * momentum
    torch._foreach_add_(list(nesterov_nRC.unbind()), grads, alpha=1 - momentum)
    U_nRC = normalize(orthogonalize(nesterov_nRC, ns_steps, ns_dtype), second_nL, beta2)
    lr = lr * max(1.0, num_rows / num_cols) ** 0.5
    if weight_decay:
        # nesterov_nRC serves as scratch: W·[U∘W >= 0], decay only where the step already shrinks the weight.
        W_nRC = torch.stack(weights, out=nesterov_nRC)
        W_nRC.mul_((U_nRC * W_nRC).ge_(0))
        U_nRC.add_(W_nRC, alpha=weight_decay)
    torch._foreach_sub_(weights, list(U_nRC.unbind()), alpha=lr)
