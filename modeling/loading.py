"""
From a checkpoint's name to weights: checks, the chain of stages, and one state dict that transformers loads.

    name -> find_checkpoint -> whole: transformers loads it as it is
                               stages: base tensors + each stage's tensors -> from_pretrained(None, state_dict=...)

The weights are merged before any is loaded, so that dtype, device map, offloading and quantisation treat a stage's
weights like any other.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import (
    CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_llava_audio import LlavaAudioConfig
from .stage_checkpoint import Stage, stage_chain


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
HUB_TIMEOUT = 10  # seconds to wait for the Hub's first answer
OPTIONAL = {"_raise_exceptions_for_missing_entries": False}


@dataclass(frozen=True)
class Checkpoint:
    """
    A captioner on disk or on the Hub: a whole checkpoint, and the stages that are laid over it.

    Attributes:
        source, hub_kwargs: the folder or Hub id that was asked for, and the options to read it with.
        stages: the last first; empty for a whole checkpoint.
    """

    source: str
    hub_kwargs: dict
    stages: list[Stage]

    @property
    def base(self) -> tuple[str, dict]:
        """Folder or Hub id of the whole checkpoint at the end of the chain, and the options to read it with."""
        if self.stages:
            return self.stages[-1].base, self.stages[-1].base_hub_kwargs
        return self.source, self.hub_kwargs

    @property
    def processor(self) -> tuple[str, dict]:
        """Folder or Hub id that holds the processor, and the options to read it with: the stage, or one below it."""
        places = [(self.source, self.hub_kwargs)]
        places += [(stage.base, stage.base_hub_kwargs) for stage in self.stages]
        for source, hub_kwargs in places:
            if cached_file(source, PROCESSOR_NAME, **OPTIONAL, **hub_kwargs) is not None:
                return source, hub_kwargs
        raise FileNotFoundError(
            f"{self.source}: no {PROCESSOR_NAME} in it; save the processor there, processor.save_pretrained(DIR)."
        )

    def check(self) -> "Checkpoint":
        """
        Check that every part of the checkpoint is there and belongs to this model, from its small files alone.

        Raises:
            FileNotFoundError: a configuration or weights are missing.
            ValueError: a configuration is unreadable or of another model.
        """
        _check_config(self.source, self.hub_kwargs)
        if self.stages:
            _check_config(*self.base)
        _weight_files(*self.base, variant=None)
        return self


def find_checkpoint(name_or_path: str | os.PathLike, **hub_kwargs) -> Checkpoint:
    """
    The checkpoint of a name: a folder or the id of a repository on the Hub. Reads the `stage.json` files only.

    Args:
        hub_kwargs: those of `HUB_OPTIONS`, as for any `from_pretrained`. `revision` and `subfolder` apply to the
            named repository, not to the base model of a stage.

    Raises:
        FileNotFoundError: no such folder, no such repository on the Hub, or a missing base model.
        ConnectionError: the Hub cannot be reached, and the repository is not in the cache.
        ValueError: a damaged `stage.json`, or a chain that leads back to itself.
    """
    hub_kwargs = reach_hub(name_or_path, hub_kwargs)
    return Checkpoint(str(name_or_path), hub_kwargs, stage_chain(name_or_path, **hub_kwargs))


def reach_hub(name_or_path: str | os.PathLike, hub_kwargs: Mapping) -> dict:
    """
    `hub_kwargs` with which `name_or_path` can be read: with `local_files_only` where the Hub cannot be reached.

    The Hub is asked once, without retries.

    Raises:
        FileNotFoundError: neither a folder nor a repository on the Hub.
        ConnectionError: the Hub cannot be reached, and the repository is not in the cache.
    """
    name, hub_kwargs = str(name_or_path), dict(hub_kwargs)
    if Path(name).is_dir():
        return hub_kwargs
    if Path(name).exists():
        raise FileNotFoundError(f"{name}: is a file; name the model's folder.")
    revision = hub_kwargs.get("revision")
    reason = "offline mode is on"
    if not (is_offline_mode() or hub_kwargs.get("local_files_only")):
        try:
            HfApi().model_info(name, revision=revision, token=hub_kwargs.get("token"), timeout=HUB_TIMEOUT)
            return hub_kwargs
        except (HFValidationError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise FileNotFoundError(f"{name}: no such folder, and {_refusal(error, revision)}") from error
        except Exception as error:  # of the HTTP client, which is huggingface_hub's choice
            reason = f"the Hub cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
    file = "/".join(filter(None, (hub_kwargs.get("subfolder"), CONFIG_NAME)))
    try:
        cached = try_to_load_from_cache(name, file, cache_dir=hub_kwargs.get("cache_dir"), revision=revision)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such folder, and {_refusal(error, revision)}") from error
    if not isinstance(cached, str):
        raise ConnectionError(
            f"{name}: no such folder; as a model of the Hub it is not in the cache, and {reason}; check the name and "
            "the network"
        )
    return hub_kwargs | {"local_files_only": True}


def _refusal(error: Exception, revision: str | None) -> str:
    if isinstance(error, HFValidationError):
        return "not the ORG/NAME of a model on the Hub either; check the path"
    if isinstance(error, RevisionNotFoundError):
        return f"the model of that name on the Hub has no revision {revision!r}"
    if isinstance(error, GatedRepoError):
        return "the model of that name on the Hub is gated; ask for access on its page and run `hf auth login`"
    return "the Hub has no public model of that name; check the spelling, or run `hf auth login` for a private one"


def _check_config(source: str, hub_kwargs: dict) -> None:
    path = cached_file(source, CONFIG_NAME, **OPTIONAL, **hub_kwargs)
    if path is None:
        raise FileNotFoundError(f"{source}: no {CONFIG_NAME} in it; name the folder that save_pretrained wrote")
    try:
        model_type = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON configuration; copy it again from the model's source") from error
    expected = LlavaAudioConfig.model_type
    if model_type != expected:
        raise ValueError(f"{path}: model_type is {model_type!r}, not {expected!r}; name a model of this package")


def _weight_files(source: str, hub_kwargs: dict, variant: str | None) -> list[str]:
    """Paths of a whole checkpoint's safetensors files; those on the Hub are downloaded."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if variant:
            stem, _, ending = name.rpartition(".")
            name = f"{stem}.{variant}.{ending}"
        path = cached_file(source, name, **OPTIONAL, **hub_kwargs)
        if path is not None and path.endswith(".json"):
            return get_checkpoint_shard_files(source, path, **hub_kwargs)[0]
        if path is not None:
            return [path]
    raise FileNotFoundError(f"{source}: no weights (*.safetensors) in it; copy the folder again, whole")


