"""
Runs stages one after another in this process for `test_two_processes.py`. The first process prints what ran.

    python -m torch.distributed.run --standalone --nproc_per_node 2 stages_driver.py stages.json

The file contains `{name: [module, [arguments of the stage]]}`.
"""

import importlib
import json
import sys
from pathlib import Path

import torch.distributed as dist


def run(name: str, module: str, words: list[str]) -> None:
    trainer = importlib.import_module(module).main(words)
    arguments = trainer.args
    if arguments.process_index == 0:
        ran = {"name": name, "processes": arguments.world_size, "mode": arguments.parallel_mode.value}
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        print(json.dumps(ran | {"backend": dist.get_backend(), "logged": logged[-1]}), flush=True)


if __name__ == "__main__":
    for name, (module, words) in json.loads(Path(sys.argv[1]).read_text()).items():
        run(name, module, words)
    dist.destroy_process_group()
