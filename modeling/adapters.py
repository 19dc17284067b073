"""
LoRA adapters (Hu et al., 2022) in the format of PEFT, read and merged without PEFT.

An adapter changes the weight W of a linear layer to W + s B A, where B A has a low rank. Its files also contain the
weights that were trained in full (`modules_to_save`). Names of a tensor:

    parameter   model.language_model.layers.0.mlp.up_proj.lora_A.default.weight    model.prefix.weight
    file        base_model.model.(...).up_proj.lora_A.weight                       base_model.model.model.prefix.weight
"""

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME


PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")

# Fields of `peft.LoraConfig` that the merge supports with any value. Other fields change what is computed.
SUPPORTED = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "ensure_weight_tying"),
    *("megatron_core", "qalora_group_size", "runtime_config", "eva_config", "loftq_config"),  # read by other fields
}
SUPPORTED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other initialisations change the weights of the base too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class LowRankUpdate:
    """
    The change of one weight by an adapter: `scaling * B @ A`.

    Attributes:
        a, b: the factors, (rank, columns) and (rows, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (rows, columns)."""
        return self.b.shape[0], self.a.shape[1]


def has_adapter(names: Iterable[str]) -> bool:
    """Whether names of weights include those of an adapter."""
    return any(FACTOR.fullmatch(name) for name in names)


def parameter_name(name: str) -> str:
    """The name of a parameter, from the name of its tensor in an adapter's file."""
    return re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name.removeprefix(PREFIX))


def file_name(name: str) -> str:
    """The inverse of `parameter_name`."""
    return PREFIX + re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", name)


def low_rank_updates(
    tensors: Mapping[str, torch.Tensor], config: Mapping, source: str | os.PathLike
) -> dict[str, LowRankUpdate]:
    """
    The updates that an adapter contains, by the name of the weight.

    Args:
        tensors: tensors by the name of the parameter; those that are not factors are ignored.
        config: the adapter's configuration, from `read_adapter_config`.
        source: named in errors.

    Raises:
        ValueError: a factor has no counterpart, or the shapes of two factors do not match.
    """
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match["layer"], {})[match["factor"]] = tensor
    updates = {}
    for layer, pair in factors.items():
        if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[-1]:
            shapes = ", ".join(f"lora_{factor} {tuple(pair[factor].shape)}" for factor in sorted(pair))
            raise ValueError(
                f"{source}: {layer} needs lora_A and lora_B of one rank, but has {shapes}; save it again."
            )
        rank = pair["A"].shape[0]
        patterns = config.get("alpha_pattern") or {}
        pattern = next((each for each in patterns if re.match(rf"(.*\.)?({each})$", layer)), None)
        alpha = config["lora_alpha"] if pattern is None else patterns[pattern]
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[f"{layer}.weight"] = LowRankUpdate(pair["A"], pair["B"], scaling)
    return updates


def apply_updates(weight: torch.Tensor, updates: Iterable[LowRankUpdate]) -> torch.Tensor:
    """The weight with the updates added to it in float32, in its own dtype."""
    merged = weight.float()
    for update in updates:
        merged = torch.addmm(merged, update.b.float(), update.a.float(), alpha=update.scaling)
    return merged.to(weight.dtype)


def read_adapter_config(path: str | os.PathLike) -> dict:
    """
    Read an `adapter_config.json` and check that `low_rank_updates` supports it.

    Raises:
        ValueError: the file is not JSON, or describes another kind of adapter. The message names the fields.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        fields = dict(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON configuration ({error}); copy or save the adapter again.") from error
    fields = {"peft_type": None, "lora_alpha": None} | fields
    refused = [name for name, values in SUPPORTED_VALUES.items() if name in fields and fields[name] not in values]
    refused += [name for name in fields if name not in SUPPORTED and name not in SUPPORTED_VALUES and fields[name]]
    if fields["lora_alpha"] is None:
        refused.append("lora_alpha")
    if refused:
        found = ", ".join(f"{name}={fields[name]!r}" for name in refused)
        raise ValueError(
            f"{path}: {found} is not supported; merge the adapter with PEFT (PeftModel.merge_and_unload) and use the "
            "merged model."
        )
    return config


def write_adapter(directory: str | os.PathLike, config, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Write an adapter that `peft.PeftModel.from_pretrained` loads on top of the base model.

    Args:
        directory: an existing folder.
        config: the `peft.LoraConfig` of the adapter.
        tensors: the trained tensors by the name of the parameter, complete and not partitioned: the factors, and the
            weights that were trained in full.
    """
    directory, config = Path(directory), copy.copy(config)
    config.inference_mode = True
    config.modules_to_save = _outermost({name.rpartition(".")[0] for name in tensors if not has_adapter([name])})
    tensors = {file_name(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=directory) as scratch:
        config.save_pretrained(scratch)
        save_file(tensors, Path(scratch) / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_CONFIG_NAME):
            os.replace(Path(scratch) / name, directory / name)


def _outermost(modules: set[str]) -> list[str] | None:
    """The modules that are not inside another one, sorted; None if there are none."""
    return sorted(name for name in modules if not any(name.startswith(f"{other}.") for other in modules)) or None


__all__ = ["LowRankUpdate", "apply_updates", "has_adapter", "low_rank_updates", "read_adapter_config", "write_adapter"]