def check_device_map(model_class: type[nn.Module], checkpoint: Checkpoint, options: dict) -> None:
    """ValueError for a `device_map` that offloads one of two tied weights to disk, which cannot be dispatched."""
    device_map = options.get("device_map")
    if not isinstance(device_map, Mapping) or "disk" not in device_map.values():
        return
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        config = model_class.config_class.from_pretrained(config or checkpoint.source, **checkpoint.hub_kwargs)
    if not config.tie_word_embeddings:
        return

    def place(name: str):
        while name and name not in device_map:
            name = name.rpartition(".")[0]
        return device_map.get(name)

    for one, other in (model_class._tied_weights_keys or {}).items():
        if place(one) != place(other):
            raise ValueError(f"device_map: {one} and {other} are the same weight; put both in the same place.")


def assembled_options(
    checkpoint: Checkpoint, captioner: type[nn.Module], options: dict, unread: Sequence[str] = ()
) -> dict:
    """
    Keyword arguments of `from_pretrained(None, ...)` that load a chain of stages as one whole checkpoint.

    Args:
        checkpoint: with at least one stage.
        captioner: the class whose weights' names the stages use.
        options: the caller's own keyword arguments of `from_pretrained`.
        unread: patterns of the captioner's weights that the model to load does not have; they are not read.

    Raises:
        ValueError: the weights do not fit together, with the first name that differs.
        OSError: weights are missing.
    """
    options = dict(options)
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        config = captioner.config_class.from_pretrained(config or checkpoint.source, **checkpoint.hub_kwargs)
    source, hub_kwargs = checkpoint.base
    variant = options.pop("variant", None)
    device_map = options.get("device_map")
    if isinstance(device_map, Mapping) and "disk" in device_map.values() and not options.get("offload_folder"):
        raise ValueError(f"{checkpoint.source}: a stage that is offloaded to disk needs a folder, offload_folder=DIR.")
    weights, reference = merge_weights(checkpoint, captioner, config, options.get("key_mapping"), variant, unread)
    if device_map is not None:
        # Offloading to disk looks each weight up by its own name, also a weight that is tied to another.
        for target, tied in reference.all_tied_weights_keys.items():
            if tied in weights:
                weights.setdefault(target, weights[tied])
    options["state_dict"] = weights
    options.setdefault("config", checkpoint.source)
    if options.get("generation_config") is None:
        try:
            options["generation_config"] = GenerationConfig.from_pretrained(source, **hub_kwargs)
        except OSError:
            pass  # the model makes one from its configuration
    return options


