"""Entropic optimal transport by Sinkhorn's iterations in the log domain, batched."""

import torch


@torch.no_grad()
def sinkhorn_potentials(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: float | torch.Tensor,
    num_iterations: int,
    v: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dual potentials of `min <P, C> + eps KL(P | a b^T)` over plans P with marginals a and b (Cuturi, 2013).

    Each iteration sets the row potentials, then the column potentials, so that the columns' marginal holds exactly at
    the end and the rows' in the limit. No gradient runs through it.

    Args:
        cost: (B, N, M), float32 or float64.
        a: (B, N) weights, non-negative, each row summing to 1. Points of weight 0 have no influence.
        b: (B, M) weights, likewise.
        eps: strength of the entropy in the cost's unit, a number or (B,); see `relative_eps`.
        num_iterations: how many iterations, at least 1.
        v: (B, M) column potentials to start from; zeros by default.

    Returns:
        u (B, N) and v (B, M), in the cost's unit.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, not {num_iterations}")
    eps = _per_sample(eps, cost)
    log_a, log_b = a.log(), b.log()
    # All of it in units of eps, so that an iteration is two additions and two reductions.
    kernel = cost / -eps[..., None]
    g = torch.zeros_like(b) if v is None else v / eps
    for _ in range(num_iterations):
        f = -torch.logsumexp(kernel + (g + log_b)[:, None], dim=2)
        g = -torch.logsumexp(kernel + (f + log_a)[..., None], dim=1)
    return f * eps, g * eps


@torch.no_grad()
def sinkhorn_log_plan(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: float | torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Logarithm (B, N, M) of the plan that potentials u and v stand for; -inf where a weight is 0."""
    eps = _per_sample(eps, cost)
    scores = (u / eps + a.log())[..., None] + (v / eps + b.log())[:, None]
    return scores - cost / eps[..., None]


def relative_eps(cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: float) -> torch.Tensor:
    """eps (B,) times the mean cost under a b^T, for costs whose scale is not known. 1 where all costs are 0."""
    mean = (a[:, None] @ cost @ b[..., None])[:, 0, 0]
    return torch.where(mean > 0, eps * mean, torch.ones_like(mean))


@torch.no_grad()
def log_assignment(
    similarity: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    eps: float = 0.1,
    num_iterations: int = 50,
) -> torch.Tensor:
    """Logarithm of `Q = argmax <Q, S> + eps H(Q)` over plans with marginals a and b (LAVCap, equations 2 and 3).

    Args:
        similarity: S, (B, N, M); half precision is computed in float32.
        a: (B, N) weights, each row summing to 1; uniform by default. Weight 0 takes a token out.
        b: (B, M) weights, likewise.
        eps: strength of the entropy in the similarity's unit.
        num_iterations: Sinkhorn iterations.

    Returns:
        (B, N, M); -inf where a weight is 0. No gradient runs through it.
    """
    cost = -similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    a = cost.new_full(cost.shape[:2], 1 / cost.shape[1]) if a is None else a.to(cost.dtype)
    b = cost.new_full((cost.shape[0], cost.shape[2]), 1 / cost.shape[2]) if b is None else b.to(cost.dtype)
    u, v = sinkhorn_potentials(cost, a, b, eps, num_iterations)
    return sinkhorn_log_plan(cost, a, b, eps, u, v)


def _per_sample(eps: float | torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """eps as (B, 1) or (1, 1), checked if it is a number."""
    if not isinstance(eps, torch.Tensor):
        if not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
        return cost.new_full((1, 1), eps)
    return eps.to(cost.dtype)[:, None]
