"""Modules without input on one rank, which must run because other ranks wait for them."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn


def must_run(modules: Iterable[nn.Module], training: bool) -> bool:
    """
    Whether modules must run although the batch of this rank has no input for them.

    In a step on several ranks, DDP and ZeRO wait for the gradients of all trained weights, and ZeRO-3 and FSDP2 for
    all ranks to gather sharded weights.

    Args:
        modules: the modules.
        training: whether a backward pass may follow.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor

    return any(
        (training and weight.requires_grad) or hasattr(weight, "ds_id") or isinstance(weight, DTensor)
        for module in modules
        for weight in module.parameters()
    )
