"""
CAV-MAE (Gong et al., 2023): the audio branch of a `.pth` file.

Audio blocks use `norm1` and `norm2`, the joint block uses its audio norms `norm1_a` and `norm2_a`.
"""

from pathlib import Path

from ..configuration_cav_mae import CavMaeAudioConfig
from .audio_tower import block_rules, count_blocks, shape_of, tower_sizes, with_tower
from .captioner import AUDIO_TOWER, ConvertedCaptioner, captioner_shapes, new_audio_weights
from .provenance import describe_source
from .rules import Drop, Rename, Start, apply_rules
from .sources import Source, open_source


LICENSE = "bsd-2-clause"
RULES = [
    Rename(r"patch_embed_a\.proj\.(weight|bias)", rf"{AUDIO_TOWER}embeddings.patch_embeddings.\1"),
    Rename("pos_embed_a", f"{AUDIO_TOWER}embeddings.position_embeddings"),
    Rename("modality_a", f"{AUDIO_TOWER}embeddings.modality_embedding"),
    *block_rules("blocks_a", "layers", norm=r"norm([12])"),
    *block_rules("blocks_u", "joint_layers", norm=r"norm([12])_a"),
    Rename(r"norm_a\.(weight|bias)", rf"{AUDIO_TOWER}norm.\1"),
    Rename(r"proj\.(weight|bias)", rf"{AUDIO_TOWER}proj.\1"),  # added by DALI
    Drop(r"blocks_a\.\d+\.norm[12]_[av]\..*", "norms that audio blocks do not use"),
    Drop(r"blocks_u\.\d+\.norm[12](_v)?\..*", "norms of the joint block for other inputs"),
    Drop(r"(blocks_v|patch_embed_v|norm_v)\..*|(pos_embed|modality)_v", "visual branch"),
    Drop(r"norm\..*", "norm of the joint tokens"),
    Drop(r"decoder_.*|mask_token", "decoder of the pretraining"),
    Drop(r"mlp_head\..*", "classifier"),
]


def convert(source: Path, captioner: ConvertedCaptioner) -> ConvertedCaptioner:
    """
    Replace the audio tower of a captioner by that of CAV-MAE. Reads no data.

    The linear layer after the tower, which CAV-MAE does not have, starts with random weights.

    Args:
        source: the `.pth` file.
        captioner: the captioner.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `source` has unknown or missing tensors, or the shape of a tensor is wrong.
    """
    weights = open_source(source)
    config = with_tower(captioner.config, CavMaeAudioConfig.model_type, sizes(weights))
    initial = {rf"{AUDIO_TOWER}proj\..*": Start(new_audio_weights(config))}
    conversion = apply_rules(weights, RULES, captioner_shapes(config, AUDIO_TOWER), initial)
    return captioner.with_part(config, conversion, (AUDIO_TOWER,), describe_source(source, "cav-mae", LICENSE))


def sizes(source: Source) -> dict[str, int]:
    """
    Fields of `CavMaeAudioConfig` that the shapes of the weights determine.

    Raises:
        ValueError: a tensor is missing, or has another number of dimensions.
    """
    fields = tower_sizes(source, "patch_embed_a.proj.weight", "blocks_a")
    fields["num_joint_layers"] = count_blocks(source, "blocks_u")
    _, positions, _ = shape_of(source, "pos_embed_a", 3)
    rows = CavMaeAudioConfig.num_mel_bins // fields["patch_size"]
    fields |= {"num_mel_bins": CavMaeAudioConfig.num_mel_bins, "max_length": positions // rows * fields["patch_size"]}
    return fields


__all__ = ["RULES", "convert", "sizes"]
