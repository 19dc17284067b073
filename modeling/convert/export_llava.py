"""The way back: the image captioner in a captioner, with the names that LLaVA has on the Hub."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaConfig

from ..configuration_llava_audio import LlavaAudioConfig
from .llava import read_config
from .rules import LazyTensor
from .sources import Source, open_source
from .writer import write_weights


# The names of transformers 4, which all versions read.
NAMES = (
    (r"lm_head\.(.*)", r"language_model.lm_head.\1"),
    (r"model\.language_model\.(.*)", r"language_model.model.\1"),
    (r"model\.vision_tower\.(.*)", r"vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
)
OF_AUDIO = r"model\.(audio_tower|audio_projector|prefix)\..*"
VOCABULARY = (r"lm_head\.weight", r"model\.language_model\.embed_tokens\.weight")
OWN_FIELDS = ("audio_config", "audio_token_index", "sources", "auto_map", "architectures", "model_type")


def export_llava(source: Path, folder: Path) -> None:
    """
    Write the image captioner of a captioner, one tensor at a time.

    Rows that `convert` added to the vocabulary are removed, unless the image token is one of them.

    Args:
        source: folder of the captioner.
        folder: an existing folder.

    Raises:
        FileNotFoundError: the configuration or weights are missing.
        ValueError: the folder contains another model or a stage, or a weight is unknown.
        OSError: the disk is too small.
    """
    fields = read_config(source)
    if fields.get("model_type") != LlavaAudioConfig.model_type:
        raise ValueError(f"{source}: is a LLaVA already; give a captioner of this package")
    config = LlavaAudioConfig.from_pretrained(source)
    rows = next((entry["vocabulary"] for entry in config.sources if "vocabulary" in entry), 0)
    rows = rows if rows > config.image_token_id else config.text_config.vocab_size
    weights = open_source(source)
    tensors = {}
    for name in weights.names():
        target = next((match.expand(new) for old, new in NAMES if (match := re.fullmatch(old, name))), None)
        if target is not None:
            tensors[target] = _exported(weights, name, rows)
        elif not re.fullmatch(OF_AUDIO, name):
            raise ValueError(f"{source}: {name} is unknown; give a captioner of this package")
    own = [name for name in config.to_dict() if name in OWN_FIELDS or name.startswith("prefix_")]
    exported = {name: value for name, value in config.to_dict().items() if name not in own}
    exported["text_config"]["vocab_size"] = rows
    write_weights(folder, tensors)
    LlavaConfig(**exported, architectures=["LlavaForConditionalGeneration"]).save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(folder)


def _exported(weights: Source, name: str, rows: int) -> LazyTensor:
    tensor = LazyTensor(weights.shape(name), weights.dtype(name), lambda: weights.read(name), name)
    if not any(re.fullmatch(pattern, name) for pattern in VOCABULARY):
        return tensor
    return replace(tensor, shape=torch.Size([rows, *tensor.shape[1:]]), read=lambda: weights.read(name)[:rows])


__all__ = ["export_llava"]
