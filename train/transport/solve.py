"""Optimal transport between point sets, as a differentiable function."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dali_llava.train.transport.background import in_background
from dali_llava.train.transport.certified import solve_certified
from dali_llava.train.transport.checks import check_point_sets, check_weights
from dali_llava.train.transport.costs import expanded_costs
from dali_llava.train.transport.exact import solve_exact
from dali_llava.train.transport.partial import solve_partial
from dali_llava.train.transport.rounding import certify
from dali_llava.train.transport.sinkhorn import solve_sinkhorn
from dali_llava.train.transport.solution import Solution, sparse_coo
from dali_llava.train.transport.unbalanced import solve_unbalanced


SOLVERS: dict[str, Callable[..., Solution]] = {
    "exact": solve_exact,
    "sinkhorn": solve_sinkhorn,
    "certified": solve_certified,
    "partial": solve_partial,
    "unbalanced": solve_unbalanced,
}
_AUTO = "auto"
# These find an optimum and prove it.
_PROVING = ("exact", "certified", "partial")
# Points a side from which "auto" takes a set for large: fewer are not worth the device's rounds of checks.
_LARGE = 192


@dataclass
class TransportResult:
    """Transport between B pairs of point sets. All but `cost` is float64 and without gradient.

    Attributes:
        cost: (B,) `<P, C>`, with "unbalanced" and its penalties; float32 or the points' dtype where that is float64.
        potentials: u (B, N) and v (B, M) with `<a, u> + <b, v> = cost - gap` and `u_i + v_j <= C_ij` wherever a point
            of the two has weight. Up to a constant they are the cost's derivatives by the weights.
        gap: (B,) cost minus a lower bound of the optimum, in the cost's unit; for a proven optimum 0, or as
            little as float64's rounding.
        solver: the solver that found it; with "auto" the one picked.
    """

    cost: torch.Tensor
    potentials: tuple[torch.Tensor, torch.Tensor]
    gap: torch.Tensor
    solver: str
    _plan: torch.Tensor

    @property
    def plan(self) -> torch.Tensor:
        """(B, N, M) sparse COO, coalesced; rows sum to a, columns to b, unless the solver leaves mass where it is."""
        return self._plan if self._plan.is_sparse else self._plan.to_sparse()


def solve_transport(
    x: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    solver: str = "exact",
    **options: Any,
) -> TransportResult:
    """Moves weights a on points x to weights b on points y at the least cost, `min_P <P, C>`, `C_ij = |x_i - y_j|^2`.

    Two solvers leave mass where it is. "partial" moves the share `mass` of the weight, at the least cost of any such
    share: its cost is `<P, C>` with `P 1 <= a`, `P^T 1 <= b`. "unbalanced" moves what is worth moving: its cost is
    `<P, C> + rho KL(P 1 | a) + rho KL(P^T 1 | b)`, rho being `relaxation` mean costs.

    The cost is differentiable, once, by the envelope theorem: `dx = 2 (diag(P 1) x - P y)`,
    `dy = 2 (diag(P^T 1) y - P^T x)`, `da = u` and `db = v`, these two less their mean, as only changes that keep the
    sum have a meaning. The rho of "unbalanced" counts as a constant. Costs and solution are computed in float64.

    Args:
        x: (B, N, D) points.
        y: (B, M, D) points.
        a: (B, N) non-negative weights, uniform by default. They are rescaled to sum to 1. A point of weight 0 is as
            good as removed.
        b: (B, M) weights, likewise.
        solver: "exact" (network simplex), "certified" (the same optimum from a few arcs that Sinkhorn picks, proven on
            all of them; meant for points on a GPU), "sinkhorn" (entropic, with its error in `gap`), "partial" (exact),
            "unbalanced" (with its error in `gap`) or "auto", which is "certified" for large sets on a GPU and "exact"
            otherwise.
        options: the solver's own, see `solve_exact`, `solve_certified`, `solve_sinkhorn`, `solve_partial` and
            `solve_unbalanced`. With "auto", those that the first two have in common.

    Raises:
        ValueError: shapes that do not match, an empty set, NaN or infinity, weights that are negative or all 0, an
            unknown solver, an option out of range; the message names the argument and the sample.
        RuntimeError: the solver found no solution; the message names the sample.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> solve_transport(x, x + 2).cost
        tensor([4.])
    """
    prepared, solver = _prepare(x, y, a, b, solver)
    return _differentiable(_solve(*(tensor.detach() for tensor in prepared), solver, options), solver, *prepared)


def start_transport(
    x: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    solver: str = "exact",
    **options: Any,
) -> Callable[[], TransportResult]:
    """Begins what `solve_transport` does, in a thread of its own, and returns at once.

    The solvers spend most of their time outside Python, so that the caller's other work goes on meanwhile. On a GPU
    the solver's part runs on a stream of its own.

    Returns:
        A function that waits for the solution and gives the same result, bit for bit, as `solve_transport`; also the
        same errors, but for those of bad input, which are raised here.
    """
    prepared, solver = _prepare(x, y, a, b, solver)
    finish = in_background(x.device, partial(_solve, *(tensor.detach() for tensor in prepared), solver, options))
    return lambda: _differentiable(finish(), solver, *prepared)


def _prepare(x, y, a, b, solver) -> tuple[tuple[torch.Tensor, ...], str]:
    """Points in float32 or float64 and weights in float64, each row summing to 1; and the solver, "auto" resolved."""
    check_solver(solver)
    check_point_sets(x, y)
    a, b = (
        points.new_full(points.shape[:2], 1 / points.shape[1], dtype=torch.float64) if weights is None else weights
        for points, weights in ((x, a), (y, b))
    )
    check_weights("a", a, x)
    check_weights("b", b, y)
    if solver == _AUTO:
        solver = _pick_solver(x.device, x.shape[1], y.shape[1])
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        a, b = (weights.double() / weights.detach().double().sum(dim=1, keepdim=True) for weights in (a, b))
        return (x.to(dtype), y.to(dtype), a, b), solver


def _solve(
    x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, solver: str, options: dict[str, Any]
) -> Solution:
    with torch.autocast(x.device.type, enabled=False):
        solve = partial(SOLVERS[solver], **options)
        return certify(solve, solver in _PROVING, x, y, expanded_costs(x, y), a, b)


def _differentiable(
    solution: Solution, solver: str, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> TransportResult:
    with torch.autocast(x.device.type, enabled=False):
        cost = _EnvelopeCost.apply(x, y, a, b, solution)
    return TransportResult(cost, (solution.u, solution.v), solution.gap, solver, solution.plan)


def check_solver(name: str) -> None:
    """Raises ValueError unless `name` is a solver's or "auto"."""
    known = (*SOLVERS, _AUTO)
    if name not in known:
        raise ValueError(f"unknown solver {name!r}; known are {', '.join(map(repr, known))}")


