"""LoRA adapters for the stages that train the captioner: their layers, and adding them to a model."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import is_peft_available

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.modeling.loading import find_checkpoint
from dali_llava.train.arguments import AdapterArguments
from dali_llava.train.base_model import whole_weights


PARTS = ("language_model", "audio_tower")


def adapter_config(arguments: AdapterArguments, config: LlavaAudioConfig | None = None):
    """
    The adapter that the arguments of a stage describe. Call it before the weights of the base model are loaded.

    Args:
        arguments: arguments of the stage.
        config: configuration of the captioner; by default that of `arguments.base_model`.

    Returns:
        A `peft.LoraConfig`, or None without `lora`. Its targets are a pattern of module paths.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an argument is out of its range, a part is unknown, or a target matches no linear layer.
    """
    if arguments.lora in (None, [], ["none"]):
        return None
    if unknown := sorted(set(arguments.lora) - set(PARTS)):
        raise ValueError(f"lora: unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}.")
    for name, valid, expected in (
        ("lora_rank", arguments.lora_rank >= 1, "at least 1"),
        ("lora_alpha", arguments.lora_alpha > 0, "positive"),
        ("lora_dropout", 0 <= arguments.lora_dropout < 1, "at least 0 and less than 1"),
    ):
        if not valid:
            raise ValueError(f"{name}: must be {expected}, not {getattr(arguments, name)}.")
    if not is_peft_available():
        raise ImportError('lora: needs peft, which is not installed; run pip install "dali-llava[peft]".')
    from peft import LoraConfig

    if config is None:
        source, hub_kwargs = find_checkpoint(arguments.base_model).config
        config = LlavaAudioConfig.from_pretrained(source, **hub_kwargs)
    with torch.device("meta"), init.no_init_weights(), whole_weights():
        captioner = LlavaAudioForConditionalGeneration(config)
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=target_pattern(captioner, arguments.lora, arguments.lora_targets),
    )


def target_pattern(
    captioner: LlavaAudioForConditionalGeneration, parts: Sequence[str], targets: Sequence[str] | None = None
) -> str:
    r"""
    Regular expression of the paths of the adapted layers, such as `model\.audio_tower\.layers\.\d+\.mlp\.fc1`.

    Args:
        captioner: the captioner; its weights are not read.
        parts: parts of the captioner, from `PARTS`.
        targets: last components of the paths; all linear layers of the parts by default.

    Raises:
        ValueError: a target is not in any part, or a part has none of the targets.
    """
    linear = {
        part: [
            f"model.{part}.{name}"
            for name, module in captioner.model.get_submodule(part).named_modules()
            if isinstance(module, nn.Linear)
        ]
        for part in parts
    }
    chosen = {
        part: [path for path in paths if targets is None or any(path.endswith(f".{name}") for name in targets)]
        for part, paths in linear.items()
    }
    paths = sorted(path for paths in chosen.values() for path in paths)
    wrong = [name for name in targets or () if not any(path.endswith(f".{name}") for path in paths)]
    bare = [part for part in parts if not chosen[part]]
    if wrong or bare:
        have = "; ".join(
            f"{part} has {', '.join(sorted({path.rpartition('.')[2] for path in paths})) or 'none'}"
            for part, paths in linear.items()
        )
        raise ValueError(
            f"lora_targets: {', '.join(wrong or targets or ['the default'])} matches no linear layer of "
            f"{' or '.join(parts if wrong else bare)}; {have}."
        )
    return "|".join(sorted({_numbered(path) for path in paths}))


def _numbered(path: str) -> str:
    """Regular expression of a module path with any layer numbers."""
    return r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in path.split("."))


def add_adapter(
    captioner: LlavaAudioForConditionalGeneration, config, seed: int
) -> LlavaAudioForConditionalGeneration:
    """
    Add a new adapter to a captioner and train it, in float32, beside what the captioner trains already.

    Args:
        captioner: the captioner, after `train_only`.
        config: from `adapter_config`; with None, the captioner does not change.
        seed: seed of the initial values, which do not depend on the random numbers drawn before.

    Returns:
        the captioner.

    Raises:
        ValueError: an adapted layer is already trained in full.
    """
    if config is None:
        return captioner
    trained = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        captioner.add_adapter(config)  # freezes everything else
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, parameter in captioner.named_parameters():
        if ".base_layer." in name and parameter.requires_grad:
            layer = name.partition(".base_layer.")[0]
            raise ValueError(f"lora: {layer} is already trained in full; train it in full or with an adapter.")
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return captioner
