"""Weights of a model that an engine may have sharded: gathered into whole tensors, and set from them."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm


def gather_weights(module: nn.Module, keep: bool = True, frozen: bool = False) -> dict[str, torch.Tensor]:
    """
    Gather the trained weights of a module, and the `batch_statistics` that training updates. All ranks must call it.

    Weights that DeepSpeed trains in 16 bit are returned in float32, from the optimizer's master copy.

    Args:
        module: a module whose parameters may be sharded by ZeRO or FSDP2.
        keep: whether to return the tensors on this rank; the ranks that do not write them need no copy.
        frozen: whether to include weights and statistics that are not trained.

    Returns:
        whole tensors on the CPU by name, without tied duplicates; empty if `keep` is False.
    """
    weights = {}
    for name, parameter in module.named_parameters():
        if frozen or parameter.requires_grad:
            whole = _whole(parameter)
            if keep:
                weights[name] = whole.detach().to("cpu", copy=True)
    if keep:
        statistics = batch_statistics(module, frozen).items()
        weights |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in statistics}
    return weights


def batch_statistics(module: nn.Module, frozen: bool = False) -> dict[str, torch.Tensor]:
    """
    The statistics that each BatchNorm in a module stores, by name. No engine shards them.

    Args:
        module: the module.
        frozen: whether to include what training does not need: the statistics of a BatchNorm that does not update them
            (its attribute `frozen`), and the number of batches.
    """
    return {
        f"{name}.{key}": buffer
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and (frozen or not getattr(part, "frozen", False))
        for key, buffer in part.named_buffers(recurse=False)
        if frozen or buffer.is_floating_point()
    }


@torch.no_grad()
def set_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """
    Set weights of a module from whole tensors. All ranks must call it with the same tensors.

    Args:
        module: see `gather_weights`.
        weights: tensors by the names of the module's parameters and statistics; see `gather_weights`.

    Raises:
        ValueError: a name is not that of a parameter or statistic, or a shape differs.
    """
    parameters = dict(module.named_parameters()) | batch_statistics(module, frozen=True)
    for name, tensor in weights.items():
        if name not in parameters or _shape(parameters[name]) != tensor.shape:
            have = f"shape {tuple(_shape(parameters[name]))}" if name in parameters else "no such weight"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint, but the model has {have}.")
    for name, tensor in weights.items():
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            tensor = tensor.to(mesh.device_type, parameter.dtype)
            parameter.copy_(distribute_tensor(tensor, mesh, parameter.placements).to(parameter.device))
        elif _of_zero(parameter):
            _set_in_zero(parameter, tensor)
        else:
            parameter.copy_(tensor)


def _of_zero(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        # A shard that is offloaded to the CPU is gathered on the devices of the mesh.
        return parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
    if not _of_zero(parameter):
        return parameter
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    trained_in_16_bit = parameter.requires_grad and parameter.dtype != torch.float32
    master = safe_get_full_fp32_param(parameter) if trained_in_16_bit else None
    if master is not None:
        return master
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _set_in_zero(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(tensor)
    safe_set_full_fp32_param(parameter, tensor.to(parameter.device, torch.float32))
