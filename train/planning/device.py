"""Compare the plan of a stage with the memory of this device, before weights are loaded."""

import logging
import os
from pathlib import Path

import torch

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.train.arguments import StageArguments
from dali_llava.train.engines import requested_engine
from dali_llava.train.planning.arguments import frames_of
from dali_llava.train.planning.plan import Plan, base_dtype, plan_stage
from dali_llava.train.planning.stage_model import StageModel


logger = logging.getLogger(__name__)

SMALL = 500_000_000  # parameters of a stage that is not checked: it fits, and the check would take time


def check_memory(arguments: StageArguments, stage: StageModel, config: LlavaAudioConfig) -> Plan | None:
    """
    Plan a large stage, print one line, and refuse it if the device lacks the memory.

    Args:
        arguments: arguments of the stage. With `force`, it is not refused.
        stage: what it loads and trains.
        config: configuration of the base model.

    Returns:
        the plan, or None for a small stage.

    Raises:
        ValueError: the stage needs more memory than the device has.
    """
    model = stage.on_meta(config, base_dtype(arguments, config))
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        return None
    engine = engine_name(arguments)
    frames = frames_of(arguments.base_model)
    plan = plan_stage(arguments, stage, config, engine, arguments.world_size, frames=frames)
    available, device = available_memory(arguments.device)
    line = f"about {plan.peak / 1e9:.1f} GB of memory are needed per device ({engine}), {device} has "
    line += f"{available / 1e9:.1f} GB"
    if plan.peak > available and not arguments.force:
        raise ValueError(
            f"{line}; lower per_device_train_batch_size, add --gradient_checkpointing true, choose another engine "
            "(dali-llava plan compares them), or train nevertheless with --force true."
        )
    if arguments.process_index == 0:
        logger.warning("%s", line)
    return plan


def engine_name(arguments: StageArguments) -> str:
    """Return the key of `ENGINES` that the arguments request."""
    engine = requested_engine(arguments)
    if engine.startswith("ZeRO"):
        stage = "zero3" if engine == "ZeRO-3" else "zero2"
        config = arguments.deepspeed_plugin.hf_ds_config
        return f"{stage}_offload" if stage == "zero3" and config.is_offload() else stage
    return "fsdp2" if engine == "FSDP" else "ddp"


def available_memory(device: torch.device) -> tuple[int, str]:
    """Return the bytes of memory that are free on a device, and its name."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    meminfo = Path("/proc/meminfo")  # of Linux; elsewhere, all of the memory counts
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024, "the CPU"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the CPU"
