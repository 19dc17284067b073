"""A captioner that is composed of released weights and not written yet."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save

from ..audio_towers import build_audio_tower
from ..configuration_llava_audio import LlavaAudioConfig
from ..modeling_llava_audio import LlavaAudioForConditionalGeneration
from ..pretrained_llava_audio import LearnedPrefix
from .rules import Conversion
from .writer import write_weights


AUDIO_TOWER = "model.audio_tower."
AUDIO_PROJECTOR = "model.audio_projector."
PREFIX = "model.prefix."
SEED = 0  # of the weights that no source has


@dataclass(frozen=True)
class ConvertedCaptioner:
    """
    The configuration and the weights of a captioner. The weights are read from their sources when they are written.

    Attributes:
        config: the configuration. Its field `sources` lists the sources.
        conversion: the weights.
        generation_config: defaults of `generate`, if a source has them.
        reports: name of each source -> what became of its tensors.
        files: name of each file beside the captioner -> function that writes it.
    """

    config: LlavaAudioConfig
    conversion: Conversion
    generation_config: GenerationConfig | None = None
    reports: dict[str, str] = field(default_factory=dict)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def with_part(
        self, config: LlavaAudioConfig, conversion: Conversion, replaces: tuple[str, ...], source: dict
    ) -> "ConvertedCaptioner":
        """
        The captioner with other weights for some of its parts.

        Args:
            config: the configuration with these parts.
            conversion: the weights of the parts, named as in the captioner.
            replaces: prefixes of the names of the weights that are replaced, such as `(AUDIO_TOWER,)`.
            source: the entry of the source in `config.sources`; see `describe_source`. Its `parts` are those that are
                replaced. Earlier sources lose these parts, and are no longer listed if they have no part left.

        Raises:
            ValueError: the weights together are not those of `config`. The message contains the first such name.
        """
        kept = {name: each for name, each in self.conversion.tensors.items() if not name.startswith(replaces)}
        weights = kept | conversion.tensors
        expected = captioner_shapes(config)
        for name in [*expected, *weights]:
            needed, given = expected.get(name), weights[name].shape if name in weights else None
            if needed != given:
                needed, given = ("none" if shape is None else tuple(shape) for shape in (needed, given))
                raise ValueError(
                    f"{source['name']}: the shape of {name} is {given} in the sources and {needed} in the "
                    "configuration; give weights that belong together"
                )
        parts = [prefix.removeprefix("model.").removesuffix(".") for prefix in replaces]
        sources = [*_without_parts(self.config.sources, parts), source | {"parts": parts}]
        return replace(
            self,
            config=with_fields(config, sources=sources),
            conversion=Conversion({name: weights[name] for name in expected}),
            reports=self.reports | {source["name"]: conversion.report()},
            files={},  # they belong to the audio tower, which each part converter replaces
        )

    def to(self, dtype: torch.dtype) -> "ConvertedCaptioner":
        """The captioner with all floating point weights in `dtype`."""
        config = with_fields(self.config, dtype=dtype)
        return replace(self, config=config, conversion=self.conversion.to(dtype))

    def save(self, folder: str | os.PathLike) -> None:
        """
        Write the configuration, the model code and the weights, one tensor at a time.

        Args:
            folder: an existing folder.

        Raises:
            OSError: the disk is too small.
        """
        config = with_fields(self.config, architectures=[LlavaAudioForConditionalGeneration.__name__])
        write_weights(Path(folder), self.conversion.tensors)
        with torch.device("meta"), init.no_init_weights():
            custom_object_save(LlavaAudioForConditionalGeneration(config), folder)
        config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        for name, write in self.files.items():
            write(Path(folder) / name)


def _without_parts(sources: list[dict], parts: list[str]) -> list[dict]:
    """The sources that give other parts than `parts`. A source without `parts` started the captioner and is kept."""
    kept = []
    for source in sources:
        left = [part for part in source.get("parts", ()) if part not in parts]
        if left or "parts" not in source:
            kept.append(source | ({"parts": left} if left else {}))
    return kept


def captioner_shapes(config: LlavaAudioConfig, part: str = "") -> dict[str, torch.Size]:
    """
    Shapes of the weights of a captioner that its checkpoint contains, without weights that are tied to others.

    Args:
        config: the configuration.
        part: prefix of the names, such as `AUDIO_TOWER`; all weights by default.
    """
    with torch.device("meta"), init.no_init_weights():
        model = LlavaAudioForConditionalGeneration(config)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    weights = model.state_dict()
    return {name: each.shape for name, each in weights.items() if name.startswith(part) and name not in tied}


def new_audio_weights(config: LlavaAudioConfig, seed: int = SEED) -> Callable[[], Mapping[str, torch.Tensor]]:
    """Returns a function that initialises the audio tower and the prefix of `config`, for `Start`."""

    @cache
    def weights() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = build_audio_tower(config.audio_config)
            prefix = LearnedPrefix(config)
            torch.nn.init.normal_(prefix.weight, std=config.prefix_initializer_range)
        parts = {AUDIO_TOWER: tower.float(), PREFIX: prefix.float()}
        return {start + name: each for start, part in parts.items() for name, each in part.state_dict().items()}

    return weights


def with_fields(config: LlavaAudioConfig, **fields) -> LlavaAudioConfig:
    """A copy of `config` with other values for some fields, with all checks."""
    return type(config).from_dict({**config.to_dict(), **fields})


__all__ = [
    "AUDIO_PROJECTOR",
    "AUDIO_TOWER",
    "PREFIX",
    "ConvertedCaptioner",
    "captioner_shapes",
    "new_audio_weights",
    "with_fields",
]
