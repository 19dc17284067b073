"""Which arcs an optimal plan may use: a guess from Sinkhorn, and the few that make any restriction feasible."""

import math
from collections.abc import Sequence

import torch

from dali_llava.modeling.sinkhorn import relative_eps
from dali_llava.train.transport.parts import in_parts
from dali_llava.train.transport.sinkhorn import feasible_potentials


# Good enough a guess that one or two simplex runs on its arcs end at the optimum; less of it costs more runs.
EPS = (0.03, 0.01, 0.003)
NUM_ITERATIONS = (5, 5, 10)
ARCS_PER_POINT = 12
# How far, in mass, two partial sums may lie apart and yet count as equal: rounding in sums of some thousand terms.
SAME_MASS = 1e-12
# The kernel's smallest logarithm. Beyond, products would be denormal numbers, and these take a hundred times longer.
_FAINTEST = -60.0
# A quantile is read off about so many entries.
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
    """(B, N, M) bool, True for the arcs that an optimal plan likely uses; a plan on them alone exists.

    Sinkhorn's potentials, made feasible, give each arc a reduced cost; the smallest of a sample's are kept, with the
    arcs of the plan that fills row after row from column after column. No arc from or to a point of weight 0.

    Args:
        cost: (B, N, M), at least 0, in any unit.
        a: (B, N) weights, each row summing to 1.
        b: (B, M) weights, likewise.
        eps, num_iterations: of Sinkhorn, strengths in mean costs of the sample, one after the other.
        arcs_per_point: how many arcs are kept, in points of a sample.

    Raises:
        ValueError: an option out of range.
    """
    if arcs_per_point < 1:
        raise ValueError(f"arcs_per_point must be at least 1, not {arcs_per_point}")
    if not eps or len(eps) != len(num_iterations):
        raise ValueError(f"eps and num_iterations must be of one length, not {len(eps)} and {len(num_iterations)}")
    if not all(value > 0 for value in eps):
        raise ValueError(f"eps must be positive, not {tuple(eps)}")
    rows, columns = cost.shape[1:]
    kept = []
    for own_cost, own_a, own_b in in_parts(16 * rows * columns, cost, a, b):
        largest = own_cost.amax(dim=(1, 2), keepdim=True)
        coarse = (own_cost / torch.where(largest > 0, largest, 1.0)).float()
        u, v = _potentials(coarse, own_a.float(), own_b.float(), eps, num_iterations)
        reduced = coarse.sub_(u[..., None]).sub_(v[:, None])
        small = _smallest(reduced, arcs_per_point * (rows + columns)) | _north_west(own_a.double(), own_b.double())
        kept.append(small.logical_and_((own_a > 0)[..., None]).logical_and_((own_b > 0)[:, None]))
    return torch.cat(kept)


def _potentials(
    cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: Sequence[float], num_iterations: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feasible u (B, N) and v (B, M) near the optimum, by Sinkhorn on the kernel itself, in float32.

    An iteration is two products of a matrix and a vector, which cost a hundredth of the log domain's exponentials. The
    potentials found so far are absorbed into the next kernel (Schmitzer, 2019, section 3.1), so that each row and
    column of it holds a 1.
    """
    u, v = feasible_potentials(cost, torch.zeros_like(b), a, b)
    for value, count in zip(eps, num_iterations, strict=True):
        # A mean that vanishes beside the largest cost would round eps to 0.
        strength = relative_eps(cost, a, b, value).clamp(min=torch.finfo(cost.dtype).tiny)
        kernel = (u[..., None] + v[:, None]).sub_(cost).div_(strength[:, None, None])
        kernel = kernel.clamp_(min=_FAINTEST).exp_()
        column_scale = b
        for _ in range(count):
            # A row times a matrix: torch takes ten times longer on a CPU for a matrix times a column.
            row_scale = a / (column_scale[:, None] @ kernel.mT)[:, 0]
            column_scale = b / (row_scale[:, None] @ kernel)[:, 0]
        u, v = feasible_potentials(cost, v + strength[:, None] * column_scale.log(), a, b)
    return u, v


def _smallest(reduced: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N, M) bool, True for about `count` smallest entries of each sample."""
    columns, total = reduced.shape[2], reduced[0].numel()
    stride = max(1, total // _SAMPLE_SIZE)
    while math.gcd(stride, columns) > 1:  # or it would look at some columns only
        stride += 1
    sample = reduced.flatten(1)[:, ::stride]
    threshold = sample.kthvalue(min(sample.shape[1], -(-count // stride)), dim=1).values
    return reduced <= threshold[:, None, None]


def _north_west(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, N, M) bool, True on the support of the plan that fills row after row from column after column.

    Laid end to end, the weights of either side cover [0, 1], and a row and a column share mass where their stretches
    overlap. Stretches that only touch count too, for the sums are rounded.
    """
    end_a, end_b = a.cumsum(dim=1), b.cumsum(dim=1)
    first = torch.searchsorted(end_b, end_a - a - SAME_MASS)
    behind = torch.searchsorted(end_b - b, end_a + SAME_MASS, right=True)
    column = torch.arange(b.shape[1], device=b.device)
    return (column >= first[..., None]) & (column < behind[..., None])
