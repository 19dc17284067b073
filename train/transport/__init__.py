"""Optimal transport between batches of point sets."""

from dali_llava.train.transport.solve import SOLVERS, TransportResult, check_solver, solve_transport


__all__ = ["SOLVERS", "TransportResult", "check_solver", "solve_transport"]
