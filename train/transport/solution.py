"""What a transport solver hands back, and the form its plan takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Solution:
    """Solutions of B transport problems, without gradients, in float64 on the cost's device.

    Attributes:
        cost: (B,) cost of the plan, and what the problem adds for mass that stays.
        plan: (B, N, M), sparse COO or dense, with the problem's marginals where it has some.
        u: (B, N) row potentials, for points of weight 0 as well: the cost's derivatives by the weights, up to a
            constant.
        v: (B, M) column potentials.
        gap: (B,) cost minus a lower bound of the optimum, at least 0.
        row_mass: (B, N) sums of the plan's rows; None where they are the weights.
        column_mass: (B, M) sums of its columns, likewise.
    """

    cost: torch.Tensor
    plan: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    gap: torch.Tensor
    row_mass: torch.Tensor | None = None
    column_mass: torch.Tensor | None = None


def sparse_coo(indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Sparse tensor from indices that are sorted and unique already."""
    # torch warns until someone has said whether to check; these indices need none.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True)


def plan_of_samples(
    plans: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """(B, N, M) sparse plan from each sample's indices (2, nnz), in row-major order, and masses (nnz)."""
    indices, masses = zip(*plans, strict=True)
    samples = np.repeat(np.arange(len(plans)), [len(mass) for mass in masses])
    indices = np.concatenate((samples[None], np.concatenate(indices, axis=1)))
    return sparse_coo(torch.from_numpy(indices).to(device), torch.from_numpy(np.concatenate(masses)).to(device), shape)
