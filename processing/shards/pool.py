"""Worker processes that may die: the task of a dead worker is reported, and the others continue."""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any


ATTEMPTS = 2  # the system may have killed the process because others used too much memory
LOOK_AHEAD = 4  # tasks per worker that may finish early and keep their results in memory


@dataclass(frozen=True)
class Died:
    """The result of a task that killed its processes. `exit_code` is that of the last one, negative for a signal."""

    exit_code: int | None


class WorkerPool:
    """
    Call one function in separate processes: `with WorkerPool(function, 2) as pool: ... pool.map(tasks)`.

    Unlike the executors of the standard library, the pool survives a worker that crashes on a damaged file. Workers
    end when their pipe closes, even if this process is killed.

    Args:
        function: called with one task. The function, tasks and results must be picklable, and defined in modules that
            workers can import, since workers do not run the script of the caller.
        num_proc: number of processes, at least 1. Results do not depend on it.
    """

    def __init__(self, function: Callable[[Any], Any], num_proc: int):
        # A fork of this process would copy the locks of its threads. The fork server has already imported what a task
        # needs, so a process is replaced quickly. Without a fork server, each process imports it again.
        has_server = "forkserver" in multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver" if has_server else "spawn")
        if has_server:
            self._context.set_forkserver_preload(["dali_llava.processing.shards.clip"])
        self._function = function
        self._workers = [_Worker(self._context, function) for _ in range(num_proc)]

    def __enter__(self) -> "WorkerPool":
        for worker in self._workers:
            worker.await_ready()
        return self

    def __exit__(self, *exception) -> None:
        for worker in self._workers:
            worker.stop()

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """
        Yield the results in the order of the tasks, or `Died` for a task that killed two processes.

        Raises:
            RuntimeError: if a process ends before it receives a task.
        """
        tasks, places = iter(tasks), count()
        again: deque[_Job] = deque()
        done: dict[int, Any] = {}
        turn, taken, is_exhausted = 0, 0, False
        while True:
            for worker in self._workers:
                if worker.job is not None:
                    continue
                if again:
                    worker.give(again.popleft())
                elif not is_exhausted and taken < turn + LOOK_AHEAD * len(self._workers):
                    try:
                        worker.give(_Job(next(places), next(tasks)))
                        taken += 1
                    except StopIteration:
                        is_exhausted = True
            if turn in done:
                yield done.pop(turn)
                turn += 1
                continue
            busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]
                job, worker.job = worker.job, None
                try:
                    done[job.place] = connection.recv()
                except (EOFError, OSError):
                    job.attempts += 1
                    exit_code = self._replace(worker)
                    if job.attempts < ATTEMPTS:
                        again.append(job)
                    else:
                        done[job.place] = Died(exit_code)

    def _replace(self, worker: "_Worker") -> int | None:
        exit_code = worker.stop()
        fresh = _Worker(self._context, self._function)
        self._workers[self._workers.index(worker)] = fresh
        fresh.await_ready()
        return exit_code


@dataclass
class _Job:
    place: int
    task: Any
    attempts: int = 0


class _Worker:
    def __init__(self, context: multiprocessing.context.BaseContext, function: Callable[[Any], Any]):
        self.connection, theirs = context.Pipe()
        self.job: _Job | None = None
        self._process = context.Process(target=_work, args=(function, theirs), daemon=True)
        with _hidden_main():
            self._process.start()
        theirs.close()  # only the worker may hold its end, so that this end closes when the worker dies

    def await_ready(self) -> None:
        try:
            self.connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"a worker process cannot start (exit code {self.stop()}); use fewer processes, --num-proc 1"
            ) from error

    def give(self, job: _Job) -> None:
        self.job = job
        try:
            self.connection.send(job.task)
        except OSError:
            pass  # the worker has died, which `map` detects at the pipe

    def stop(self) -> int | None:
        self.connection.close()
        self._process.join(timeout=1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


@contextmanager
def _hidden_main() -> Iterator[None]:
    """
    Prevent processes started in the block from running the script of the caller again.

    Workers do not need the script, and a script without `if __name__ == "__main__":` would start more workers.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process ends the workers
    try:
        connection.send("ready")
        while True:
            connection.send(function(connection.recv()))
    except (EOFError, OSError):
        return
