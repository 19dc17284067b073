"""
LLaVA-1.5, in the formats of transformers and of the original program, and our own checkpoints.

transformers 4 writes `language_model.model.*`, `language_model.lm_head.*` and `vision_tower.vision_model.*`; some
versions write `model.language_model.*` and `model.vision_tower.*`. The original program writes the names of Llama,
`model.mm_projector.{0,2}.*`, and no vision tower.
"""

import json
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlavaConfig

from ..configuration_llava_audio import LlavaAudioConfig
from ..stage_checkpoint import STAGE_FILE
from .captioner import (
    AUDIO_PROJECTOR,
    AUDIO_TOWER,
    PREFIX,
    ConvertedCaptioner,
    captioner_shapes,
    new_audio_weights,
    with_fields,
)
from .provenance import describe_source
from .rules import Conversion, Copy, Drop, Grow, Rename, Start, apply_rules
from .sources import Source, open_source


LICENSE, CLIP_LICENSE = "llama2", "mit"
VISION_TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
ROW_MULTIPLE = 64  # a vocabulary grows to a multiple, as transformers' conversion of LLaVA does

CONSTANTS = Drop(r".*(rotary_emb\.inv_freq|\.position_ids)", "constant, computed by the model")
TRANSFORMERS_RULES = [
    CONSTANTS,
    Grow(r"(?:language_model\.)?lm_head\.weight", "lm_head.weight"),
    Grow(
        r"(?:language_model\.model|model\.language_model)\.embed_tokens\.weight",
        "model.language_model.embed_tokens.weight",
    ),
    Rename(r"(?:language_model\.model|model\.language_model)\.(.*)", r"model.language_model.\1"),
    Rename(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.*)", rf"{VISION_TOWER}\1"),
    Rename(r"(?:model\.)?multi_modal_projector\.(.*)", rf"{PROJECTOR}\1"),
]
ORIGINAL_RULES = [
    CONSTANTS,
    Grow(r"lm_head\.weight", "lm_head.weight"),
    Grow(r"model\.embed_tokens\.weight", "model.language_model.embed_tokens.weight"),
    Rename(r"model\.(layers\..*|norm\.weight)", r"model.language_model.\1"),
    Rename(r"model\.mm_projector\.0\.(.*)", rf"{PROJECTOR}linear_1.\1"),
    Rename(r"model\.mm_projector\.2\.(.*)", rf"{PROJECTOR}linear_2.\1"),
]
CLIP_RULES = [
    CONSTANTS,
    Drop(r"text_model\..*|text_projection\.weight|logit_scale", "text encoder of CLIP"),
    Drop(r"visual_projection\.weight", "CLIP's projection to its text encoder"),
    Rename(r"(?:vision_model\.)?(.*)", rf"{VISION_TOWER}\1"),
]
EMBEDDINGS = (
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.embed_tokens.weight",
)


def convert(
    source: Path, tokenizer, vision: Path | None = None, audio_config: dict | None = None
) -> ConvertedCaptioner:
    """
    Start a captioner from a LLaVA, or open a checkpoint of ours. Reads no data.

    A LLaVA gets an audio tower and a prefix with random weights, and a copy of its image projector for audio.

    Args:
        source: folder of LLaVA in the format of transformers, of an original LLaVA, or of our checkpoint.
        tokenizer: its tokenizer, with the placeholders. The vocabulary grows if the model has no rows for them.
        vision: folder of the CLIP model of an original LLaVA.
        audio_config: configuration of the audio tower of a LLaVA; CAV-MAE by default.

    Raises:
        FileNotFoundError: the configuration or weights are missing.
        ValueError: the folder contains another model, or its weights do not fit its configuration; or `vision` is
            missing, not needed or does not fit.
    """
    fields = read_config(source)
    model_type = fields.get("model_type")
    if "mm_vision_tower" in fields:
        return _convert_original(source, fields, tokenizer, vision, audio_config)
    if vision is not None:
        raise ValueError(f"{vision}: {source} contains a vision tower; leave out --vision")
    weights = open_source(source)
    if model_type == LlavaAudioConfig.model_type:
        return _open_own(weights, tokenizer)
    native = LlavaConfig.from_dict(fields)
    config = start_config(native, weights, tokenizer, audio_config, describe_source(source, "llava", LICENSE))
    conversion = apply_rules(
        weights, tied_rules(TRANSFORMERS_RULES, config), captioner_shapes(config), _initial(config)
    )
    return new_captioner(source, config, conversion, tokenizer)


def read_config(folder: Path) -> dict:
    """
    The fields of the configuration of a LLaVA or of our captioner.

    Raises:
        FileNotFoundError: `folder` has no configuration.
        ValueError: the configuration is not of a LLaVA, or the folder contains a stage.
    """
    path = Path(folder) / "config.json"
    if (Path(folder) / STAGE_FILE).is_file():
        raise ValueError(f"{folder}: contains a stage; run `dali-llava merge {folder} MERGED` and give MERGED")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it; give the folder of a LLaVA")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON configuration; copy it again from the model's source") from error
    known = model_type in (LlavaConfig.model_type, LlavaAudioConfig.model_type)
    if not known and "mm_vision_tower" not in fields:
        raise ValueError(f"{path}: model_type is {model_type!r}; give a LLaVA-1.5 or a model of this package")
    return fields


