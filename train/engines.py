"""Engines that train a stage on several processes (DDP, ZeRO, FSDP2): checks and settings before training."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments


ROOT = Path(__file__).parents[1]  # contains `train/`, in a clone and in an installed package
DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"  # set by `accelerate launch`
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def requested_engine(arguments: TrainingArguments) -> str:
    """Return the engine that `arguments` request: `ZeRO-N`, `FSDP`, `DDP` or `one process`."""
    deepspeed = arguments.deepspeed_plugin
    if deepspeed is not None:
        return f"ZeRO-{deepspeed.hf_ds_config.get_value('zero_optimization.stage', deepspeed.zero_stage)}"
    if arguments.fsdp_plugin_args is not None:
        return "FSDP"
    return "DDP" if arguments.world_size > 1 else "one process"


def check_launch(arguments: TrainingArguments) -> None:
    """
    Check what the launcher requests, before the processes connect. Call it before `TrainingArguments.__post_init__`.

    The path of a DeepSpeed configuration may be relative to the folder that contains `train/`, as in
    `train/configs/accelerate/`. It is made absolute.

    Raises:
        ValueError: there are fewer accelerators than processes on this machine, or FSDP1 is requested.
        ImportError: DeepSpeed is requested and not installed.
        FileNotFoundError: the DeepSpeed configuration does not exist.
    """
    if arguments.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        if find_spec("deepspeed") is None:
            raise ImportError('deepspeed: not installed; run pip install "dali-llava[deepspeed]".')
        if DEEPSPEED_FILE in os.environ:
            os.environ[DEEPSPEED_FILE] = _find(os.environ[DEEPSPEED_FILE])
        if isinstance(arguments.deepspeed, str) and not arguments.deepspeed.lstrip().startswith("{"):
            arguments.deepspeed = _find(arguments.deepspeed)
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("fsdp_version 1 is not supported: use 2, as in train/configs/accelerate/fsdp2.yaml.")
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if processes > max(1, devices) and not (arguments.use_cpu or _is_set("ACCELERATE_USE_CPU")):
        raise ValueError(
            f"num_processes: {processes} processes on a machine with {devices} accelerators; start it with accelerate "
            f"launch --num_processes {max(1, devices)}, or train on the CPU with --use_cpu true after the script."
        )


def set_engine(arguments: TrainingArguments) -> None:
    """
    Complete the settings of FSDP2, and check that the requested engine can run here.

    Each process loads the base model whole, so that it can compute features and captions before the engine exists.
    Parameters keep their dtype: what trains is float32, and autocast applies as without FSDP2.

    Raises:
        ValueError: ZeRO or FSDP2 is requested on the CPU, where accelerate would use DDP instead.
    """
    if arguments.fsdp_plugin_args is not None or _is_set("ACCELERATE_USE_FSDP"):
        # The options that are not given here are those of the launcher.
        own = {"mixed_precision_policy": MixedPrecisionPolicy(), "cpu_ram_efficient_loading": False}
        arguments.fsdp_plugin_args = (arguments.fsdp_plugin_args or {}) | own
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # read by from_pretrained
    engine, found = requested_engine(arguments), arguments.distributed_state.distributed_type
    if engine.startswith(("ZeRO", "FSDP")) and found in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"{engine} runs on accelerators only; on the CPU, start without a configuration file: accelerate launch "
            "--multi_gpu --num_processes N."
        )


def autocast_deepspeed(plugin: DeepSpeedPlugin) -> None:
    """Replace DeepSpeed's 16-bit training, which converts all parameters, by autocast, which converts none."""
    config = plugin.hf_ds_config.config
    for precision, dtype in DTYPES.items():
        if config.get(precision, {}).get("enabled"):
            # Without a list of modules, gradients are reduced in 16 bit.
            config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
            config[precision] = {"enabled": False}
    plugin.hf_ds_config._dtype = torch.float32  # of the inputs


def layer_classes(model: nn.Module) -> set[str]:
    """Return the names of the layers' classes in `model`, which FSDP2 gathers one at a time."""
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return named & {type(module).__name__ for module in model.modules()}


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def _find(path: str) -> str:
    """Return the absolute path of a file; a relative one may start at `ROOT`."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return str(candidate.resolve())
    raise FileNotFoundError(f"{path}: no such DeepSpeed configuration; see train/configs/deepspeed.")
