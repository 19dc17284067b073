"""
A captioner from a language model of transformers and a vision tower.

The language model has not seen an image yet: the projectors are new, and so is the vision tower if its folder has a
configuration without weights. Pre-train the projector on image captions before the stages of DALI.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ..configuration_llava_audio import LlavaAudioConfig
from .captioner import AUDIO_PROJECTOR, SEED, ConvertedCaptioner, captioner_shapes, new_audio_weights, with_fields
from .llava import CLIP_RULES, CONSTANTS, PROJECTOR, VISION_TOWER, new_captioner, start_config, tied_rules
from .provenance import UNKNOWN, describe_source
from .rules import Conversion, Grow, Rename, Start, apply_rules
from .sources import PICKLED, Source, open_source


EMBEDDINGS = "model.embed_tokens.weight"
RULES = [
    CONSTANTS,
    Grow(r"lm_head\.weight", "lm_head.weight"),
    Grow(r"model\.embed_tokens\.weight", "model.language_model.embed_tokens.weight"),
    Rename(r"model\.(.*)", r"model.language_model.\1"),
]


def language_model_file(source: Path) -> tuple[Path, str | None]:
    """
    The folder of a language model and the name of its GGUF file in it, or None if its weights are in another format.

    Args:
        source: a folder, or a `.gguf` file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is another kind of file.
    """
    if source.is_dir():
        return source, None
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file or folder; check the path")
    if source.suffix != ".gguf":
        raise ValueError(f"{source}: not a .gguf file; give the folder of a language model or a .gguf file")
    return source.parent, source.name


def open_language_model(source: Path) -> tuple[PreTrainedConfig, Source]:
    """
    Open the configuration and the weights of a language model.

    The weights of a GGUF file are dequantised to float32 in memory; those of a folder are read when they are written.

    Raises:
        FileNotFoundError: the file, the folder or the weights in it are missing.
        ImportError: a GGUF file is given, and the package gguf is missing.
        ValueError: the folder contains another kind of model.
    """
    folder, gguf_file = language_model_file(source)
    if gguf_file is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        return model.config, Source(source, {source: model.state_dict()})
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{folder}: {config.model_type} is not a language model; give the folder of a language model")
    return config, open_source(folder)


def convert(
    source: Path, tokenizer, vision: Path | None = None, audio_config: dict | None = None
) -> ConvertedCaptioner:
    """
    Compose a captioner from a language model and a vision tower. Embeddings of new tokens start as the mean.

    Args:
        source: folder or `.gguf` file of the language model.
        tokenizer: its tokenizer, with the placeholders.
        vision: folder of a CLIP or SigLIP model, or of its vision tower. Without weights in it, the tower is random.
        audio_config: configuration of the audio tower; see `LlavaAudioConfig`.

    Raises:
        FileNotFoundError, ImportError, ValueError: a source, named in the message, is missing, damaged or unsuitable.
    """
    if vision is None:
        raise ValueError(
            f"{source}: a language model has no vision tower; add --vision with the folder of CLIP or SigLIP"
        )
    text_config, words = open_language_model(source)
    if EMBEDDINGS not in words.names():
        raise ValueError(f"{source}: has no {EMBEDDINGS}; only language models with the names of Llama are supported")
    vision_config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    has_class_token = not vision_config.model_type.startswith("siglip")
    native = LlavaConfig(
        vision_config=vision_config.to_dict(),
        # without the format of the file that the weights come from
        text_config={k: v for k, v in text_config.to_dict().items() if k != "quantization_config"},
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_select_strategy="default" if has_class_token else "full",
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=text_config.dtype,
    )
    config = start_config(native, words, tokenizer, audio_config, describe_source(source, "language-model", UNKNOWN))
    config = with_fields(config, sources=[*config.sources, describe_source(vision, "vision", UNKNOWN)])
    expected = captioner_shapes(config)
    text = apply_rules(words, tied_rules(RULES, config), _named(expected, "model.language_model.", "lm_head."))
    image = _convert_vision_tower(vision, _named(expected, VISION_TOWER))
    rest = {name: shape for name, shape in expected.items() if name not in text.tensors | image.tensors}
    audio = {r"model\.(audio_tower|prefix)\..*": Start(new_audio_weights(config))}
    new = apply_rules(Source(source, {}), [], rest, audio | {r".*": Start(_new_weights(config))})
    return new_captioner(source, config, text | image | new, tokenizer)


def _named(expected: Mapping[str, torch.Size], *prefixes: str) -> dict[str, torch.Size]:
    return {name: shape for name, shape in expected.items() if name.startswith(prefixes)}


def _convert_vision_tower(folder: Path, expected: Mapping[str, torch.Size]) -> Conversion:
    """The vision tower; no weights if the folder has none."""
    if not any(ending in file.name for file in folder.iterdir() for ending in (".safetensors", *PICKLED)):
        return Conversion({})
    return apply_rules(open_source(folder), CLIP_RULES, expected)


def _new_weights(config: LlavaAudioConfig) -> Callable[[], Mapping[str, torch.Tensor]]:
    """Returns a function that initialises the vision tower and the projectors, which start equal, for `Start`."""

    @cache
    def weights() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            tower = AutoModel.from_config(config.vision_config)
            projector = LlavaMultiModalProjector(config)
        parts = {VISION_TOWER: tower.float(), PROJECTOR: projector.float(), AUDIO_PROJECTOR: projector}
        return {start + name: each for start, part in parts.items() for name, each in part.state_dict().items()}

    return weights


__all__ = ["convert", "language_model_file", "open_language_model"]