def _open_own(weights: Source, tokenizer) -> ConvertedCaptioner:
    config = LlavaAudioConfig.from_pretrained(weights.path)
    for name, token_id in _token_ids(tokenizer).items():
        if getattr(config, name) != token_id:
            raise ValueError(
                f"{weights.path}: {name} is {getattr(config, name)} in config.json, but {token_id} in the tokenizer; "
                "copy the whole folder again"
            )
    rules = tied_rules([Rename(r"(.*)", r"\1")], config)
    return new_captioner(weights.path, config, apply_rules(weights, rules, captioner_shapes(config)), tokenizer)


def _convert_original(source: Path, fields: dict, tokenizer, vision: Path | None, audio_config) -> ConvertedCaptioner:
    """See `convert`."""
    projector = fields.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(f"{source}: mm_projector_type {projector!r} is not supported; give a LLaVA-1.5 (mlp2x_gelu)")
    tower = fields["mm_vision_tower"]
    if vision is None:
        raise ValueError(f"{source}: an original LLaVA has no vision tower; add --vision with the folder of {tower}")
    clip_config = AutoConfig.from_pretrained(vision)
    clip_config = getattr(clip_config, "vision_config", clip_config)
    if clip_config.model_type != "clip_vision_model":
        raise ValueError(f"{vision}: model_type is {clip_config.model_type!r}, not CLIP; give the folder of {tower}")
    if clip_config.hidden_size != fields["mm_hidden_size"]:
        raise ValueError(
            f"{vision}: the vision tower has width {clip_config.hidden_size}, but the projector of {source} takes "
            f"{fields['mm_hidden_size']}; give the folder of {tower}"
        )
    selected = fields.get("mm_vision_select_feature", "patch")
    text = {name: value for name, value in fields.items() if name in LlamaConfig().to_dict() and name != "model_type"}
    native = LlavaConfig(
        vision_config=clip_config.to_dict(),
        text_config=LlamaConfig(**text).to_dict(),
        image_seq_length=(clip_config.image_size // clip_config.patch_size) ** 2,
        vision_feature_layer=fields["mm_vision_select_layer"],
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[selected],
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        dtype=fields.get("torch_dtype"),
    )
    entry = describe_source(source, "llava", LICENSE)
    weights, clip = open_source(source), open_source(vision)
    config = start_config(native, weights, tokenizer, audio_config, entry)
    config = with_fields(config, sources=[*config.sources, describe_source(vision, "clip", CLIP_LICENSE)])
    expected = captioner_shapes(config)
    of_clip = {name: shape for name, shape in expected.items() if name.startswith(VISION_TOWER)}
    of_llava = {name: shape for name, shape in expected.items() if name not in of_clip}
    rules = tied_rules(ORIGINAL_RULES, config)
    conversion = apply_rules(clip, CLIP_RULES, of_clip) | apply_rules(weights, rules, of_llava, _initial(config))
    return new_captioner(source, config, conversion, tokenizer)


def _token_ids(tokenizer) -> dict[str, int]:
    tokens = ("image", "audio", "prefix")
    return {f"{name}_token_index": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in tokens}


def start_config(native: LlavaConfig, weights: Source, tokenizer, audio_config: dict | None, entry: dict):
    """The configuration of a new captioner from a LLaVA, and `entry` as its source."""
    embeddings = next((name for name in EMBEDDINGS if name in weights.names()), None)
    if embeddings is None:
        raise ValueError(f"{weights.path}: has no {EMBEDDINGS[0]}; give the whole weights of a LLaVA")
    rows = weights.shape(embeddings)[0]
    fields = native.to_dict()
    for name in ("model_type", "architectures", "auto_map"):
        fields.pop(name, None)
    grown = rows if len(tokenizer) <= rows else -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE
    fields["text_config"] |= {"vocab_size": grown}
    layers = native.vision_feature_layer
    width = native.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return LlavaAudioConfig(
        **fields | _token_ids(tokenizer),
        audio_config={"output_size": width} | (audio_config or {}),
        sources=[entry | {"vocabulary": rows}],
    )


def tied_rules(rules: list, config: LlavaAudioConfig) -> list:
    """The rules, with one for the head of a language model that shares its weights with the embeddings."""
    if config.tie_word_embeddings:
        return [Drop(r"(?:language_model\.)?lm_head\.weight", "shares its weights with the embeddings"), *rules]
    return rules


def _initial(config: LlavaAudioConfig) -> dict:
    new = Start(new_audio_weights(config))
    return {rf"{AUDIO_PROJECTOR}(.*)": Copy(rf"{PROJECTOR}\1"), rf"{AUDIO_TOWER}.*": new, rf"{PREFIX}.*": new}


def new_captioner(source: Path, config: LlavaAudioConfig, conversion: Conversion, tokenizer) -> ConvertedCaptioner:
    """The captioner with the generation config of its source, or the special tokens of the tokenizer."""
    defaults = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if (Path(source) / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(source)
    else:
        generation_config = GenerationConfig(**defaults)
    generation_config.pad_token_id = tokenizer.pad_token_id
    if not generation_config.do_sample:  # a saved configuration must not set them without sampling
        generation_config.temperature = generation_config.top_p = generation_config.top_k = None
    return ConvertedCaptioner(config, conversion, generation_config, {Path(source).name: conversion.report()})


__all__ = ["convert", "new_captioner", "read_config", "start_config", "tied_rules"]
