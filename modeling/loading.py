"""
Loading a checkpoint by name: checks, the chain of stages, and a single state dict for transformers.

    name -> find_checkpoint -> whole checkpoint: transformers loads it directly
                               stages: base tensors + tensors of each stage -> from_pretrained(None, state_dict=...)

The weights are merged before they are loaded, so dtype, device map, offloading and quantisation apply to the weights
of a stage as to all others.
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
from transformers import GenerationConfig, LlavaConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .adapters import LowRankUpdate, apply_updates
from .configuration_llava_audio import LlavaAudioConfig
from .stage_checkpoint import STAGE_WEIGHTS, Stage, stage_chain


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
HUB_TIMEOUT = 10  # seconds to wait for the Hub's first answer
OPTIONAL = {"_raise_exceptions_for_missing_entries": False}


@dataclass(frozen=True)
class Checkpoint:
    """
    A captioner on disk or on the Hub: a whole checkpoint, and the stages on top of it.

    Attributes:
        source, hub_kwargs: the requested folder or Hub id, and the options to read it.
        stages: the stages, the last one first; empty for a whole checkpoint.
    """

    source: str
    hub_kwargs: dict
    stages: list[Stage]

    @property
    def base(self) -> tuple[str, dict]:
        """Folder or Hub id of the whole checkpoint at the end of the chain, and the options to read it."""
        if self.stages:
            return self.stages[-1].base, self.stages[-1].base_hub_kwargs
        return self.source, self.hub_kwargs

    @property
    def config(self) -> tuple[str, dict]:
        """Folder or Hub id of the configuration, and the options to read it: the last one that is not an adapter."""
        places = zip(self.places, self.stages, strict=False)
        return next((place for place, stage in places if stage.trained is not None), self.base)

    @property
    def places(self) -> list[tuple[str, dict]]:
        """Folders or Hub ids of the stages and the base, the last stage first, and the options to read them."""
        return [(self.source, self.hub_kwargs)] + [(stage.base, stage.base_hub_kwargs) for stage in self.stages]

    @property
    def processor(self) -> tuple[str, dict]:
        """Folder or Hub id of the processor, and the options to read it: the last stage that has one, or the base."""
        for source, hub_kwargs in self.places:
            if cached_file(source, PROCESSOR_NAME, **OPTIONAL, **hub_kwargs) is not None:
                return source, hub_kwargs
        raise FileNotFoundError(
            f"{self.source}: no {PROCESSOR_NAME} in it; save the processor there with processor.save_pretrained(DIR)."
        )

    @property
    def weight_files(self) -> list[str]:
        """Paths of the safetensors files of the base and of the stages. Files on the Hub are downloaded."""
        stages = [cached_file(stage.source, STAGE_WEIGHTS, **stage.hub_kwargs) for stage in reversed(self.stages)]
        return _weight_files(*self.base, variant=None) + stages

    def check(self) -> "Checkpoint":
        """
        Check that all parts of the checkpoint exist and belong to this model. Reads only small files.

        Raises:
            FileNotFoundError: a configuration or weights are missing.
            ValueError: a configuration cannot be read or is for another model.
        """
        _check_config(*self.config)
        if self.stages:
            _check_config(*self.base)
        _weight_files(*self.base, variant=None)
        return self

    def check_model_types(self) -> None:
        """
        Check that the configurations that exist belong to this model.

        Raises:
            ValueError: a configuration cannot be read or is for another model.
        """
        for source, hub_kwargs in {str(place): place for place in (self.config, self.base)}.values():
            if (path := cached_file(source, CONFIG_NAME, **OPTIONAL, **hub_kwargs)) is not None:
                _check_model_type(source, path)


def find_checkpoint(name_or_path: str | os.PathLike, **hub_kwargs) -> Checkpoint:
    """
    Find a checkpoint by name. Reads only small JSON files.

    Args:
        name_or_path: a folder, or the id of a repository on the Hub.
        hub_kwargs: options of `from_pretrained` in `HUB_OPTIONS`. `revision` and `subfolder` apply to the given
            repository, not to the base model of a stage.

    Raises:
        FileNotFoundError: the folder, the repository on the Hub, or the base model does not exist.
        ConnectionError: the Hub cannot be reached, and the repository is not in the cache.
        ValueError: a `stage.json` is damaged, or the chain of stages contains a cycle.
    """
    hub_kwargs = reach_hub(name_or_path, hub_kwargs)
    return Checkpoint(str(name_or_path), hub_kwargs, stage_chain(name_or_path, **hub_kwargs))


def reach_hub(name_or_path: str | os.PathLike, hub_kwargs: Mapping) -> dict:
    """
    Return `hub_kwargs` for reading `name_or_path`, with `local_files_only` if the Hub cannot be reached.

    It sends a single request to the Hub, without retries.

    Raises:
        FileNotFoundError: the name is not a folder or a repository on the Hub.
        ConnectionError: the Hub cannot be reached, and the repository is not in the cache.
    """
    name, hub_kwargs = str(name_or_path), dict(hub_kwargs)
    if Path(name).is_dir():
        return hub_kwargs
    if Path(name).exists():
        raise FileNotFoundError(f"{name}: is a file; give the folder of the model.")
    revision = hub_kwargs.get("revision")
    reason = "offline mode is on"
    if not (is_offline_mode() or hub_kwargs.get("local_files_only")):
        try:
            HfApi().model_info(name, revision=revision, token=hub_kwargs.get("token"), timeout=HUB_TIMEOUT)
            return hub_kwargs
        except (HFValidationError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise FileNotFoundError(f"{name}: no such folder, and {_refusal(error, revision)}") from error
        except Exception as error:  # the HTTP client of huggingface_hub has its own exceptions
            reason = f"the Hub cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
    file = "/".join(filter(None, (hub_kwargs.get("subfolder"), CONFIG_NAME)))
    try:
        cached = try_to_load_from_cache(name, file, cache_dir=hub_kwargs.get("cache_dir"), revision=revision)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such folder, and {_refusal(error, revision)}") from error
    if not isinstance(cached, str):
        raise ConnectionError(
            f"{name}: no such folder, and no such model in the cache of the Hub; {reason}; check the name and the "
            "network"
        )
    return hub_kwargs | {"local_files_only": True}


def _refusal(error: Exception, revision: str | None) -> str:
    if isinstance(error, HFValidationError):
        return "not a valid ORG/NAME of a model on the Hub; check the path"
    if isinstance(error, RevisionNotFoundError):
        return f"the model with this name on the Hub has no revision {revision!r}"
    if isinstance(error, GatedRepoError):
        return "the model with this name on the Hub is gated; request access on its page and run `hf auth login`"
    return "the Hub has no public model with this name; check the spelling, or run `hf auth login` for a private model"


def _check_config(source: str, hub_kwargs: dict) -> None:
    path = cached_file(source, CONFIG_NAME, **OPTIONAL, **hub_kwargs)
    if path is None:
        raise FileNotFoundError(f"{source}: no {CONFIG_NAME} in it; give a folder written by save_pretrained")
    _check_model_type(source, path)


def _check_model_type(source: str, path: str) -> None:
    try:
        model_type = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON configuration; copy it again from the model's source") from error
    expected = LlavaAudioConfig.model_type
    if model_type == LlavaConfig.model_type:
        raise ValueError(
            f"{path}: is a LLaVA without audio; run `dali-llava convert llava {source} OUT` and load OUT instead"
        )
    if model_type != expected:
        raise ValueError(f"{path}: model_type is {model_type!r}, not {expected!r}; give a model of this package")


def _weight_files(source: str, hub_kwargs: dict, variant: str | None) -> list[str]:
    """Paths of the safetensors files of a whole checkpoint. Files on the Hub are downloaded."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if variant:
            stem, _, ending = name.rpartition(".")
            name = f"{stem}.{variant}.{ending}"
        path = cached_file(source, name, **OPTIONAL, **hub_kwargs)
        if path is not None and path.endswith(".json"):
            return get_checkpoint_shard_files(source, path, **hub_kwargs)[0]
        if path is not None:
            return [path]
    raise FileNotFoundError(f"{source}: no weights (*.safetensors) in it; copy the whole folder again")


