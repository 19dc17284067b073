"""Transport solved in a thread while the caller does other work."""

from concurrent.futures import Executor, Future
from functools import cache

import torch

from dali_llava.train.transport.solution import Solution
from dali_llava.train.transport.solve import TransportProblem


def solve_in_background(pool: Executor, problem: TransportProblem) -> Future[Solution]:
    """Starts `problem.solve` in a thread of the pool.

    The solvers spend most of their time outside Python. For points on a GPU, the thread has its own stream: it begins
    with what the caller has queued so far, and does not wait for what the caller queues later.

    Args:
        pool: a pool of threads. One thread is enough, because a solver starts its own threads.
        problem: the problem.
    """
    device = problem.x.device
    if device.type != "cuda":
        return pool.submit(problem.solve)
    points_are_ready = torch.cuda.current_stream(device).record_event()

    def solve() -> Solution:
        stream = _stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # Memory that the caller's stream still reads is not reused before this event.
            stream.wait_event(points_are_ready)
            solution = problem.solve()
            stream.synchronize()
        return solution

    return pool.submit(solve)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The solver's stream. There is one per device, because each stream keeps the memory that it once took."""
    return torch.cuda.Stream(device)
