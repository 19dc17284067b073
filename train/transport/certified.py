"""Exact transport on few of the arcs: Sinkhorn proposes them, a sparse simplex solves on them, all arcs confirm."""

from collections.abc import Sequence

import numpy as np
import torch

from dali_llava.train.transport.exact import ROUNDING, in_threads, solve_exact
from dali_llava.train.transport.sinkhorn import anneal, feasible_potentials
from dali_llava.train.transport.solution import Solution, plan_of_samples


# A plan is accepted when its cost exceeds the lower bound by no more than this share of itself. Rounding alone is some
# ten thousand times less, unless the cost is tiny beside the largest distance.
_TOLERANCE = 1e-10
# Reduced costs above this, in largest costs, count as not negative. The simplex's own threshold lies near it.
_VIOLATION = -1e-14
# How far, in mass, two partial sums may lie apart and yet count as equal: rounding in sums of some thousand terms.
_SAME_MASS = 1e-12


def solve_certified(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    num_threads: int | None = None,
    max_iterations: int = 10_000_000,
    eps: Sequence[float] = (0.1, 0.03, 0.01),
    num_iterations: Sequence[int] = (20, 20, 40),
    arcs_per_point: int = 16,
    rounds: int = 6,
) -> Solution:
    """The optimum, as `solve_exact` finds it, from a few per cent of the arcs, and proven on all of them.

    Sinkhorn's potentials, made feasible, give each arc a reduced cost. The smallest of these in each row and column
    are kept, with the arcs of one feasible plan, and the network simplex runs on them. Its potentials are then checked
    on every arc in float64; arcs that they violate are added, and the simplex runs again. A problem that is not proven
    after some rounds goes to `solve_exact`. All but the simplex runs on the cost's device.

    Args:
        cost: (B, N, M) float64, finite.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are taken out.
        b: (B, M) float64 weights, likewise.
        num_threads: how many problems are solved at a time; by default this process's share of the cores it may use.
        max_iterations: of the simplex, for one problem and round.
        eps: Sinkhorn's strengths of the entropy, in mean costs of the sample, one after the other.
        num_iterations: how many iterations each eps gets.
        arcs_per_point: how many arcs each row and each column proposes, at first and in every round.
        rounds: how often the sparse simplex may run; 0 leaves all to `solve_exact`.

    Returns:
        Solution with a sparse plan. `gap` is the cost less the bound that the potentials give, at most 1e-10 of the
        cost or, for a cost that is tiny beside the sample's largest distance, 1e-12 of that.

    Raises:
        ValueError: an option out of range.
        RuntimeError: `solve_exact`, too, found no optimum; the message names the sample.
    """
    if arcs_per_point < 1 or rounds < 0:
        raise ValueError(f"arcs_per_point must be at least 1 and rounds 0, not {arcs_per_point} and {rounds}")
    batch, rows, columns = cost.shape
    # POT's tolerances are absolute, hence costs in [0, 1].
    largest = cost.amax(dim=(1, 2))
    scale = torch.where(largest > 0, largest, 1.0)
    scaled = cost / scale[:, None, None]
    _, v, _ = anneal(scaled.float(), a.float(), b.float(), eps, num_iterations)
    u, v = feasible_potentials(scaled, v.double(), a, b)
    kept = _north_west(a, b) | _smallest(scaled - u[..., None] - v[:, None], arcs_per_point)
    kept &= _weighted(a, b)

    value, gap = scaled.new_zeros(batch), scaled.new_zeros(batch)
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
        added = _smallest(reduced, arcs_per_point) & (reduced < _VIOLATION)
        grows = added.flatten(1).any(dim=1)
        proven = (of_gap <= _TOLERANCE * of_value) | (~grows & (of_gap <= ROUNDING))
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


def _north_west(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, N, M) bool, True on the support of the plan that fills row after row from column after column.

    It keeps the restricted problem feasible. Laid end to end, the weights of either side cover [0, 1], and a row and a
    column share mass where their stretches overlap. Stretches that only touch count too, for the sums are rounded.
    """
    end_a, end_b = a.cumsum(dim=1), b.cumsum(dim=1)
    start_a, start_b = end_a - a, end_b - b
    overlap = torch.minimum(end_a[..., None], end_b[:, None]) - torch.maximum(start_a[..., None], start_b[:, None])
    return overlap >= -_SAME_MASS


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
    import ot  # takes a second to import, and most of the package has no use for it
    from scipy.sparse import coo_array

    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    # The two must have the same sum to the last digit.
    mass_a, mass_b = a[rows] / a.sum(), b[columns] / b.sum()
    place_a, place_b = np.cumsum(a > 0) - 1, np.cumsum(b > 0) - 1
    restricted = coo_array((costs, (place_a[row], place_b[column])), shape=(len(rows), len(columns)))
    plan, log = ot.emd(mass_a, mass_b, restricted, numItermax=max_iterations, log=True, center_dual=False)
    source, target, masses = plan.row, plan.col, plan.data
    order = np.lexsort((target, source))
    order = order[masses[order] > 0]
    source, target, masses = source[order], target[order], masses[order]

    # POT hands back a cheap plan that does not move everything where it finds none. Its result code says so; this
    # makes sure, for the lower bound cannot tell such a plan from a bad one.
    astray = max(
        np.abs(np.bincount(source, masses, len(rows)) - mass_a).max(),
        np.abs(np.bincount(target, masses, len(columns)) - mass_b).max(),
    )
    failed = log["warning"] is not None or not astray < _SAME_MASS
    u, v = np.zeros(len(a)), np.zeros(len(b))
    value = 0.0
    if not failed:
        u[rows], v[columns] = log["u"], log["v"]
        value = masses @ restricted.tocsr()[source, target]
    return np.concatenate(([failed, value], u, v)), (np.stack((rows[source], columns[target])), masses)
