"""Exact transport on few of the arcs: Sinkhorn proposes them, a sparse simplex solves on them, all arcs confirm."""

from collections.abc import Sequence

import numpy as np
import torch

from dali_llava.train.transport.arcs import ARCS_PER_POINT, EPS, likely_arcs
from dali_llava.train.transport.exact import ROUNDING, TOLERANCE, VIOLATION, solve_exact
from dali_llava.train.transport.simplex import NoPlanError, in_threads, sparse_simplex
from dali_llava.train.transport.sinkhorn import feasible_potentials
from dali_llava.train.transport.solution import Solution, plan_of_samples


def solve_certified(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    num_threads: int | None = None,
    max_iterations: int = 10_000_000,
    eps: Sequence[float] = EPS,
    num_iterations: Sequence[int] = (10, 10, 20),
    arcs_per_point: int = ARCS_PER_POINT,
    rounds: int = 6,
) -> Solution:
    """The optimum as `solve_exact` finds it, but only the simplex runs on the CPU, on a few per cent of the arcs.

    The network simplex gets the arcs of `likely_arcs`. Its potentials are then checked on every arc in float64; arcs
    that they violate are added, and the simplex runs again. A problem that is not proven after some rounds goes to
    `solve_exact`. All but the simplex is batched, on the cost's device.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are taken out.
        b: (B, M) float64 weights, likewise.
        num_threads: how many problems are solved at a time; by default this process's share of the cores it may use.
        max_iterations: of the simplex, for one problem and round.
        eps: Sinkhorn's strengths of the entropy, in mean costs of the sample, one after the other.
        num_iterations: how many iterations each eps gets; more than `solve_exact` takes, for a GPU has them for less
            than another round of the simplex.
        arcs_per_point: how many arcs are proposed, in points of a sample; as many a row and a column are added.
        rounds: how often the sparse simplex may run; 0 leaves all to `solve_exact`.

    Returns:
        Solution with a sparse plan. `gap` is the cost less the bound that the potentials give, at most 1e-10 of the
        cost or, for a cost that is tiny beside the sample's largest distance, 1e-12 of that.

    Raises:
        ValueError: an option out of range.
        RuntimeError: `solve_exact`, too, found no optimum; the message names the sample.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, not {rounds}")
    batch, rows, columns = cost.shape
    # POT's tolerances are absolute, hence costs in [0, 1].
    largest = cost.amax(dim=(1, 2))
    scale = torch.where(largest > 0, largest, 1.0)
    scaled = cost / scale[:, None, None]
    kept = likely_arcs(scaled, a, b, eps, num_iterations, arcs_per_point)

    value, gap = scaled.new_zeros(batch), scaled.new_zeros(batch)
    u, v = torch.zeros_like(a), torch.zeros_like(b)
    plans: list[tuple[np.ndarray, np.ndarray] | None] = [None] * batch
    open_samples = torch.arange(batch, device=cost.device)
    unproven = []
    for _ in range(rounds):
        if not len(open_samples):
            break
        of_cost, of_a, of_b = scaled[open_samples], a[open_samples], b[open_samples]
        solved = _solve_restricted(of_cost, of_a, of_b, kept[open_samples], num_threads, max_iterations)
        numbers, found = zip(*solved, strict=True)
        numbers = torch.from_numpy(np.stack(numbers)).to(cost.device)
        failed, of_value, simplex_u, simplex_v = numbers.split([1, 1, rows, columns], dim=1)
        of_u, of_v = feasible_potentials(of_cost, simplex_v, of_a, of_b)
        of_value = of_value[:, 0]
        of_gap = of_value - (of_a * of_u).sum(dim=1) - (of_b * of_v).sum(dim=1)

        reduced = of_cost - simplex_u[..., None] - simplex_v[:, None]
        reduced.masked_fill_(~_weighted(of_a, of_b) | kept[open_samples], torch.inf)
        added = _smallest(reduced, arcs_per_point) & (reduced < VIOLATION)
        grows = added.flatten(1).any(dim=1)
        proven = (of_gap <= TOLERANCE * of_value) | (~grows & (of_gap <= ROUNDING))
        # A cost below the bound is no optimum's, and a plan that the simplex could not finish has no cost.
        sound = (failed[:, 0] == 0) & (of_gap >= -ROUNDING)

        done = proven & sound
        value[open_samples[done]], gap[open_samples[done]] = of_value[done], of_gap[done].clamp(min=0)
        u[open_samples[done]], v[open_samples[done]] = of_u[done], of_v[done]
        for sample, plan, ready in zip(open_samples.tolist(), found, done.tolist(), strict=True):
            if ready:
                plans[sample] = plan
        again = ~done & sound & grows
        unproven += open_samples[~done & ~again].tolist()
        kept[open_samples[again]] |= added[again]
        open_samples = open_samples[again]

    unproven = sorted(unproven + open_samples.tolist())
    value, gap, u, v = value * scale, gap * scale, u * scale[:, None], v * scale[:, None]
    if unproven:
        dense = solve_exact(
            cost[unproven], a[unproven], b[unproven], num_threads, max_iterations, sample_names=unproven
        )
        value[unproven], gap[unproven], u[unproven], v[unproven] = dense.cost, dense.gap, dense.u, dense.v
        position, *arcs = dense.plan.indices().cpu().numpy()
        masses = dense.plan.values().cpu().numpy()
        for i, sample in enumerate(unproven):
            plans[sample] = np.stack(arcs)[:, position == i], masses[position == i]
    return Solution(value, plan_of_samples(plans, cost.shape, cost.device), u, v, gap)


def _weighted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, N, M) bool, True for arcs between points that have weight."""
    return (a > 0)[..., None] & (b > 0)[:, None]


