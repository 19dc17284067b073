"""
A captioner from a language model of transformers and a vision tower.

The language model has not seen an image yet: the projectors are new, and so is the vision tower if its folder has a
configuration without weights. Pre-train the projector on image captions before the stages of DALI.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import CONFIG_NAME

from ..configuration_llava_audio import LlavaAudioConfig
from .captioner import AUDIO_PROJECTOR, SEED, ConvertedCaptioner, captioner_shapes, new_audio_weights, with_source
from .rules import Conversion, Drop, Grow, Rename, Start, apply_rules
from .sources import Source, open_source


LANGUAGE_MODEL, HEAD = "model.language_model.", "lm_head."
VISION_TOWER, IMAGE_PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
# without the fields that refer to the file, not to the model
FILE_FIELDS = ("quantization_config", "_name_or_path", "architectures", "transformers_version")
VISION_RULES = [
    Drop(r".*position_ids", "computed from the image size"),
    Drop(r"(?:text_model|text_projection)\..*|logit_scale|logit_bias", "of the text tower"),
    Drop(r"visual_projection\..*", "projection for the comparison with texts"),
    Rename(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..*)", VISION_TOWER + r"\1"),
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
    text_config, language_model = open_language_model(source)
    vision_config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    has_class_token = not vision_config.model_type.startswith("siglip")
    text_fields = {name: value for name, value in text_config.to_dict().items() if name not in FILE_FIELDS}
    text_fields["vocab_size"] = max(text_config.vocab_size, len(tokenizer))
    config = LlavaAudioConfig(
        text_config=text_fields,
        vision_config=vision_config.to_dict(),
        audio_config={"output_size": vision_config.hidden_size, **(audio_config or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        audio_token_index=tokenizer.convert_tokens_to_ids("<audio>"),
        prefix_token_index=tokenizer.convert_tokens_to_ids("<prefix>"),
        vision_feature_select_strategy="default" if has_class_token else "full",
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=text_config.dtype,
    )
    config = with_source(config, kind="language-model", name=source.name)
    config = with_source(config, kind="vision", name=vision.name)
    expected = captioner_shapes(config)
    words = _convert_language_model(language_model, config)
    image = _convert_vision_tower(vision, config)
    rest = {name: shape for name, shape in expected.items() if name not in words.tensors | image.tensors}
    initial = {
        r"model\.(audio_tower|prefix)\..*": Start(new_audio_weights(config)),
        r".*": Start(_new_weights(config)),
    }
    new = apply_rules(Source(source, {}), [], rest, initial)
    tensors = words.tensors | image.tensors | new.tensors
    return ConvertedCaptioner(
        config=config,
        conversion=Conversion({name: tensors[name] for name in expected}),
        generation_config=_generation_config(source, text_config),
        reports={source.name: words.report(), vision.name: image.report(), "new weights": new.report()},
    )


def _convert_language_model(source: Source, config: LlavaAudioConfig) -> Conversion:
    head = Grow(r"lm_head\.weight", "lm_head.weight")
    if config.tie_word_embeddings:
        head = Drop(r"lm_head\.weight", "tied to the embeddings")
    rules = [
        Drop(r".*\.rotary_emb\.inv_freq", "computed from the configuration"),
        Grow(r"model\.(embed_tokens\.weight)", LANGUAGE_MODEL + r"\1"),
        Rename(r"model\.(.*)", LANGUAGE_MODEL + r"\1"),
        head,
    ]
    expected = captioner_shapes(config, LANGUAGE_MODEL) | captioner_shapes(config, HEAD)
    return apply_rules(source, rules, expected)


def _convert_vision_tower(folder: Path, config: LlavaAudioConfig) -> Conversion:
    """The vision tower; no weights if the folder has a configuration alone."""
    if [file.name for file in folder.iterdir() if file.suffix != ".md"] == [CONFIG_NAME]:
        return Conversion({})
    return apply_rules(open_source(folder), VISION_RULES, captioner_shapes(config, VISION_TOWER))


def _new_weights(config: LlavaAudioConfig) -> Callable[[], Mapping[str, torch.Tensor]]:
    """Returns a function that initialises the vision tower and the projectors, which start equal, for `Start`."""

    @cache
    def weights() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            tower = AutoModel.from_config(config.vision_config)
            projector = LlavaMultiModalProjector(config)
        parts = {VISION_TOWER: tower.float(), IMAGE_PROJECTOR: projector.float(), AUDIO_PROJECTOR: projector}
        return {start + name: each for start, part in parts.items() for name, each in part.state_dict().items()}

    return weights


def _generation_config(source: Path, text_config: PreTrainedConfig) -> GenerationConfig:
    folder, _ = language_model_file(source)
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_model_config(text_config)


__all__ = ["convert", "language_model_file", "open_language_model"]
