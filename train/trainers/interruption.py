"""SIGTERM in a training script: the run saves a checkpoint at its next step, and ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class Interruption(TrainerCallback):
    """
    Saves a checkpoint and stops training at the end of the step in which SIGTERM arrives on any rank.

    Attributes:
        requested: whether the signal has arrived on this rank or, at the end of a step, on another one.
    """

    def __init__(self):
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM in this block, if the process is a stage's script (see `run_as_script`)."""
        if not _SCRIPT:
            yield
            return
        before = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _request(self, *_) -> None:
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # the ranks receive the signal in different steps, and must stop in the same one
            flag = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested:
            control.should_save = control.should_training_stop = True


_SCRIPT = []


def run_as_script() -> None:
    """Declare that the process runs a single stage, so that `Interruption` may handle SIGTERM."""
    _SCRIPT.append(True)
