"""Memory of one device under each engine, from the memory of the whole model."""

import json
from dataclasses import dataclass
from math import ceil

from torch import nn

from dali_llava.train.engines import ROOT, layer_classes


@dataclass(frozen=True)
class Engine:
    """
    What an engine divides among the devices.

    Args:
        parameters, gradients, optimizer: whether each device holds a part only.
        deepspeed: name of the configuration in `train/configs/deepspeed`, or None.
        offload: whether parameters and the optimizer's state are in the CPU's memory.
    """

    parameters: bool = False
    gradients: bool = False
    optimizer: bool = False
    deepspeed: str | None = None
    offload: bool = False


ENGINES = {
    "ddp": Engine(),
    "zero2": Engine(gradients=True, optimizer=True, deepspeed="zero2"),
    "zero3": Engine(True, True, True, deepspeed="zero3"),
    "zero3_offload": Engine(True, True, True, deepspeed="zero3_offload", offload=True),
    "fsdp2": Engine(True, True, True),
}
MAX_LIVE_PARAMETERS = 10**9  # default of stage3_max_live_parameters in DeepSpeed


def held_memory(model: nn.Module, engine: Engine, gpus: int) -> dict[str, int]:
    """
    Bytes of a device that do not depend on the batch.

    Args:
        model: the module to train, of any device.
        engine: a value of `ENGINES`.
        gpus: number of devices.

    Returns:
        {"weights", "optimizer", "communication": bytes}. The optimizer has two float32 values per trained weight, as
        Adam has, and with DeepSpeed a float32 copy. Communication is the memory of gathered weights and of buckets.
    """
    parameters = list(model.parameters())
    weights = sum(each.nbytes for each in parameters) + sum(each.nbytes for each in model.buffers())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    states = trained * (12 if engine.deepspeed else 8)
    if engine.offload:
        weights = states = 0
    if engine.parameters:
        weights = ceil(weights / gpus)
    if engine.optimizer:
        states = ceil(states / gpus)
    return {"weights": weights, "optimizer": states, "communication": _communication(model, engine, gpus, trained)}


def _communication(model: nn.Module, engine: Engine, gpus: int, trained: int) -> int:
    if gpus == 1 and not engine.deepspeed:
        return 0
    if engine.deepspeed:
        path = ROOT / "train" / "configs" / "deepspeed" / f"{engine.deepspeed}.json"
        options = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        buckets = min(trained, int(options["reduce_bucket_size"])) * 4 * (1 + options["overlap_comm"])
        return buckets + (_gathered(model, MAX_LIVE_PARAMETERS) if engine.parameters else 0)
    if engine.parameters:
        return _unsharded_units(model)
    return 4 * trained  # the buckets of DistributedDataParallel


def _gathered(model: nn.Module, most: int) -> int:
    """Bytes of the parameters that ZeRO-3 has gathered at once."""
    count = sum(each.numel() for each in model.parameters())
    size = sum(each.nbytes for each in model.parameters())
    return round(size * min(1, most / max(1, count)))


def _unsharded_units(model: nn.Module) -> int:
    """Bytes of what FSDP2 has gathered at once: everything outside of the layers, and two layers."""
    classes = layer_classes(model)
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    inside = {id(each) for layer in layers for each in layer.parameters()}
    outside = sum(each.nbytes for each in model.parameters() if id(each) not in inside)
    return outside + 2 * max((sum(each.nbytes for each in layer.parameters()) for layer in layers), default=0)
