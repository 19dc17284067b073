"""
The audio towers and their protocol.

A tower consists of a configuration and a model, registered with `AutoConfig` and `AutoModel`:

- `config.output_size`: width of the audio tokens.
- `config.num_audio_tokens(num_frames)`: number of audio tokens for a number of spectrogram frames.
- `config.feature_extractor_kwargs`: arguments of the feature extractor that computes the spectrograms of the tower.
- `model(input_features, input_features_mask=None, **kwargs)`: takes (B, frames, mels) and (B, frames), and returns an
  output with `last_hidden_state` (B, tokens, output_size). The padding may be on either side of a clip.
- `model.token_mask(input_features_mask)`: (B, frames) -> (B, tokens), True for the tokens of valid frames.

`AUDIO_TOWERS` lists the towers that are saved with a checkpoint. Other packages add towers by calling
`AutoConfig.register` and `AutoModel.register`. Import such a package before you load a checkpoint with its tower.
"""

from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_cav_mae import CavMaeAudioConfig
from .configuration_ced import CedAudioConfig
from .modeling_cav_mae import CavMaeAudioModel
from .modeling_ced import CedAudioModel


AUDIO_TOWERS = {
    CavMaeAudioConfig: CavMaeAudioModel,
    CedAudioConfig: CedAudioModel,
}

CONFIG_MEMBERS = ("output_size", "num_audio_tokens", "feature_extractor_kwargs")

for config_class, model_class in AUDIO_TOWERS.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)


def known_audio_towers() -> list[str]:
    """The `model_type` of each registered tower, sorted."""
    registered = {config_class.model_type: config_class for config_class in AUDIO_TOWERS}
    registered |= CONFIG_MAPPING._extra_content  # added by `AutoConfig.register`; transformers has no towers
    return sorted(name for name, config_class in registered.items() if hasattr(config_class, "num_audio_tokens"))


def build_audio_config(audio_config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    """
    The configuration of an audio tower.

    Args:
        audio_config: a dict of fields with the `model_type`, a configuration, or None for the default values.
        default: the `model_type` to use if `audio_config` has none.

    Raises:
        ValueError: the `model_type` is unknown, or its configuration does not follow the protocol. The message lists
            the known towers.
    """
    known = f"known audio towers: {', '.join(known_audio_towers())}."
    if not isinstance(audio_config, PreTrainedConfig):
        fields = dict(audio_config or {})
        model_type = fields.pop("model_type", None) or default
        # `AUDIO_TOWERS` takes precedence: another copy of the model code may have registered the same name.
        beside = {config_class.model_type: config_class for config_class in AUDIO_TOWERS}
        if model_type not in beside and model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"audio_config.model_type {model_type!r} is unknown; {known} Import the package that registers it."
            )
        config_class = beside[model_type] if model_type in beside else CONFIG_MAPPING[model_type]
        audio_config = config_class(**fields)
    if missing := [member for member in CONFIG_MEMBERS if not hasattr(audio_config, member)]:
        raise ValueError(
            f"audio_config.model_type {audio_config.model_type!r} is not an audio tower: "
            f"{type(audio_config).__name__} lacks {', '.join(missing)}; {known}"
        )
    return audio_config


def build_audio_tower(audio_config: PreTrainedConfig):
    """
    Build the audio tower of a configuration, with random weights.

    Raises:
        ValueError: `AutoModel` has no model for the configuration, or the model lacks `token_mask`.
    """
    tower = AutoModel.from_config(audio_config)
    if not callable(getattr(tower, "token_mask", None)):
        raise ValueError(
            f"{type(tower).__name__} is not an audio tower: it lacks token_mask(input_features_mask); known audio "
            f"towers: {', '.join(known_audio_towers())}."
        )
    return tower


__all__ = ["AUDIO_TOWERS", "build_audio_config", "build_audio_tower", "known_audio_towers"]
