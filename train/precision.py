"""The dtypes of a stage: what trains is float32, and the frozen parts have a dtype that suits the autocast."""

import torch
from transformers import TrainingArguments
from transformers.utils.generic import is_flash_attention_requested

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioTowers


FROZEN_DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(arguments: TrainingArguments) -> None:
    """
    Check `frozen_dtype` and `attn_implementation` against the autocast and the device.

    Raises:
        ValueError: a value is unknown, or values do not run together. The message names the remedy.
    """
    dtype, autocast, attention = arguments.frozen_dtype, arguments.mixed_precision, arguments.attn_implementation
    if dtype not in FROZEN_DTYPES:
        raise ValueError(f"frozen_dtype: unknown dtype '{dtype}'; known: {', '.join(FROZEN_DTYPES)}.")
    if autocast == "fp16" and arguments.device.type == "cpu":
        raise ValueError("fp16: a CPU has no float16 autocast; use --bf16 true instead.")
    if autocast in AUTOCAST and dtype in ("bfloat16", "float16") and getattr(torch, dtype) != AUTOCAST[autocast]:
        raise ValueError(f"frozen_dtype: {dtype} does not run under {autocast} autocast; use auto or float32.")
    if attention and autocast not in AUTOCAST and is_flash_attention_requested(None, attention):
        raise ValueError(
            f"attn_implementation: {attention} computes in 16 bit, but what trains is float32; add --bf16 true."
        )


def check_attention(name: str, config: LlavaAudioConfig) -> None:
    """
    Check that the towers of a configuration support an attention implementation. Builds them without memory.

    Raises:
        ValueError: the implementation is unknown or not supported.
        ImportError: its package is not installed.
    """
    try:
        with torch.device("meta"):
            LlavaAudioTowers._from_config(config, attn_implementation=name)
    except (ValueError, ImportError) as error:
        raise type(error)(f"attn_implementation: {error}") from error


def frozen_dtype(arguments: TrainingArguments, stored: torch.dtype | None) -> torch.dtype | str:
    """
    The dtype to load the base model in.

    Autocast to one 16-bit dtype does not run on weights of the other, so these are converted.

    Args:
        arguments: arguments of a stage, with `frozen_dtype`.
        stored: dtype of the base model; None if its configuration has none.
    """
    autocast = AUTOCAST.get(arguments.mixed_precision)
    if arguments.frozen_dtype == "auto" and autocast and stored in AUTOCAST.values():
        return autocast
    return arguments.frozen_dtype
