"""The plan of a stage: parameters by part, memory of each device, operations of a step, and hours."""

from dataclasses import dataclass, field
from math import ceil

import torch
from torch import nn

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioTowers
from dali_llava.train.arguments import StageArguments
from dali_llava.train.planning.engines import ENGINES, held_memory
from dali_llava.train.planning.stage_model import StageModel
from dali_llava.train.planning.steps import Batch, trace_captioning, trace_training_step
from dali_llava.train.precision import AUTOCAST, frozen_dtype


TEXT_TOKENS = 128  # of a question with LLaVA-1.5's system prompt, about 70, and of a caption
TFLOPS = 125.0  # 40% of the 312 TFLOP/s of an A100 in bfloat16
WRAPPERS = ("captioner", "model", "towers")  # modules that contain the parts
BANDWIDTH = 2e12  # bytes per second that decoding reads from the memory of an A100 with 80 GB
# Clips of the corpora of the paper, for hours without the corpora.
CLIPS = {
    ("audioset", "unbalanced_train"): 500_000,  # kept by the pre-filter
    ("audioset", "balanced_train"): 20_000,
    ("audiocaps", "train"): 48_595,
}


@dataclass
class Part:
    """Parameters of a part of the model, those that train, and their bytes."""

    parameters: int = 0
    trained: int = 0
    bytes: int = 0


@dataclass
class Plan:
    """
    What a stage needs.

    Attributes:
        parts: parameters by part, on all devices together.
        memory: bytes of one device in training by use. Gradients and activations are those of the moment at which
            their sum is largest.
        captioning: bytes of one device that captions the clips by use, before the training; empty if it does not.
        sequence, samples: tokens of the longest sample, and samples per update on all devices.
        flops: floating-point operations of an update on all devices.
        steps: number of updates, None if the number of clips is unknown.
        hours: time of the training and of the captioning by phase, at the assumed throughput.
    """

    parts: dict[str, Part]
    memory: dict[str, int]
    captioning: dict[str, int]
    sequence: int
    samples: int
    flops: int
    steps: int | None
    hours: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of one device that the stage needs."""
        return max(sum(self.memory.values()), sum(self.captioning.values()))


def plan_stage(
    arguments: StageArguments,
    stage: StageModel,
    config: LlavaAudioConfig,
    engine: str = "ddp",
    gpus: int = 1,
    text_tokens: int = TEXT_TOKENS,
    clips: int | None = None,
    tflops: float = TFLOPS,
    frames: int = 1,
) -> Plan:
    """
    Plan a stage without allocating its model. The code of the model runs on tensors without storage.

    Args:
        arguments: arguments of the stage.
        stage: what it loads and trains.
        config: configuration of the base model.
        engine: a key of `ENGINES`.
        gpus: number of devices.
        text_tokens: tokens of a question and its answer.
        clips: number of clips; by default `max_samples`, or the size of the paper's corpus.
        tflops: assumed throughput of a device, in 10^12 operations per second.
        frames: number of images of a sample, in a stage that shows several.

    Raises:
        ValueError: an argument is out of its range, or the engine is unknown.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: unknown engine '{engine}'; known: {', '.join(ENGINES)}.")
    for name, value in (("gpus", gpus), ("text_tokens", text_tokens), ("tflops", tflops), ("clips", clips)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: must be positive, not {value}.")
    clips = clips or arguments.max_samples or CLIPS.get((arguments.dataset, arguments.split))
    size = arguments.per_device_train_batch_size
    if clips:
        size = min(size, ceil(clips / gpus))
    accumulation = arguments.gradient_accumulation_steps
    dtype, attention = base_dtype(arguments, config), base_attention(arguments)
    chosen = ENGINES[engine]
    text = 0 if issubclass(stage.model_class, LlavaAudioTowers) else text_tokens
    if not text or getattr(arguments, "frame", None) is not None:
        frames = 1
    measurements, batches = [], [Batch(config, inputs, size, text, frames) for inputs in stage.samples]
    for batch in batches:
        model = stage.on_meta(config, dtype, attention)
        parts, held = count_parts(model), held_memory(model, chosen, gpus)
        if arguments.activation_checkpointing:
            model.activation_checkpointing_enable()
        share = 1 / gpus if chosen.gradients else 1.0
        autocast = AUTOCAST.get(arguments.mixed_precision)
        measurements.append(trace_training_step(model, batch, autocast, accumulation, share))
    largest = max(measurements, key=lambda each: each.peak + each.gradients)
    memory = held | {"gradients": largest.gradients, "activations": largest.peak}
    # Several kinds of samples are drawn with the same frequency.
    flops = sum(each.flops for each in measurements) // len(measurements) * accumulation * gpus
    steps = _steps(arguments, clips, size * gpus)
    plan = Plan(parts, memory, {}, max(each.sequence for each in batches), size * accumulation * gpus, flops, steps)
    if steps is not None:
        plan.hours["training"] = steps * flops / gpus / tflops / 1e12 / 3600
    if hasattr(arguments, "caption_batch_size") and arguments.captions is None:
        _add_captioning(plan, arguments, config, gpus, text_tokens, clips, tflops, frames)
    return plan


def base_dtype(arguments: StageArguments, config: LlavaAudioConfig) -> torch.dtype:
    """Return the dtype of the frozen parts."""
    stored = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    chosen = frozen_dtype(arguments, stored)
    if isinstance(chosen, str):
        return stored or torch.float32 if chosen == "auto" else getattr(torch, chosen)
    return chosen


def base_attention(arguments: StageArguments) -> str | None:
    """Return the attention to trace, or None for the default. Only eager attention stores the attention matrices."""
    return "eager" if arguments.attn_implementation == "eager" else None


def count_parts(model: nn.Module) -> dict[str, Part]:
    """Count the parameters of a module that a stage trains, by the parts of the captioner, and its objective."""
    parts: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        own = next(each for each in name.split(".") if each not in WRAPPERS)
        part = parts.setdefault(own, Part())
        part.parameters += parameter.numel()
        part.trained += parameter.numel() * parameter.requires_grad
        part.bytes += parameter.nbytes
    return parts


def _steps(arguments: StageArguments, clips: int | None, samples: int) -> int | None:
    if arguments.max_steps > 0:
        return arguments.max_steps
    if clips is None:
        return None
    batches = ceil(clips / samples)
    return ceil(arguments.num_train_epochs * ceil(batches / arguments.gradient_accumulation_steps))


def _add_captioning(plan, arguments, config, gpus, text_tokens, clips, tflops, frames) -> None:
    """Add the captioning of the clips, which precedes the distillation. Each device holds the whole captioner."""
    size, new_tokens = arguments.caption_batch_size, arguments.caption_max_new_tokens
    batch = Batch(config, ("image", "audio", "prefix"), size, text_tokens, frames)
    dtype = base_dtype(arguments, config)
    used, weights = trace_captioning(config, batch, dtype, new_tokens, base_attention(arguments))
    plan.captioning = {"weights": weights, "cache": used.cache, "activations": used.peak - used.cache}
    if clips is not None:
        seconds = used.flops / tflops / 1e12 + new_tokens * (weights + used.cache) / BANDWIDTH
        plan.hours["captioning"] = ceil(clips / (size * gpus)) * seconds / 3600
