"""Partial transport: moves the share of the weight that is cheapest to move, exactly."""

from functools import partial

import numpy as np
import torch

from dali_llava.train.transport.arcs import SAME_MASS
from dali_llava.train.transport.exact import ROUNDING, solve_exact
from dali_llava.train.transport.relaxed import Found, check_max_iterations, solve_each, weighted_part
from dali_llava.train.transport.simplex import NoPlanError, dense_simplex
from dali_llava.train.transport.solution import Solution


def solve_partial(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    mass: float = 0.8,
    num_threads: int | None = None,
    max_iterations: int = 10_000_000,
) -> Solution:
    """Moves the share of the weight that is cheapest to move: `min <P, C>` over plans with `P 1 <= a`, `P^T 1 <= b`.

    The entries of the plan sum to `mass` [1]. An extra row and an extra column, of weight `1 - mass` and cost 0 to all
    points, take the mass that does not move [2]. The network simplex then finds the optimum on the CPU, and its
    potentials prove it.

    Args:
        cost: (B, N, M) float64, finite, at least 0.
        a: (B, N) float64 weights, each row summing to 1. Points of weight 0 are left out.
        b: (B, M) float64 weights, each row summing to 1.
        mass: share of the weight that moves, above 0 and at most 1. With 1 the problem is that of `solve_exact`.
        num_threads: number of problems solved at a time. Defaults to this process's share of the available cores.
        max_iterations: limit of simplex iterations per problem.

    Returns:
        Solution with a sparse plan and its marginals. `u` and `v` are the derivatives of the cost by the weights, up
        to one constant each. The constants satisfy `<a, u> + <b, v> = cost - gap`.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: the simplex stops without an optimum; the message names the sample.

    References:
        [1] L. A. Caffarelli and R. J. McCann, "Free boundaries in optimal transport and Monge-Ampère obstacle
            problems", Annals of Mathematics, 2010.
        [2] L. Chapel, M. Z. Alaya and G. Gasso, "Partial Optimal Transport with Applications on Positive-Unlabeled
            Learning", NeurIPS, 2020, proposition 1.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[[0.0, 4.0], [9.0, 9.0]]], dtype=torch.float64)
        >>> weights = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        >>> solve_partial(cost, weights, weights, mass=0.5).plan.to_dense()[0]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be above 0 and at most 1, not {mass}")
    check_max_iterations(max_iterations)
    if mass == 1:
        return solve_exact(cost, a, b, num_threads, max_iterations)
    solve_one = partial(_partial_one, mass=mass, max_iterations=max_iterations)
    return solve_each("partial", solve_one, cost, a, b, num_threads)


def _partial_one(cost: np.ndarray, a: np.ndarray, b: np.ndarray, *, mass: float, max_iterations: int) -> Found:
    rows, columns, mass_a, mass_b, scale = weighted_part(cost, a, b)
    cost = cost / scale
    # Mass from the extra row to the extra column would have to move in addition to the share. It costs 1, the largest
    # cost, so no optimal plan moves any.
    extended = np.ones((len(rows) + 1, len(columns) + 1))
    extended[:-1, :-1] = cost[np.ix_(rows, columns)]
    extended[-1, :-1] = extended[:-1, -1] = 0.0
    try:
        solution = dense_simplex(extended, np.append(mass_a, 1 - mass), np.append(mass_b, 1 - mass), max_iterations)
    except NoPlanError as error:
        raise NoPlanError(f"{error}; raise max_iterations") from error
    moves = (solution.indices[0] < len(rows)) & (solution.indices[1] < len(columns))
    (row, column), masses = solution.indices[:, moves], solution.masses[moves]
    if not abs(masses.sum() - mass) < SAME_MASS:
        raise NoPlanError("the plan does not move the share of the weight")
    value = masses @ extended[row, column]

    # The dual: max <a, p> + <b, q> + mass * price over p_i + q_j + price <= C_ij with p, q <= 0. The price is the
    # marginal cost of the share. As in `solve_exact`, p and q are feasible by construction and include all points.
    price = max(0.0, -solution.u[-1] - solution.v[-1])
    q = np.minimum(solution.v[:-1] + solution.u[-1], 0.0)
    p = np.minimum((cost[:, columns] - q).min(axis=1) - price, 0.0)
    q = np.minimum((cost[rows] - p[rows, None]).min(axis=0) - price, 0.0)
    # With the price spread over the points they are potentials of the whole weight, and still feasible as mass <= 1.
    u, v = p + price * mass / 2, q + price * mass / 2
    gap = value - mass_a @ u[rows] - mass_b @ v[columns]
    if not gap >= -ROUNDING:
        raise NoPlanError("the plan's cost lies below the lower bound")
    indices = np.stack((rows[row], columns[column]))
    return Found(value * scale, max(gap, 0.0) * scale, u * scale, v * scale, indices, masses)
