"""Squared distances between point sets in float64, and bounds of their rounding errors."""

from dataclasses import dataclass

import torch

from dali_llava.train.transport.parts import in_parts


# float64's unit roundoff: the largest relative error of one operation.
UNIT = torch.finfo(torch.float64).eps / 2
# Rounding operations of an entry besides the sums over the width.
_EXTRA = 8


def cost_scale(cost: torch.Tensor) -> torch.Tensor:
    """(B,) largest cost of each sample, 1 where all are 0: the unit for solvers with absolute tolerances."""
    largest = cost.amax(dim=(1, 2))
    return torch.where(largest > 0, largest, 1.0)


@dataclass
class Costs:
    """Costs `C_ij = |x_i - y_j|^2` of B problems, with a bound of each entry's rounding error.

    The error of an entry is at most `row_error_i + column_error_j + relative_error * C_ij`.

    Attributes:
        values: (B, N, M) float64.
        row_norms: (B, N) squared distances of the points x from a common centre; column_norms: (B, M) those of y.
        row_error: (B, N); column_error: (B, M); relative_error: one number for all entries.
    """

    values: torch.Tensor
    row_norms: torch.Tensor
    column_norms: torch.Tensor
    row_error: torch.Tensor
    column_error: torch.Tensor
    relative_error: float


def expanded_costs(x: torch.Tensor, y: torch.Tensor) -> Costs:
    """Costs by the expansion `|x|^2 + |y|^2 - 2 x y` of the centred points: one matrix product.

    The rounding error grows with the squared distance from the centre, which is the mean of y. The bound follows from
    the error of a dot product of width D, D u |x||y| / (1 - D u) with the unit roundoff u [1].

    Args:
        x: (B, N, D) points.
        y: (B, M, D) points.

    References:
        [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", second edition, SIAM, 2002, section 3.1.
    """
    width = x.shape[2]
    distances = x.new_empty((*x.shape[:2], y.shape[1]), dtype=torch.float64)
    row_norms, column_norms = [], []
    for part in in_parts(8 * (x[0].numel() + y[0].numel()), x, y, distances):
        own_x, own_y = part[0].double(), part[1].double()
        centre = own_y.mean(dim=1, keepdim=True)
        own_x, own_y = own_x - centre, own_y - centre
        row_norms.append(own_x.square().sum(dim=2))
        column_norms.append(own_y.square().sum(dim=2))
        norms = row_norms[-1][..., None] + column_norms[-1][:, None]
        torch.baddbmm(norms, own_x, own_y.mT, alpha=-2, out=part[2]).clamp_(min=0)
    row_norms, column_norms = torch.cat(row_norms), torch.cat(column_norms)
    # The norms and the product contribute width * u each, the product up to |x|^2 + |y|^2 by 2 |x||y|.
    error = (2 * width + 2 * _EXTRA) * UNIT
    return Costs(distances, row_norms, column_norms, error * row_norms, error * column_norms, 0.0)


def direct_costs(x: torch.Tensor, y: torch.Tensor) -> Costs:
    """Costs from the differences of all pairs of points: slower, with a small relative error wherever the points lie.

    Args:
        x: (B, N, D) points.
        y: (B, M, D) points.
    """
    x, y = x.double(), y.double()
    values = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    # A median, unlike a mean, stays near the other points when one point lies far away.
    centre = y.median(dim=1, keepdim=True).values
    row_norms, column_norms = ((points - centre).square().sum(dim=2) for points in (x, y))
    none = torch.zeros_like(row_norms), torch.zeros_like(column_norms)
    return Costs(values, row_norms, column_norms, *none, (x.shape[2] + _EXTRA) * UNIT)
