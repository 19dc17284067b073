"""
Runs stages one after another under an engine, for the tests. The first process prints what ran.

    python -m torch.distributed.run --standalone --nproc_per_node 2 engines_driver.py ENGINE stages.json

The file contains `{name: [module, [arguments of the stage]]}`.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


CONFIGURED = ["--accelerator_config", json.dumps({"use_configured_state": True})]


def start(engine: str) -> list[str]:
    """Prepare the process for an engine on CPU, for which accelerate would use DDP, and return the words it needs."""
    if engine.startswith("zero"):
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        PartialState(backend="gloo")
        configs = Path(importlib.import_module("dali_llava.train").__file__).parent / "configs" / "deepspeed"
        return [*CONFIGURED, "--deepspeed", str(configs / f"{engine}.json")]
    if engine == "fsdp2":
        state = PartialState(backend="gloo")
        state.distributed_type = DistributedType.MULTI_GPU
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        return [*CONFIGURED, "--fsdp_config", json.dumps(config)]
    return []


def describe(trainer) -> dict:
    """What ran: the engine, the number of processes, and how many of the trained parameters are sharded."""
    trained = [p for p in trainer.model_wrapped.parameters() if p.requires_grad]
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "processes": trainer.args.world_size,
        "trained": len(trained),
        "sharded": sum(isinstance(p, DTensor) or (hasattr(p, "ds_id") and p.numel() == 0) for p in trained),
    }


if __name__ == "__main__":
    engine, listing = sys.argv[1:]
    for name, (module, words) in json.loads(Path(listing).read_text()).items():
        own = start(engine)
        trainer = importlib.import_module(module).main([*words, *own])
        if trainer.args.process_index == 0:
            print(json.dumps({"name": name, **describe(trainer)}), flush=True)
        del trainer
        AcceleratorState._reset_state(reset_partial_state=False)
    dist.destroy_process_group()
