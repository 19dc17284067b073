"""
Runs stages one after another in each process of `accelerate launch`, for the tests. The first process prints what ran.

    accelerate launch --config_file zero3.yaml --num_processes 2 engines_driver.py stages.json

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
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
CONFIGURED = ["--accelerator_config", json.dumps({"use_configured_state": True})]


def start(folder: Path) -> list[str]:
    """
    Let the engine of the launcher's configuration run on the CPU, where accelerate would use DDP.

    Args:
        folder: folder for the DeepSpeed configuration with sizes for small models.

    Returns:
        arguments that the stages need.
    """
    if DEEPSPEED_FILE in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
        root = Path(importlib.import_module("dali_llava.train").__file__).parents[1]
        config = json.loads((root / os.environ[DEEPSPEED_FILE]).read_text())
        # As for a large model: weights are gathered in small parts, and none remains whole.
        config["zero_optimization"] |= {"stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
        (folder / "deepspeed.json").write_text(json.dumps(config))
        os.environ[DEEPSPEED_FILE] = str(folder / "deepspeed.json")
        PartialState(backend="gloo")
        return CONFIGURED
    if "FSDP_VERSION" in os.environ:
        PartialState(backend="gloo").distributed_type = DistributedType.MULTI_GPU  # a stage sets it to FSDP
        return CONFIGURED
    return []


def name_of(module: nn.Module) -> str:
    """The name of a module's class, to which FSDP2 adds a prefix."""
    return type(module).__name__.removeprefix("FSDP")


def describe(trainer) -> dict:
    """What ran: the engine, the dtypes of the parameters, how many are sharded, and the last log entry."""
    parameters = list(trainer.model_wrapped.parameters())
    modules = list(trainer.model_wrapped.modules())
    trained = [p for p in parameters if p.requires_grad]
    optimizer = trainer.optimizer.optimizer
    parts = getattr(optimizer, "single_partition_of_fp32_groups", ())  # of ZeRO-2
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "optimizer": type(optimizer).__name__,
        "processes": trainer.args.world_size,
        "trained": len(trained),
        "trained_dtypes": sorted({str(p.dtype) for p in trained}),
        "frozen_dtypes": sorted({str(p.dtype) for p in parameters if not p.requires_grad}),
        "sharded": sum(isinstance(p, DTensor) or (hasattr(p, "ds_id") and p.numel() == 0) for p in parameters),
        "parameters": len(parameters),
        "elements": sum(p.numel() for p in trained),
        "optimizer_elements": sum(part.numel() for part in parts),
        "best": trainer.state.best_global_step,
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry][-1],
        "modules": sorted(map(name_of, modules)),
        "units": sorted(name_of(module) for module in modules if isinstance(module, FSDPModule)),
    }


if __name__ == "__main__":
    listing = Path(sys.argv[1])
    for name, (module, words) in json.loads(listing.read_text()).items():
        own = start(listing.parent)
        trainer = importlib.import_module(module).main([*words, *own])
        if trainer.args.process_index == 0:
            print(json.dumps({"name": name, **describe(trainer)}), flush=True)
        del trainer
        AcceleratorState._reset_state(reset_partial_state=False)
    dist.destroy_process_group()
