"""The parts of the captioner that a stage on captions can train in full, and the samples that use them."""

from collections.abc import Sequence

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.modeling.fusion import CONCATENATE
from dali_llava.train.data.collators import MODALITIES


HEARD = ("audio", "audiovisual")

# part of the captioner -> modalities that use it
PARTS = {
    "audio_projector": HEARD,
    "audio_tower": HEARD,
    "multi_modal_projector": ("image", "audiovisual"),
    "language_model": tuple(MODALITIES),
    "prefix": HEARD,
    "fusion": HEARD,
}


def part_users(config: LlavaAudioConfig) -> dict[str, tuple[str, ...]]:
    """Return the modalities that use each part of a captioner with this configuration."""
    users = PARTS | {"prefix": tuple(name for name in HEARD if name in config.prefix_modalities)}
    if config.fusion == CONCATENATE:
        users["fusion"] = ()
    else:  # one projector for both modalities of a sample
        users["multi_modal_projector"] = ("image",) if config.vision_pooling == "patches" else ()
    return users


def check_parts(arguments, config: LlavaAudioConfig) -> None:
    """
    Check that the modalities use the parts to train.

    Args:
        arguments: arguments of the stage, with `modalities`, `train_parts` and `lora`.
        config: configuration of the captioner to train.

    Raises:
        ValueError: a modality or a part is unknown, or no modality uses a part.
    """
    for name, known in (("modalities", MODALITIES), ("train_parts", PARTS)):
        if unknown := sorted(set(getattr(arguments, name)) - set(known)):
            raise ValueError(f"{name}: unknown {', '.join(unknown)}; choose from {', '.join(known)}.")
    users = part_users(config)
    for field in ("train_parts", "lora"):
        for part in getattr(arguments, field) or ():
            if part in users and not set(users[part]) & set(arguments.modalities):
                raise ValueError(
                    f"{field}: {', '.join(arguments.modalities)} does not use the {part} of {arguments.base_model}; "
                    f"add one of the modalities {', '.join(users[part]) or '(none)'}, or train other parts."
                )


def trained_modules(parts: Sequence[str]) -> list[str]:
    """Return the names of the modules of the parts. The head belongs to the language model."""
    return [f"model.{part}" for part in parts] + (["lm_head"] if "language_model" in parts else [])
