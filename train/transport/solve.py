"""Optimal transport between point sets, as a differentiable function."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

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
# Number of points per side from which "auto" uses "certified" on a GPU. Smaller sets do not repay the checks there.
_LARGE_ON_GPU = 192


@dataclass
class TransportResult:
    """Transport between B pairs of point sets. All fields but `cost` are float64 and have no gradient.

    Attributes:
        cost: (B,) `<P, C>`, with the penalties of "unbalanced"; float64 if the points are, otherwise float32.
        potentials: u (B, N) and v (B, M) with `u_i + v_j <= C_ij` wherever one of the two points has weight, and
            `<a, u> + <b, v> = cost - gap`, both up to rounding. Up to a constant they are the derivatives of the cost
            by the weights.
        gap: (B,) certified upper minus lower bound of the optimum, in the unit of the cost. It includes the rounding
            errors of float64, not those of a cost that is returned in float32. 0 means that the optimum is proven to
            twelve digits.
        solver: the solver that was used; with "auto", the one chosen.
    """

    cost: torch.Tensor
    potentials: tuple[torch.Tensor, torch.Tensor]
    gap: torch.Tensor
    solver: str
    _plan: torch.Tensor

    @property
    def plan(self) -> torch.Tensor:
        """(B, N, M) sparse COO, coalesced. Rows sum to a and columns to b, except with "partial" and "unbalanced"."""
        return self._plan if self._plan.is_sparse else self._plan.to_sparse()


def solve_transport(
    x: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    solver: str = "exact",
    **options: Any,
) -> TransportResult:
    """Moves weights a on points x to weights b on points y at minimal cost [1].

    The cost is `min_P <P, C>` with `C_ij = |x_i - y_j|^2`.

    Two solvers do not move all mass. "partial" moves the share `mass` of the weight that is cheapest to move: its cost
    is `<P, C>` with `P 1 <= a`, `P^T 1 <= b`. "unbalanced" penalizes mass that appears or vanishes: its cost is
    `<P, C> + rho KL(P 1 | a) + rho KL(P^T 1 | b)`, where rho is `relaxation` times the mean cost.

    The cost has first derivatives, by the envelope theorem: `dx = 2 (diag(P 1) x - P y)`,
    `dy = 2 (diag(P^T 1) y - P^T x)`, `da = u` and `db = v`. The last two are centred, because only changes that keep
    the sum of the weights are possible. The rho of "unbalanced" is a constant to the derivatives. Costs and solutions
    are computed in float64. Where rounding leaves fewer than nine digits of the cost, as beside a point that lies far
    from the others, the sample is solved again with costs from the differences of all points.

    Args:
        x: (B, N, D) points.
        y: (B, M, D) points.
        a: (B, N) non-negative weights, uniform by default. They are rescaled to sum to 1. Points of weight 0 have no
            influence.
        b: (B, M) non-negative weights, treated in the same way.
        solver: "exact" (network simplex), "certified" (the same optimum from a few arcs that Sinkhorn proposes, proven
            on all arcs; for points on a GPU), "sinkhorn" (entropic, with its error in `gap`), "partial" (exact),
            "unbalanced" (with its error in `gap`) or "auto", which is "certified" for large sets on a GPU and "exact"
            otherwise.
        options: passed to the solver, see `solve_exact`, `solve_certified`, `solve_sinkhorn`, `solve_partial` and
            `solve_unbalanced`. With "auto", options that the first two share.

    Returns:
        TransportResult with the cost, the plan, the potentials and the gap of each sample.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: shapes do not match, a set is empty, a value is NaN or infinite, weights are negative or all 0, the
            solver is unknown, or an option is out of range; the message names the argument and the sample.
        RuntimeError: the solver finds no solution; the message names the sample.

    References:
        [1] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, equations 2.11 and 2.20.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[0.0], [1.0]]], requires_grad=True)
        >>> result = solve_transport(x, torch.tensor([[[2.0], [3.0]]]))
        >>> result.cost.item(), result.gap.item()
        (4.0, 0.0)
        >>> result.cost.sum().backward()
        >>> x.grad[0, :, 0]
        tensor([-2., -2.])
    """
    problem = pose_transport(x, y, a, b, solver, **options)
    return problem.result(problem.solve())


@dataclass
class TransportProblem:
    """Transport between B pairs of point sets, in the steps of `solve_transport`.

    `solve` needs no gradient, so that it can run in another thread while the caller does other work.

    Attributes:
        x: (B, N, D) points, float32 or float64.
        y: (B, M, D) points.
        a: (B, N) float64 weights, each row summing to 1.
        b: (B, M) float64 weights, each row summing to 1.
        solver: name of the solver.
        options: options of the solver.
    """

    x: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    solver: str
    options: dict[str, Any]

    def solve(self) -> Solution:
        """Solves the B problems, without a graph. Raises ValueError and RuntimeError as `solve_transport` does."""
        # Gradients and autocast are settings of a thread, so the thread of this call sets them.
        with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            solve = partial(SOLVERS[self.solver], **self.options)
            x, y, a, b = (tensor.detach() for tensor in (self.x, self.y, self.a, self.b))
            return certify(solve, self.solver in _PROVING, x, y, expanded_costs(x, y), a, b)

    def result(self, solution: Solution) -> TransportResult:
        """The result for the solution of `solve`, differentiable in the points and the weights."""
        with torch.autocast(self.x.device.type, enabled=False):
            cost = _EnvelopeCost.apply(self.x, self.y, self.a, self.b, solution)
        return TransportResult(cost, (solution.u, solution.v), solution.gap, self.solver, solution.plan)


def pose_transport(
    x: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    solver: str = "exact",
    **options: Any,
) -> TransportProblem:
    """Checks the arguments of `solve_transport` and returns its problem, unsolved.

    Raises:
        TypeError, ValueError: as in `solve_transport`, except for options of the solver, which `solve` checks.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> problem = pose_transport(x, x + 2)
        >>> problem.result(problem.solve()).cost
        tensor([4.])
    """
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
    return TransportProblem(x.to(dtype), y.to(dtype), a, b, solver, options)


def check_solver(name: str) -> None:
    """Raises ValueError unless `name` is that of a solver or "auto".

    Example:
        >>> check_solver("exact")
    """
    known = (*SOLVERS, _AUTO)
    if name not in known:
        raise ValueError(f"unknown solver {name!r}; choose from {', '.join(map(repr, known))}")


def _pick_solver(device: torch.device, rows: int, columns: int) -> str:
    """Returns the faster of the two solvers of the balanced problem."""
    # Both start on the same arcs. Batched checks are faster on a GPU, and the costs then stay there.
    return "certified" if device.type == "cuda" and min(rows, columns) >= _LARGE_ON_GPU else "exact"


class _EnvelopeCost(torch.autograd.Function):
    """The cost (B,) of a solution, with the gradients for a fixed plan and fixed potentials."""

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
    # Works in place: the tensors are large, and touching new pages takes longer than the arithmetic.
    pull = mass.to(x.dtype)[..., None] * x
    return pull.sub_(_transport(plan, y)).mul_(2 * d_cost[:, None, None])


def _transport(plan: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """P y: (B, N, D) in the points' dtype, for a plan (B, N, M), sparse or dense, and points (B, M, D)."""
    if not plan.is_sparse:
        return plan.to(points.dtype) @ points
    # Torch has no batched product for sparse plans, so they form the diagonal blocks of one matrix.
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
    """Potentials minus their mean over the points of positive weight."""
    counted = (weights > 0).to(potentials.dtype)
    return potentials - ((potentials * counted).sum(dim=1) / counted.sum(dim=1))[:, None]