def _smallest(reduced: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N, M) bool, True for the `count` smallest of each row and of each column."""
    chosen = torch.zeros_like(reduced, dtype=torch.bool)
    for dim in (1, 2):
        indices = reduced.topk(min(count, reduced.shape[dim]), dim=dim, largest=False, sorted=False).indices
        chosen.scatter_(dim, indices, True)
    return chosen


def _solve_restricted(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    kept: torch.Tensor,
    num_threads: int | None,
    max_iterations: int,
) -> list[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """For each sample, what `_solve_one` hands back. Only the kept arcs leave the device."""
    sample, row, column = kept.nonzero(as_tuple=True)
    ends = np.cumsum(kept.sum(dim=(1, 2)).cpu().numpy())[:-1]
    arcs = [np.split(values.cpu().numpy(), ends) for values in (row, column, cost[sample, row, column])]
    a, b = a.cpu().numpy(), b.cpu().numpy()

    def solve(i: int):
        return _solve_one(a[i], b[i], *(values[i] for values in arcs), max_iterations)

    return in_threads(solve, len(a), num_threads)


def _solve_one(
    a: np.ndarray, b: np.ndarray, row: np.ndarray, column: np.ndarray, costs: np.ndarray, max_iterations: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Failure (0 or 1), cost, u and v in one vector (2 + N + M); the plan's indices (2, nnz) and masses (nnz).

    Args:
        a: (N,) weights; b: (M,) weights.
        row: (arcs,) source of each arc; column: its target; costs: its cost in [0, 1].
    """
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    place_a, place_b = np.cumsum(a > 0) - 1, np.cumsum(b > 0) - 1
    u, v = np.zeros(len(a)), np.zeros(len(b))
    try:
        # The two weights must have the same sum to the last digit.
        solution = sparse_simplex(
            (place_a[row], place_b[column], costs), a[rows] / a.sum(), b[columns] / b.sum(), max_iterations
        )
    except NoPlanError:
        return np.concatenate(([1.0, 0.0], u, v)), (np.zeros((2, 0), dtype=np.int64), np.zeros(0))
    u[rows], v[columns] = solution.u, solution.v
    indices = np.stack((rows[solution.indices[0]], columns[solution.indices[1]]))
    return np.concatenate(([0.0, solution.cost], u, v)), (indices, solution.masses)
