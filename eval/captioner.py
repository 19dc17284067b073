"""Loading a captioner: the model and its processor, with checks. All commands and stages use it."""

import torch

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.loading import find_checkpoint
from dali_llava.processing import LlavaAudioProcessor


def load_captioner(
    name: str,
    *,
    model_class: type = LlavaAudioForConditionalGeneration,
    device: str | torch.device | None = None,
    strict: bool = True,
    **options,
) -> tuple[torch.nn.Module, LlavaAudioProcessor]:
    """
    Load a model in evaluation mode and its processor, from a whole checkpoint or a stage.

    Args:
        name: folder or Hub id.
        model_class: the part of the captioner to load, a subclass of `LlavaAudioPreTrainedModel`.
        device: device to move the model to; not supported with `device_map` or `quantization_config`.
        strict: whether to require all weights. Otherwise missing weights are initialised, as for a new model.
        options: keyword arguments of `from_pretrained`, such as `dtype`, `device_map` and `quantization_config`.

    Raises:
        FileNotFoundError: the checkpoint does not exist, or a part of it is missing.
        ConnectionError: the Hub cannot be reached, and the checkpoint is not in the cache.
        ValueError: the checkpoint is of another model, damaged, incomplete, or does not fit its base; or the processor
            writes another number of audio placeholders than there are audio tokens.
    """
    checkpoint = find_checkpoint(name).check()
    source, hub_kwargs = checkpoint.processor
    try:
        model, report = model_class.from_pretrained(name, output_loading_info=True, **checkpoint.hub_kwargs, **options)
        processor = LlavaAudioProcessor.from_pretrained(source, **hub_kwargs)
    except (ValueError, FileNotFoundError, ImportError):
        raise
    except Exception as error:  # safetensors, tokenizers and the Hub each have their own exceptions
        message = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot be loaded ({message}); copy or save the model again") from error
    missing = sorted(report["missing_keys"])
    if strict and missing:
        raise ValueError(
            f"{name}: {len(missing)} weights are missing, the first is {missing[0]}; copy or save the model again"
        )
    model.config.check_processor(processor)
    processor.prefix_modalities = tuple(model.config.prefix_modalities)
    return (model if device is None else model.to(device)).eval(), processor
