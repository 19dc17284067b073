"""
Runs stages as scripts, each in a fork of this process that receives a signal in a given step; for `test_kills.py`.

    python kill_driver.py runs.json

The file contains a list of {"module", "words", "step", "signal"}; without a step, the run is not interrupted. For each
run, the exit status of the process is printed, negative for a signal.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

from dali_llava.train.command_line import run_stage
from dali_llava.train.trainers.stage import StageMixin


def signal_in_step(step: int, number: int) -> None:
    """Send a signal to this process in the middle of a training step, between the gradients and the update."""
    training_step = StageMixin.training_step

    def interrupted(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step + 1 == step and self.processing_class is not None:
            os.kill(os.getpid(), number)
        return loss

    StageMixin.training_step = interrupted


def run(module: str, words: list[str], step: int | None = None, number: str = "SIGKILL") -> int:
    """Run a stage in a fork and return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        if step is not None:
            signal_in_step(step, getattr(signal, number))
        sys.argv = [f"{module}.py", *words]
        run_stage(importlib.import_module(module).main)
        status = 0
    except SystemExit as error:
        print(error, file=sys.stderr)
        status = 1
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    listed = json.loads(Path(sys.argv[1]).read_text())
    for each in listed:
        importlib.import_module(each["module"])
    for each in listed:
        print(run(each["module"], each["words"], each.get("step"), each.get("signal", "SIGKILL")), flush=True)
