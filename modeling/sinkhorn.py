"""Batched entropic optimal transport with Sinkhorn iterations in the log domain."""

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
    """Computes dual potentials of `min <P, C> + eps KL(P | a b^T)` over plans P with marginals a and b [1].

    Each iteration [2] updates the row potentials, then the column potentials. The column marginal of the plan is exact
    after each iteration, the row marginal in the limit. The result has no gradient.

    Args:
        cost: (B, N, M), float32 or float64.
        a: (B, N) weights, non-negative, each row summing to 1. Points of weight 0 have no influence.
        b: (B, M) weights, non-negative, each row summing to 1.
        eps: entropy strength in the unit of the costs, a number or (B,); see `relative_eps`.
        num_iterations: number of iterations, at least 1.
        v: (B, M) initial column potentials; zeros by default.

    Returns:
        u (B, N) and v (B, M), in the unit of the costs.

    Raises:
        ValueError: num_iterations is below 1, or a number eps is not positive.

    References:
        [1] M. Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS, 2013, section 3.
        [2] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, section 4.4.

    Example:
        >>> import torch
        >>> cost, weights = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.full((1, 2), 0.5)
        >>> u, v = sinkhorn_potentials(cost, weights, weights, eps=0.1, num_iterations=20)
        >>> (u[..., None] + v[:, None])[0, 0, 0].item() < 0.1
        True
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, not {num_iterations}")
    eps = _per_sample(eps, cost)
    log_a, log_b = a.log(), b.log()
    # In units of eps, an iteration takes two additions and two reductions.
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
    """Computes the logarithm of the plan for given potentials: `u_i + v_j - C_ij` over eps, plus `log a_i b_j` [1].

    Args:
        cost: (B, N, M), float32 or float64.
        a: (B, N) weights; b: (B, M) weights.
        eps: entropy strength in the unit of the costs, a number or (B,).
        u: (B, N) row potentials, in the unit of the costs; v: (B, M) column potentials.

    Returns:
        (B, N, M) logarithm of the plan; -inf where a weight is 0. The result has no gradient.

    Raises:
        ValueError: a number eps is not positive.

    References:
        [1] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, section 4.4.

    Example:
        >>> import torch
        >>> cost, weights = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.full((1, 2), 0.5)
        >>> u, v = sinkhorn_potentials(cost, weights, weights, eps=0.1, num_iterations=20)
        >>> sinkhorn_log_plan(cost, weights, weights, 0.1, u, v).exp().sum(dim=1)
        tensor([[0.5000, 0.5000]])
    """
    eps = _per_sample(eps, cost)
    scores = (u / eps + a.log())[..., None] + (v / eps + b.log())[:, None]
    return scores - cost / eps[..., None]


def relative_eps(cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: float) -> torch.Tensor:
    """Computes an entropy strength relative to the costs: eps times the mean cost under `a b^T`.

    Args:
        cost: (B, N, M).
        a: (B, N) weights; b: (B, M) weights.
        eps: strength in mean costs of the sample.

    Returns:
        (B,) strength in the unit of the costs; 1 where all costs are 0.

    Example:
        >>> import torch
        >>> weights = torch.full((1, 2), 0.5)
        >>> relative_eps(torch.tensor([[[0.0, 20.0], [20.0, 0.0]]]), weights, weights, eps=0.1)
        tensor([1.])
    """
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
    """Computes the logarithm of `Q = argmax <Q, S> + eps H(Q)` over plans with marginals a and b [1].

    Args:
        similarity: S, (B, N, M); half precision is computed in float32.
        a: (B, N) weights, each row summing to 1; uniform by default. Tokens of weight 0 have no influence.
        b: (B, M) weights, each row summing to 1; uniform by default.
        eps: entropy strength in the unit of the similarity.
        num_iterations: number of Sinkhorn iterations, at least 1.

    Returns:
        (B, N, M) logarithm of the assignment; -inf where a weight is 0. The result has no gradient.

    Raises:
        ValueError: eps is not positive, or num_iterations is below 1.

    References:
        [1] K. Rho, H. Lee, V. Iverson and J. S. Chung, "LAVCap: LLM-based Audio-Visual Captioning using Optimal
            Transport", ICASSP, 2025, equations 2 and 3.

    Example:
        >>> import torch
        >>> assignment = log_assignment(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).exp()
        >>> assignment.round(decimals=3)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    cost = -similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    a = cost.new_full(cost.shape[:2], 1 / cost.shape[1]) if a is None else a.to(cost.dtype)
    b = cost.new_full((cost.shape[0], cost.shape[2]), 1 / cost.shape[2]) if b is None else b.to(cost.dtype)
    u, v = sinkhorn_potentials(cost, a, b, eps, num_iterations)
    return sinkhorn_log_plan(cost, a, b, eps, u, v)


def _per_sample(eps: float | torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """eps as (B, 1) or (1, 1). A number is checked; a tensor is not."""
    if not isinstance(eps, torch.Tensor):
        if not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
        return cost.new_full((1, 1), eps)
    return eps.to(cost.dtype)[:, None]
