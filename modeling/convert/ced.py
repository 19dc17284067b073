"""CED (Dinkel et al., 2024), with the names of the original `.pt` files or of the models on the Hub."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from ..configuration_ced import CedAudioConfig
from .audio_tower import block_rules, shape_of, tower_sizes, with_tower
from .captioner import AUDIO_TOWER, ConvertedCaptioner, captioner_shapes, new_audio_weights
from .provenance import describe_source
from .rules import Drop, LazyTensor, Rename, Rule, Start, apply_rules
from .sources import open_source


LICENSE = "apache-2.0"


@dataclass(frozen=True)
class ResizeTime(Rule):
    """
    Rename time positions (1, width, 1, columns), and fit them to the number of columns of the model.

    They are interpolated linearly if the model has more columns, and cut if it has fewer, as in LAVCap's code.
    """

    pattern: str
    target: str

    def convert(self, source, match, expected):
        name, target = match.string, match.expand(self.target)
        shape, columns = source.shape(name), expected[target][-1]

        def resize() -> torch.Tensor:
            positions = source.read(name)
            if columns <= shape[-1]:
                return positions[..., :columns]
            resized = interpolate(positions.float(), size=(1, columns), mode="bilinear", align_corners=False)
            return resized.to(positions.dtype)

        return {target: LazyTensor(torch.Size([*shape[:-1], columns]), source.dtype(name), resize, name)}


START = r"(?:encoder\.)?"  # of the names on the Hub
RULES = [
    Rename(START + r"init_bn(?:\.1)?\.(\w+)", rf"{AUDIO_TOWER}embeddings.init_bn.\1"),
    Rename(START + r"patch_embed\.proj\.(weight|bias)", rf"{AUDIO_TOWER}embeddings.patch_embeddings.\1"),
    ResizeTime(START + "time_pos_embed", f"{AUDIO_TOWER}embeddings.time_pos_embed"),
    Rename(START + "freq_pos_embed", f"{AUDIO_TOWER}embeddings.freq_pos_embed"),
    *block_rules(START + "blocks", "layers", norm=r"norm([12])"),
    Rename(START + r"norm\.(weight|bias)", rf"{AUDIO_TOWER}norm.\1"),
    Drop(r"front_end\..*", "front end, computed by the feature extractor"),
    Drop(r"outputlayer\..*", "classifier"),
]


def convert(source: Path, captioner: ConvertedCaptioner) -> ConvertedCaptioner:
    """
    Replace the audio tower of a captioner by CED. Reads no data.

    The options of the tower, such as `mel_pooling`, are those of the captioner if it has a CED tower. A linear layer
    to the width of the image tokens starts with random weights.

    Args:
        source: the `.pt` file, or the folder of a model from the Hub.
        captioner: the captioner.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `source` has unknown or missing tensors, or the shape of a tensor is wrong.
    """
    weights = open_source(source)
    start = "encoder." if any(name.startswith("encoder.") for name in weights.names()) else ""
    sizes = tower_sizes(weights, f"{start}patch_embed.proj.weight", f"{start}blocks")
    _, _, rows, _ = shape_of(weights, f"{start}freq_pos_embed", 4)
    sizes["num_mel_bins"] = rows * sizes["patch_size"]
    shape_of(weights, f"{start}time_pos_embed", 4)
    config = with_tower(captioner.config, CedAudioConfig.model_type, sizes)
    initial = {rf"{AUDIO_TOWER}proj\..*": Start(new_audio_weights(config))}
    conversion = apply_rules(weights, RULES, captioner_shapes(config, AUDIO_TOWER), initial)
    return captioner.with_part(config, conversion, (AUDIO_TOWER,), describe_source(source, "ced", LICENSE))


__all__ = ["convert"]
