"""Work that goes on in a thread of its own while the caller does something else."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

import torch


T = TypeVar("T")


def in_background(device: torch.device, work: Callable[[], T]) -> Callable[[], T]:
    """Starts `work` in a thread, and returns a function that waits for what it gives or raises.

    Args:
        device: of the tensors that the work reads. On a GPU the work runs on a new stream, after what the caller has
            queued so far, and what the caller queues after the wait runs after the work.
        work: gives a dataclass; its tensors must not need a gradient.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="background")
    if device.type == "cuda":
        finish = _on_a_stream(device, work, pool)
    else:
        finish = pool.submit(_without_gradient, work).result
    pool.shutdown(wait=False)  # once the work is done
    return finish


def _without_gradient(work: Callable[[], T]) -> T:
    with torch.no_grad():  # a thread begins with gradients on
        return work()


def _on_a_stream(device: torch.device, work: Callable[[], T], pool: ThreadPoolExecutor) -> Callable[[], T]:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def run() -> T:
        with torch.cuda.stream(stream):
            return _without_gradient(work)

    future: Future[T] = pool.submit(run)

    def finish() -> T:
        result = future.result()
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in _tensors(result):
            tensor.record_stream(current)  # or its memory may go to the stream's next work while it is still read
        return result

    return finish


def _tensors(result: Any) -> list[torch.Tensor]:
    values = [getattr(result, field.name) for field in fields(result)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    dense = [tensor for tensor in tensors if not tensor.is_sparse]
    return dense + [part for tensor in tensors if tensor.is_sparse for part in (tensor._indices(), tensor._values())]
