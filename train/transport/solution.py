"""The result of a transport solver, and the form of its plan."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch


@dataclass
class Solution:
    """Solutions of B transport problems, without gradients, in float64 on the cost's device.

    Attributes:
        cost: (B,) cost of the plan, including penalties.
        plan: (B, N, M), sparse COO or dense, with the problem's marginals where it has some.
        u: (B, N) row potentials, also of points of weight 0: the derivatives of the cost by the weights, up to a
            constant.
        v: (B, M) column potentials.
        gap: (B,) cost minus a lower bound of the optimum, at least 0.
        row_mass: (B, N) sums of the plan's rows; None where they are the weights.
        column_mass: (B, M) sums of its columns; None where they are the weights.
        coarse: (K,) samples in which rounding errors are large beside the cost; None where there are none.
    """

    cost: torch.Tensor
    plan: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    gap: torch.Tensor
    row_mass: torch.Tensor | None = None
    column_mass: torch.Tensor | None = None
    coarse: torch.Tensor | None = None


def sparse_coo(indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Sparse tensor from sorted, unique indices."""
    # torch warns unless told whether to check the indices; these need no check.
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


def merge_solutions(whole: Solution, samples: Sequence[int], parts: Sequence[Solution]) -> Solution:
    """`whole` with the solutions of some samples replaced.

    Args:
        whole: of B problems.
        samples: distinct places in the batch, in rising order.
        parts: one solution of one problem (B = 1) for each sample.
    """
    places = torch.tensor(samples, device=whole.cost.device)
    merged = {}
    for field in fields(Solution):
        values = [getattr(part, field.name) for part in parts]
        if field.name not in ("plan", "coarse") and values[0] is not None:
            merged[field.name] = getattr(whole, field.name).index_copy(0, places, torch.cat(values))
    if whole.plan.is_sparse:
        plans = [part.plan.coalesce() for part in parts]
        moved = [plan.indices().clone() for plan in plans]
        for sample, indices in zip(samples, moved, strict=True):
            indices[0] = sample
        kept = ~torch.isin(whole.plan.indices()[0], places)
        indices = torch.cat((whole.plan.indices()[:, kept], *moved), dim=1)
        masses = torch.cat((whole.plan.values()[kept], *(plan.values() for plan in plans)))
        # Stable, so that each sample's entries keep their row-major order.
        order = indices[0].argsort(stable=True)
        plan = sparse_coo(indices[:, order], masses[order], whole.plan.shape)
    else:
        plan = whole.plan.index_copy(0, places, torch.cat([part.plan for part in parts]))
    return replace(whole, **merged, plan=plan)
