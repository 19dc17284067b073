"""Arcs that an optimal plan probably uses, proposed by Sinkhorn, with arcs that make the restriction feasible."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dali_llava.modeling.sinkhorn import relative_eps
from dali_llava.train.transport.costs import cost_scale
from dali_llava.train.transport.parts import in_parts
from dali_llava.train.transport.sinkhorn import check_schedule, feasible_potentials


# With these values one or two simplex runs reach the optimum. Fewer iterations need more runs.
EPS = (0.03, 0.01, 0.003)
NUM_ITERATIONS = (5, 5, 10)
ARCS_PER_POINT = 12
# Partial sums of weights that differ by less than this are equal: rounding in sums of about a thousand terms.
SAME_MASS = 1e-12
# The smallest logarithm in the kernel. Smaller ones give denormal products, which take a hundred times longer.
_SMALLEST_LOG = -60.0
# About how many entries a quantile is estimated from.
_SAMPLE_SIZE = 2**14


@torch.no_grad()
def likely_arcs(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: Sequence[float] = EPS,
    num_iterations: Sequence[int] = NUM_ITERATIONS,
    arcs_per_point: int = ARCS_PER_POINT,
) -> torch.Tensor:
    """Selects the arcs that an optimal plan probably uses. A plan on these arcs alone exists.

    Feasible potentials from Sinkhorn give each arc a reduced cost. The arcs with the smallest reduced costs are kept,
    together with the arcs of the plan that the north-west corner rule gives [1]. Arcs from or to a point of weight 0
    are left out.

    Args:
        cost: (B, N, M), at least 0, in any unit.
        a: (B, N) weights, each row summing to 1.
        b: (B, M) weights, each row summing to 1.
        eps: entropy strengths of Sinkhorn, in mean costs of the sample, used in turn.
        num_iterations: number of Sinkhorn iterations for each eps.
        arcs_per_point: number of arcs to keep, divided by the number of points in a sample, N + M.

    Returns:
        (B, N, M) bool, True for the selected arcs.

    Raises:
        ValueError: an option is out of range.

    References:
        [1] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, section 3.4.2.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> weights = torch.tensor([[0.5, 0.5]])
        >>> likely_arcs(cost, weights, weights, arcs_per_point=1).shape
        torch.Size([1, 2, 2])
    """
    if arcs_per_point < 1:
        raise ValueError(f"arcs_per_point must be at least 1, not {arcs_per_point}")
    check_schedule(eps, num_iterations)
    rows, columns = cost.shape[1:]
    kept = []
    for own_cost, own_a, own_b in in_parts(16 * rows * columns, cost, a, b):
        coarse = (own_cost / cost_scale(own_cost)[:, None, None]).float()
        u, v = _potentials(coarse, own_a.float(), own_b.float(), eps, num_iterations)
        reduced = coarse.sub_(u[..., None]).sub_(v[:, None])
        small = _below_quantile(reduced, arcs_per_point * (rows + columns)) | _north_west(
            own_a.double(), own_b.double()
        )
        kept.append(small.logical_and_((own_a > 0)[..., None]).logical_and_((own_b > 0)[:, None]))
    return torch.cat(kept)


def _potentials(
    cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: Sequence[float], num_iterations: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feasible u (B, N) and v (B, M) near the optimum, from Sinkhorn iterations on the kernel in float32.

    An iteration takes two matrix-vector products, which are a hundred times cheaper than the exponentials of the log
    domain. The next kernel absorbs the current potentials [1], so that each of its rows and columns contains a 1.

    References:
        [1] B. Schmitzer, "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems", SIAM
            Journal on Scientific Computing, 2019, section 3.1.
    """
    u, v = feasible_potentials(cost, torch.zeros_like(b), a, b)
    for value, count in zip(eps, num_iterations, strict=True):
        # If the mean is tiny beside the largest cost, eps would round to 0.
        strength = relative_eps(cost, a, b, value).clamp(min=torch.finfo(cost.dtype).tiny)
        kernel = (u[..., None] + v[:, None]).sub_(cost).div_(strength[:, None, None])
        kernel = kernel.clamp_(min=_SMALLEST_LOG).exp_()
        column_scale = b
        for _ in range(count):
            # Row times matrix: on a CPU, torch takes ten times longer for matrix times column.
            row_scale = a / (column_scale[:, None] @ kernel.mT)[:, 0]
            column_scale = b / (row_scale[:, None] @ kernel)[:, 0]
        u, v = feasible_potentials(cost, v + strength[:, None] * column_scale.log(), a, b)
    return u, v


def _below_quantile(reduced: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N, M) bool, True for about `count` of the smallest entries of each sample."""
    columns, total = reduced.shape[2], reduced[0].numel()
    stride = max(1, total // _SAMPLE_SIZE)
    while math.gcd(stride, columns) > 1:  # otherwise it would visit some columns only
        stride += 1
    sample = reduced.flatten(1)[:, ::stride]
    threshold = sample.kthvalue(min(sample.shape[1], -(-count // stride)), dim=1).values
    return reduced <= threshold[:, None, None]


def _north_west(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, N, M) bool, True on the support of the plan that the north-west corner rule gives.

    The weights of each side, placed end to end, cover [0, 1]. A row and a column share mass where their intervals
    overlap. Intervals that only touch are included because the sums are rounded.
    """
    end_a, end_b = a.cumsum(dim=1), b.cumsum(dim=1)
    first = torch.searchsorted(end_b, end_a - a - SAME_MASS)
    behind = torch.searchsorted(end_b - b, end_a + SAME_MASS, right=True)
    column = torch.arange(b.shape[1], device=b.device)
    return (column >= first[..., None]) & (column < behind[..., None])


def smallest_places(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` smallest values of an array (n,), in any order; all of them if n is at most `count`."""
    return np.argpartition(values, count)[:count] if len(values) > count else np.arange(len(values))