def _pick_solver(device: torch.device, rows: int, columns: int) -> str:
    """The faster of the two that find the optimum."""
    # Both begin with the same arcs. Checks in batches pay on a GPU, which the costs then need not leave.
    return "certified" if device.type == "cuda" and min(rows, columns) >= _LARGE else "exact"


class _EnvelopeCost(torch.autograd.Function):
    """The solution's cost (B,) with the gradients that a fixed plan and fixed potentials give."""

    @staticmethod
    def forward(ctx, x, y, a, b, solution):
        ctx.save_for_backward(x, y, a, b)
        ctx.solution = solution
        return solution.cost.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_cost):
        x, y, a, b = ctx.saved_tensors
        needs_x, needs_y, needs_a, needs_b = ctx.needs_input_grad[:4]
        solution = ctx.solution
        dx = dy = da = db = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_x or needs_y:
                rows = a if solution.row_mass is None else solution.row_mass
                columns = b if solution.column_mass is None else solution.column_mass
                arguments = (x, y, rows, columns, solution.plan, d_cost)
                dx, dy = _point_gradients(*arguments, y.mean(dim=1, keepdim=True), needs_x, needs_y)
            if solution.coarse is not None and (needs_x or needs_y):
                # float32 loses the gradients of these samples, as it loses their distances.
                x, y, *others = (tensor.index_select(0, solution.coarse).double() for tensor in arguments)
                centre = y.median(dim=1, keepdim=True).values
                for gradient, precise in zip(
                    (dx, dy), _point_gradients(x, y, *others, centre, needs_x, needs_y), strict=True
                ):
                    if gradient is not None:
                        gradient[solution.coarse] = precise.to(gradient.dtype)
            if needs_a:
                da = d_cost.double()[:, None] * _centred(solution.u, a)
            if needs_b:
                db = d_cost.double()[:, None] * _centred(solution.v, b)
        return dx, dy, da, db, None


def _point_gradients(
    x: torch.Tensor,
    y: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    plan: torch.Tensor,
    d_cost: torch.Tensor,
    centre: torch.Tensor,
    needs_x: bool,
    needs_y: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients by x (B, N, D) and y (B, M, D), for a plan with row masses (B, N) and column masses (B, M)."""
    # A shift does not change differences, and rounding errors are smaller near the origin.
    x, y = x - centre, y - centre
    dx = _pull(rows, x, plan, y, d_cost) if needs_x else None
    dy = _pull(columns, y, plan.transpose(1, 2), x, d_cost) if needs_y else None
    return dx, dy


def _pull(
    mass: torch.Tensor, x: torch.Tensor, plan: torch.Tensor, y: torch.Tensor, d_cost: torch.Tensor
) -> torch.Tensor:
    """2 d_cost (diag(mass) x - P y), (B, N, D)."""
    # In the memory of one result: they are large, and new pages take longer than the arithmetic.
    pull = mass.to(x.dtype)[..., None] * x
    return pull.sub_(_transport(plan, y)).mul_(2 * d_cost[:, None, None])


def _transport(plan: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """P y: (B, N, D) in the points' dtype, for a plan (B, N, M), sparse or dense, and points (B, M, D)."""
    if not plan.is_sparse:
        return plan.to(points.dtype) @ points
    # One matrix with the samples' plans along its diagonal: torch multiplies it in one go, and a batch of them not.
    batch, rows, columns = plan.shape
    plan = plan.coalesce()
    sample, row, column = plan.indices()
    matrix = sparse_coo(
        torch.stack((sample * rows + row, sample * columns + column)),
        plan.values().to(points.dtype),
        (batch * rows, batch * columns),
    )
    return torch.sparse.mm(matrix, points.flatten(0, 1)).unflatten(0, (batch, rows))


def _centred(potentials: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Potentials less their mean over the points that have weight."""
    counted = (weights > 0).to(potentials.dtype)
    return potentials - ((potentials * counted).sum(dim=1) / counted.sum(dim=1))[:, None]