@torch.no_grad()
def merge_weights(
    checkpoint: Checkpoint,
    captioner: type[nn.Module],
    config: LlavaAudioConfig,
    key_mapping: dict[str, str] | None = None,
    variant: str | None = None,
    unread: Sequence[str] = (),
) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """
    The weights of the base, each stage's in place of those that it trained, and the captioner without weights.

    The tensors are memory-mapped; the captioner is on the meta device.

    Arguments and errors as in `assembled_options`; `key_mapping` and `variant` as in transformers' `from_pretrained`,
    for the base.
    """
    with torch.device("meta"), init.no_init_weights():
        reference = captioner(config)
    expected = reference.state_dict()
    source, hub_kwargs = checkpoint.base
    trained: dict[str, torch.Tensor] = {}
    for stage in reversed(checkpoint.stages):
        tensors = stage.tensors()
        for name, tensor in tensors.items():
            if name not in expected or expected[name].shape != tensor.shape:
                have = "no such weight" if name not in expected else f"shape {tuple(expected[name].shape)}"
                raise ValueError(
                    f"{stage.source}: {name} has shape {tuple(tensor.shape)}, but its base model {stage.base} has "
                    f"{have}; use the base and the configuration that the stage was trained on."
                )
        trained |= tensors
    files = _weight_files(source, hub_kwargs, variant)
    stored = {name: path for path in files for name in _names_in(path)}
    names = _model_names(stored, reference, expected, key_mapping)
    skipped = {name for name in names if any(re.search(pattern, names[name]) for pattern in unread)}
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys() if name not in skipped}
    in_model = {names[name]: tensor for name, tensor in weights.items()}
    for name in trained:
        # A packed weight is of another type, or lies under several names.
        packed = name in in_model and not in_model[name].is_floating_point()
        if packed or any(key != name and key.startswith((f"{name}.", f"{name}:", f"{name}_")) for key in in_model):
            raise ValueError(
                f"{source}: {name} is stored quantised, so the stage {checkpoint.source} cannot replace it; lay the "
                "stage over the unquantised base model, and quantise when loading (quantization_config=...)."
            )
    return {name: tensor for name, tensor in weights.items() if names[name] not in trained} | trained, reference


def _names_in(path: str) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or save the model again.") from error


def _model_names(
    names: Mapping, model: nn.Module, expected: Mapping[str, torch.Tensor], key_mapping: dict[str, str] | None
) -> dict[str, str]:
    """The model's own name for each name in a file, by the renamings that transformers applies when it loads."""
    conversions = get_model_conversion_mapping(model, key_mapping)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed in expected or name not in expected:
            return renamed
        return name

    return {name: rename(name) for name in names}


def use_general_kernels(model: nn.Module) -> None:
    """Turn off bitsandbytes' fastest CPU kernel for the 4-bit layers whose width it does not support."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.in_features % module.weight.blocksize:
            module.support_avx512bf16_for_cpu = False


__all__ = ["Checkpoint", "find_checkpoint", "reach_hub"]
