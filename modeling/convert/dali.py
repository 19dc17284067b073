"""
The weights of DALI's own code: `audio_backbone.pth`, and beside it `prefix.bin` and `prefixMLP.bin`.

| file | contains |
|---|---|
| `audio_backbone.pth` | CAV-MAE with the linear layer after its audio branch, and the attention of the alignment |
| `prefix.bin` | the prefix, and perhaps the image projector |
| `prefixMLP.bin` | the audio projector after the distillation, or else the image projector; perhaps the prefix |
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..configuration_cav_mae import CavMaeAudioConfig
from . import cav_mae
from .audio_tower import shape_of, with_tower
from .captioner import AUDIO_PROJECTOR, AUDIO_TOWER, PREFIX, ConvertedCaptioner, captioner_shapes
from .provenance import UNKNOWN, describe_source
from .rules import Conversion, Drop, LazyTensor, Rename, Rule, apply_rules
from .sources import Source, open_source


BACKBONE, PREFIX_FILE, PROJECTOR_FILE = "audio_backbone.pth", "prefix.bin", "prefixMLP.bin"
PREFIX_NAME = "model.audio_tower.prefix"
IMAGE_PROJECTOR = "model.multi_modal_projector."

ATTENTION = "alignment_attention."  # of target names; these weights are not part of the captioner
ATTENTION_FILE = "alignment_attention.safetensors"
ATTENTION_OPTIONS = {"num_heads": 8, "temperature": 20.0}  # constants of DALI's code
ATTENTION_RULES = [
    # Crosswise: the attention named after the images weights the audio tokens.
    Rename(r"image_scorer\.(.*)", rf"{ATTENTION}audio_attention.\1"),
    Rename(r"audio_scorer\.(.*)", rf"{ATTENTION}image_attention.\1"),
    *(
        Rename(rf"{letter}_{short}\.(weight|bias)", rf"{ATTENTION}{modality}_{part}.\1")
        for letter, modality in (("a", "audio"), ("i", "image"))
        for short, part in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
]
RULES = [
    *cav_mae.RULES,
    *ATTENTION_RULES,
    Drop(r"vision_tower\..*", "vision tower; that of the image captioner is used"),
]


def convert(source: Path, captioner: ConvertedCaptioner) -> ConvertedCaptioner:
    """
    Replace the audio tower, the audio projector and the prefix of a captioner by those of DALI.

    The attention of the alignment is saved as `alignment_attention.safetensors`. The captioner keeps what a missing
    file would replace. If the audio projector is not the image projector, it was distilled, so that sounds alone are
    captioned without the prefix.

    Args:
        source: the folder of `audio_backbone.pth`, `prefix.bin` and `prefixMLP.bin`, or `audio_backbone.pth` alone.
        captioner: the captioner, whose image captioner is the one that DALI started from.

    Raises:
        FileNotFoundError: `audio_backbone.pth` does not exist.
        ValueError: a file has unknown or missing tensors, or the shape of a tensor is wrong.
    """
    source = Path(source)
    backbone = open_source(source / BACKBONE if source.is_dir() else source)
    files = {name: open_source(source / name) for name in (PREFIX_FILE, PROJECTOR_FILE) if (source / name).is_file()}
    parts = {PREFIX_FILE: [PREFIX], PROJECTOR_FILE: [AUDIO_PROJECTOR]}
    if PREFIX_FILE not in files and PROJECTOR_FILE in files and PREFIX_NAME in files[PROJECTOR_FILE].names():
        parts[PROJECTOR_FILE].append(PREFIX)

    fields = {}
    for name, file in files.items():
        if PREFIX in parts[name]:
            fields["prefix_length"] = shape_of(file, PREFIX_NAME, 2)[0]
        if AUDIO_PROJECTOR in parts[name] and _is_distilled(file, captioner):
            fields["prefix_modalities"] = ["audiovisual"]
    config = with_tower(captioner.config, CavMaeAudioConfig.model_type, cav_mae.sizes(backbone), **fields)

    attention = _attention_shapes(backbone, config.audio_config.output_size)
    converted = [apply_rules(backbone, RULES, captioner_shapes(config, AUDIO_TOWER) | attention)]
    replaces = [AUDIO_TOWER]
    for name, file in files.items():
        expected = {key: each for part in parts[name] for key, each in captioner_shapes(config, part).items()}
        converted.append(apply_rules(file, _rules_of(parts[name]), expected))
        replaces += parts[name]
    tensors = {key: each for conversion in converted for key, each in conversion.tensors.items()}
    whole = Conversion(
        {key: each for key, each in tensors.items() if key not in attention},
        [key for conversion in converted for key in conversion.used],
        {key: each for conversion in converted for key, each in conversion.dropped.items()},
    )
    captioner = captioner.with_part(config, whole, tuple(replaces), describe_source(source, "dali", UNKNOWN))
    if not attention:
        return captioner
    weights = {key.removeprefix(ATTENTION): tensors[key] for key in attention}
    return replace(captioner, files=captioner.files | {ATTENTION_FILE: partial(_write_attention, weights)})


def _rules_of(parts: list[str]) -> list[Rule]:
    """Rules of a file beside `audio_backbone.pth` that uses it for some parts of the captioner."""
    prefix, projector = PREFIX_NAME.replace(".", r"\."), r"model\.mm_projector\."
    return [
        Rename(prefix, f"{PREFIX}weight") if PREFIX in parts else Drop(prefix, f"prefix beside that of {PREFIX_FILE}"),
        *(
            [
                Rename(projector + r"0\.(weight|bias)", rf"{AUDIO_PROJECTOR}linear_1.\1"),
                Rename(projector + r"2\.(weight|bias)", rf"{AUDIO_PROJECTOR}linear_2.\1"),
            ]
            if AUDIO_PROJECTOR in parts
            else [Drop(projector + r"[02]\.(weight|bias)", "image projector beside the prefix")]
        ),
    ]


def _is_distilled(file: Source, captioner: ConvertedCaptioner) -> bool:
    """Whether the projector in a file differs from the image projector, of which the distillation starts as a copy."""
    name = "model.mm_projector.2.bias"
    shape_of(file, name, 1)
    tuned, image = file.read(name), captioner.conversion.tensors[f"{IMAGE_PROJECTOR}linear_2.bias"].read()
    return not torch.equal(tuned, image.to(tuned.dtype))


def _attention_shapes(backbone: Source, width: int) -> dict[str, torch.Size]:
    """Shapes of the weights of the attention by target name; none if the alignment had no attention."""
    if not any(rule.match(name) for rule in ATTENTION_RULES for name in backbone.names()):
        return {}
    linear = {"weight": (width, width), "bias": (width,)}
    multihead = {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
    shapes = {}
    for modality in ("audio", "image"):
        for part in ("query", "key", "value"):
            shapes |= {f"{modality}_{part}.{name}": shape for name, shape in linear.items()}
        shapes |= {f"{modality}_attention.{name}": shape for name, shape in multihead.items()}
        shapes |= {f"{modality}_attention.out_proj.{name}": shape for name, shape in linear.items()}
    return {ATTENTION + name: torch.Size(shape) for name, shape in shapes.items()}


def _write_attention(tensors: dict[str, LazyTensor], path: Path) -> None:
    options = {name: json.dumps(value) for name, value in ATTENTION_OPTIONS.items()}
    weights = {name: each.read().float().contiguous() for name, each in tensors.items()}
    save_file(weights, path, metadata={"format": "pt", **options})


__all__ = ["convert"]
