"""Optimal transport between batches of point sets."""

from dali_llava.train.transport.solve import (
    SOLVERS,
    TransportProblem,
    TransportResult,
    check_solver,
    pose_transport,
    solve_transport,
)


__all__ = [
    "SOLVERS",
    "TransportProblem",
    "TransportResult",
    "check_solver",
    "pose_transport",
    "solve_transport",
]
