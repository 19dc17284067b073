"""Load the base model of a stage, and select what the stage trains."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dali_llava.eval.captioner import load_captioner
from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.modeling.loading import Checkpoint, find_checkpoint, merge_weights
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.arguments import StageArguments
from dali_llava.train.precision import check_attention, frozen_dtype


# The script that writes a stage, by the first part of the stage's name.
SCRIPTS = {"prefix": "train/prefix_tune.py", "align": "train/align.py"}


def check_base(arguments: StageArguments, after: Sequence[str] = ()) -> LlavaAudioConfig:
    """
    Check a stage's base model before weights are loaded. Reads only its small files.

    Args:
        arguments: arguments of the stage.
        after: required earlier stages, keys of `SCRIPTS`. A complete checkpoint does not record its stages and is
            accepted.

    Returns:
        the configuration of the base model.

    Raises:
        ValueError: if no base model is given, or it does not exist, is not a captioner, or lacks a stage of `after`.
        ValueError, ImportError: as in `check_attention`.
        FileNotFoundError, ConnectionError: as in `find_checkpoint` and `Checkpoint.check`.
    """
    base = arguments.base_model
    if not base:
        raise ValueError("no base_model: give the folder of the previous stage, --base_model DIR.")
    if not Path(base).exists() and (Path(base).is_absolute() or Path(base).parent.is_dir()):
        raise ValueError(f"base_model {base}: no such directory; run the stage that writes it first.")
    checkpoint = find_checkpoint(base).check()
    config = _config(checkpoint)
    if arguments.attn_implementation:
        with whole_weights():
            check_attention(arguments.attn_implementation, config)
    names = [stage.name for stage in checkpoint.stages]
    missing = [stage for stage in after if not any(name.partition(":")[0] == stage for name in names)]
    if names and missing:
        raise ValueError(
            f"base_model {base} only has the stages {', '.join(reversed(names))}; run {SCRIPTS[missing[0]]} first."
        )
    return config


def load_base(
    arguments: StageArguments,
    model_class: type = LlavaAudioForConditionalGeneration,
    trained: Sequence[str] = (),
    config: LlavaAudioConfig | None = None,
) -> tuple[nn.Module, LlavaAudioProcessor]:
    """
    Load the base model of a stage and its processor. Call `check_base` first.

    The configuration keeps the stored dtype, so the saved stage does not depend on `arguments.frozen_dtype`.

    Args:
        arguments: arguments of the stage.
        model_class: the part of the captioner that the stage needs. Weights that the base model lacks are initialised.
        trained: names of the submodules that the stage trains. They are loaded in float32, without rounding the
            weights of earlier stages to the dtype of the frozen parts.
        config: configuration of the model; by default that of the base model.

    Returns:
        the model and the processor.

    Raises:
        OSError, ValueError: as in `load_captioner`.
    """
    checkpoint = find_checkpoint(arguments.base_model)
    options = {"attn_implementation": arguments.attn_implementation}
    if config is None:
        config = _config(checkpoint)
    else:
        options["config"] = config
    options["dtype"] = frozen_dtype(arguments, config.dtype)
    with whole_weights():
        model, processor = load_captioner(arguments.base_model, model_class=model_class, strict=False, **options)
        for name in trained:
            part = model.get_submodule(name).float()
            part.load_state_dict(_trained_weights(checkpoint, config, name), strict=False)
    model.config.dtype = config.dtype
    return model, processor


def _config(checkpoint: Checkpoint) -> LlavaAudioConfig:
    source, hub_kwargs = checkpoint.config
    return LlavaAudioConfig.from_pretrained(source, **hub_kwargs)


def _trained_weights(checkpoint: Checkpoint, config: LlavaAudioConfig, part: str) -> dict[str, torch.Tensor]:
    """The weights of a part that stages of a checkpoint have trained, in float32, by their names in the part."""
    if not checkpoint.stages:
        return {}
    prefix = "lm_head." if part == "lm_head" else f"model.{part.removeprefix('model.')}."
    others = f"^(?!{re.escape(prefix)})"
    weights, _ = merge_weights(checkpoint, LlavaAudioForConditionalGeneration, config, unread=[others])
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


@contextmanager
def whole_weights() -> Iterator[None]:
    """
    Build and load models with whole weights in this block, although ZeRO-3 is on.

    DeepSpeed shards the weights when the engine is created. Until then, each rank can compute features and captions.
    """
    from transformers.integrations import deepspeed

    before = deepspeed.deepspeed_config()
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before is not None:
            deepspeed.set_hf_deepspeed_config(reference())


def train_only(model: nn.Module, *parts: nn.Module) -> None:
    """Freeze `model` except for `parts`, which are converted to float32. A frozen tower builds no autograd graph."""
    model.requires_grad_(False)
    for part in parts:
        part.float().requires_grad_(True)
