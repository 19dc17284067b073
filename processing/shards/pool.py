"""Worker processes of which any may die: its task is named, and the rest goes on."""

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


ATTEMPTS = 2  # a process that the system killed for its neighbours' memory says nothing about its task
LOOK_AHEAD = 4  # tasks a worker that may be done before their turn; their results wait in memory


@dataclass(frozen=True)
class Died:
    """The result of a task whose processes died; `exit_code` is the last one's, negative for a signal."""

    exit_code: int | None


class WorkerPool:
    """
    Calls one function in processes of their own: `with WorkerPool(function, 2) as pool: ... pool.map(tasks)`.

    Unlike the executors of the standard library, it outlives a worker that a damaged file takes down, and no worker
    outlives it: each ends when its pipe does, also when this process is killed.

    Args:
        function: called with one task; it, the tasks and the results must survive pickling, and be of modules that a
            worker can import: it does not run the caller's script again.
        num_proc: processes, at least 1. Results do not depend on their number.
    """

    def __init__(self, function: Callable[[Any], Any], num_proc: int):
        # A fork of this process would copy its threads' locks. The fork server has imported all that a task needs, so
        # that a process is quickly replaced; where there is none, each imports for itself.
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
        """The results in the order of the tasks, or `Died` for a task that took two processes down.

        Raises:
            RuntimeError: a process ends before it is given a task.
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
        theirs.close()  # theirs alone must be open, or their death would not show here

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
            pass  # it has died; its end of the pipe tells so too

    def stop(self) -> int | None:
        self.connection.close()
        self._process.join(timeout=1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep a process that starts within from running the caller's script once more.

    A worker needs nothing of the script, and one without `if __name__ == "__main__":` would start workers in turn.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    try:
        connection.send("ready")
        while True:
            connection.send(function(connection.recv()))
    except (EOFError, OSError):
        return
