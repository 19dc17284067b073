"""What the converters of audio towers share: transformer blocks with fused queries, keys and values."""

import re

from ..configuration_llava_audio import LlavaAudioConfig
from .captioner import AUDIO_TOWER, with_fields
from .rules import Rename, Rule, Split
from .sources import Source


HEAD_WIDTH = 64  # of all released towers; the weights do not tell the number of heads


def block_rules(blocks: str, layers: str, norm: str = "norm") -> list[Rule]:
    """
    Rules for the blocks `blocks.N` of a source, which become `layers.N` of the audio tower.

    Args:
        blocks: pattern of the name of the blocks, such as `blocks_a`.
        layers: name of the layers.
        norm: pattern of the norms, whose group is the number of the norm if the names end with something else.
    """
    block, layer = rf"{blocks}\.(\d+)\.", rf"{AUDIO_TOWER}{layers}.\1."
    return [
        Rename(block + norm + r"\.(weight|bias)", layer + r"norm\2.\3"),
        Split(block + r"attn\.qkv\.(weight|bias)", [layer + rf"attention.{part}_proj.\2" for part in "qkv"]),
        Rename(block + r"attn\.proj\.(weight|bias)", layer + r"attention.o_proj.\2"),
        Rename(block + r"mlp\.(fc[12])\.(weight|bias)", layer + r"mlp.\2.\3"),
    ]


def shape_of(source: Source, name: str, ndim: int) -> tuple[int, ...]:
    """
    The shape of a tensor from which a size of the model is read.

    Raises:
        ValueError: `source` has no such tensor, or the tensor has another number of dimensions.
    """
    if name not in source.names():
        raise ValueError(f"{source.path}: has no {name}; give the released weights of this kind of model")
    shape = tuple(source.shape(name))
    if len(shape) != ndim:
        raise ValueError(f"{source.path}: {name} has shape {shape}, but should have {ndim} dimensions")
    return shape


def count_blocks(source: Source, blocks: str) -> int:
    """Number of blocks `blocks.N` of a source."""
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in source.names())
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def tower_sizes(source: Source, patches: str, blocks: str) -> dict[str, int]:
    """
    Fields of the configuration of a tower that the shapes of its weights determine.

    Args:
        source: the weights.
        patches: name of the weight of the patch embedding.
        blocks: name of the blocks, such as `blocks_a`.

    Raises:
        ValueError: a tensor is missing, or the width is not a multiple of the width of a head.
    """
    width, _, patch_size, _ = shape_of(source, patches, 4)
    inner, _ = shape_of(source, f"{blocks}.0.mlp.fc1.weight", 2)
    if width % HEAD_WIDTH:
        raise ValueError(f"{source.path}: {patches} has width {width}, which is not a multiple of {HEAD_WIDTH}")
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": count_blocks(source, blocks),
        "num_attention_heads": width // HEAD_WIDTH,
        "patch_size": patch_size,
    }


def with_tower(config: LlavaAudioConfig, model_type: str, sizes: dict[str, int], **fields) -> LlavaAudioConfig:
    """
    The configuration of a captioner with another audio tower.

    The options of the tower are those of the captioner if it has a tower of this type, and the default ones otherwise.

    Args:
        config: the configuration of the captioner.
        model_type: of the tower.
        sizes: fields of the configuration of the tower.
        fields: other fields of the configuration of the captioner.
    """
    audio = config.audio_config.to_dict() if config.audio_config.model_type == model_type else {}
    audio |= {"model_type": model_type, "output_size": config.audio_config.output_size, **sizes}
    return with_fields(config, audio_config=audio, **fields)


__all__ = ["block_rules", "count_blocks", "shape_of", "tower_sizes", "with_tower"]