def check_device_map(model_class: type[nn.Module], checkpoint: Checkpoint, options: dict) -> None:
    """
    Check that a `device_map` with disk offloading puts tied weights in the same place.

    Raises:
        ValueError: two tied weights are in different places, which accelerate cannot dispatch.
    """
    device_map = options.get("device_map")
    if not isinstance(device_map, Mapping) or "disk" not in device_map.values():
        return
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        source, hub_kwargs = checkpoint.config
        config = model_class.config_class.from_pretrained(config or source, **hub_kwargs)
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
    Keyword arguments of `from_pretrained(None, ...)` that load a chain of stages as a single checkpoint.

    Args:
        checkpoint: a checkpoint with at least one stage.
        captioner: the class of the captioner. Stages use the names of its weights.
        options: keyword arguments of `from_pretrained` from the caller.
        unread: patterns of captioner weights that the loaded model does not have. These weights are not read.

    Raises:
        ValueError: the weights of a stage and its base do not match. The message contains the first such name.
        OSError: weights are missing.
    """
    options = dict(options)
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        source, hub_kwargs = checkpoint.config
        config = captioner.config_class.from_pretrained(config or source, **hub_kwargs)
    options.setdefault("config", checkpoint.source if checkpoint.config[0] == checkpoint.source else config)
    source, hub_kwargs = checkpoint.base
    variant = options.pop("variant", None)
    device_map = options.get("device_map")
    if isinstance(device_map, Mapping) and "disk" in device_map.values() and not options.get("offload_folder"):
        raise ValueError(f"{checkpoint.source}: offloading a stage to disk needs a folder; pass offload_folder=DIR.")
    weights, reference = merge_weights(checkpoint, captioner, config, options.get("key_mapping"), variant, unread)
    if device_map is not None:
        # Offloading to disk looks up each weight by its own name, including tied weights.
        for target, tied in reference.all_tied_weights_keys.items():
            if tied in weights:
                weights.setdefault(target, weights[tied])
    options["state_dict"] = weights
    if options.get("generation_config") is None:
        for place, place_kwargs in checkpoint.places:  # without one, the model creates it from its configuration
            if cached_file(place, GENERATION_CONFIG_NAME, **OPTIONAL, **place_kwargs) is not None:
                options["generation_config"] = GenerationConfig.from_pretrained(place, **place_kwargs)
                break
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
    Merge the weights of the base with the trained weights and the adapter of each stage.

    Args:
        checkpoint, captioner, unread: see `assembled_options`.
        config: configuration of the captioner.
        key_mapping, variant: see transformers' `from_pretrained`; they apply to the base.

    Returns:
        The merged weights, which are memory-mapped except for those with an adapter, and a captioner without weights
        on the meta device.

    Raises:
        ValueError, OSError: see `assembled_options`.
    """
    with torch.device("meta"), init.no_init_weights():
        reference = captioner(config)
    expected = reference.state_dict()
    source, hub_kwargs = checkpoint.base
    trained: dict[str, torch.Tensor] = {}
    updates: dict[str, list[LowRankUpdate]] = {}
    for stage in reversed(checkpoint.stages):
        replaced, adapted = stage.changes()
        replaced = {name: weight for name, weight in replaced.items() if not _without_fusion(name, expected)}
        for name, change in (replaced | adapted).items():
            if name not in expected or expected[name].shape != change.shape:
                have = "no such weight" if name not in expected else f"shape {tuple(expected[name].shape)}"
                raise ValueError(
                    f"{stage.source}: {name} has shape {tuple(change.shape)}, but its base model {stage.base} has "
                    f"{have}; use the base and the configuration that the stage was trained on."
                )
        trained |= replaced
        for name in replaced:
            updates.pop(name, None)
        for name, update in adapted.items():
            updates.setdefault(name, []).append(update)
    files = _weight_files(source, hub_kwargs, variant)
    stored = {name: path for path in files for name in _names_in(path)}
    names = _model_names(stored, reference, expected, key_mapping)
    skipped = {name for name in names if any(re.search(pattern, names[name]) for pattern in unread)}
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys() if name not in skipped}
    in_model = {names[name]: tensor for name, tensor in weights.items()}
    for name in trained | updates:
        # A packed weight has an integer dtype or is stored under several names.
        packed = name in in_model and not in_model[name].is_floating_point()
        if packed or any(key != name and key.startswith((f"{name}.", f"{name}:", f"{name}_")) for key in in_model):
            raise ValueError(
                f"{source}: {name} is stored quantised, so the stage {checkpoint.source} cannot replace it; use the "
                "stage with the unquantised base model, and quantise when loading (quantization_config=...)."
            )
    for name, changes in updates.items():
        if name not in trained and name not in names.values():
            raise ValueError(f"{source}: has no weight {name}, which an adapter of {checkpoint.source} changes.")
        if (weight := trained.get(name, in_model.get(name))) is not None:  # None: not read
            trained[name] = apply_updates(weight, changes)
    return {name: tensor for name, tensor in weights.items() if names[name] not in trained} | trained, reference


def _without_fusion(name: str, expected: Mapping) -> bool:
    """Whether a weight belongs to the audio projector of an earlier stage, in place of which there is now a fusion."""
    return name.startswith("model.audio_projector.linear_") and "model.audio_projector.weight" in expected


def _names_in(path: str) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or save the model again.") from error


def _model_names(
    names: Mapping, model: nn.Module, expected: Mapping[str, torch.Tensor], key_mapping: dict[str, str] | None
) -> dict[str, str]:
    """Name in a file -> name in the model, with the renamings that transformers applies when loading."""
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
    """Turn off the AVX512-BF16 kernel of bitsandbytes on CPU for 4-bit layers with an unsupported width."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.in_features % module.weight.blocksize:
            module.support_avx512bf16_for_cpu = False


__all__ = ["Checkpoint", "find_checkpoint", "reach_hub"]
