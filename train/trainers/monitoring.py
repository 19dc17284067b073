"""What a run reports about itself: the parts of the loss, throughput, memory and the transport's share of the time."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


TRANSPORT_SECONDS = "transport_seconds"  # log of an objective: seconds in which the step waited for a transport solver


class StepMonitor(TrainerCallback):
    """
    Measures the steps between two log entries of the training loss.

    Time is measured from the reading of a step's batches to the update of the weights. Logging, evaluation and saving
    are excluded.

    Args:
        clock: function that returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, float | torch.Tensor] = {}
        self._notes: dict[str, float] = {}
        self._steps, self._clips, self._seconds = 0, 0, 0.0

    def start_step(self) -> None:
        """Start the time of a step, before its batches are read."""
        self._started = self.clock()

    def count(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Count the clips in the batches of a step: the first dimension of each batch's tensors."""
        for batch in batches:
            self._clips += next(len(value) for value in batch.values() if torch.is_tensor(value))

    def add(self, parts: Mapping[str, float | torch.Tensor], scale: float = 1.0) -> None:
        """
        Add the parts of a batch's loss. Tensors are not read before the next log entry.

        Args:
            parts: numbers or scalar tensors by name. `transport_seconds` becomes the transport's share of the time.
            scale: share of the batch in its step; 1 / accumulation steps for a mean over the batch.
        """
        for name, value in parts.items():
            value = value.detach() if torch.is_tensor(value) else value
            weighted = value if name == TRANSPORT_SECONDS else scale * value
            self._sums[name] = self._sums.get(name, 0.0) + weighted

    def note(self, values: Mapping[str, float]) -> None:
        """Add values, equal on all ranks, to the next log entry."""
        self._notes.update(values)

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
        self._seconds += self.clock() - self._started
        if (
            state.global_step >= state.max_steps
        ):  # the last steps are logged even if logging_steps does not divide them
            control.should_log = True

    def entry(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Return the measurements since the last entry, over all ranks. All ranks must call it.

        Returns:
            the means of the parts over steps and ranks; the notes; `clips_per_second` of all ranks together;
            `memory_gb`, the peak of the rank that uses most, in 10^9 bytes; and `transport_share`, in [0, 1], if the
            objective logs `transport_seconds`.
        """
        device = accelerator.device
        own = [*self._sums.values(), self._clips, self._seconds, peak_memory(device) / 1e9]
        own = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in own])
        ranks = accelerator.gather(own[None]).double().cpu()  # (ranks, values)
        *means, clips, seconds, _ = ranks.mean(dim=0).tolist()
        parts = dict(zip(self._sums, means, strict=True))
        transport = parts.pop(TRANSPORT_SECONDS, None)
        entry = {name: mean / self._steps for name, mean in parts.items()} | self._notes
        entry |= {"clips_per_second": len(ranks) * clips / seconds, "memory_gb": ranks[:, -1].max().item()}
        if transport is not None:
            entry["transport_share"] = transport / seconds
        self._restart()
        return entry


def peak_memory(device: torch.device) -> int:
    """Return the peak of the memory that torch allocated on an accelerator, or else of the process, in bytes."""
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device)
    import resource  # not available on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeriodicCallback(TrainerCallback):
    """
    Calls `measure` before the first step, every `steps` steps, and after the last step. All ranks call it.

    Args:
        steps: number of steps between two calls.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def measure(self, state, control) -> None:
        """Measure the model in its current state."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # otherwise a run is resumed
            self.measure(state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            self.measure(state, control)


class StageProgress(ProgressCallback):
    """Progress bar on stderr with the last loss, the throughput, the memory and the transport's share."""

    FORMATS = {
        "loss": ("loss", "{:.4g}"),
        "eval_loss": ("eval_loss", "{:.4g}"),
        "clips_per_second": ("clips/s", "{:.3g}"),
        "memory_gb": ("memory", "{:.1f}GB"),
        "transport_share": ("transport", "{:.0%}"),
    }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.shown = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            known = {name: self.FORMATS[name] for name in self.FORMATS if name in logs}
            self.shown |= {label: text.format(logs[name]) for name, (label, text) in known.items()}
            self.training_bar.set_postfix(self.shown)
