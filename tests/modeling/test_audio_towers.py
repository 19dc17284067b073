"""Audio towers: a tower registered by another package works like CAV-MAE, and unsuitable towers raise errors."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from dali_llava.modeling import CavMaeAudioConfig, LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.modeling.audio_towers import AUDIO_TOWERS, known_audio_towers
from dali_llava.processing import PLAIN_CHAT_TEMPLATE, SOUND_PROMPT, LlavaAudioFeatureExtractor, LlavaAudioProcessor


TOWER = Path(__file__).with_name("mel_mean_tower.py")
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def tower():
    """The module of the foreign tower, which registers the tower on import."""
    spec = importlib.util.spec_from_file_location("mel_mean_tower", TOWER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy_dir(tower, tiny_config, tiny_processor, tmp_path_factory) -> Path:
    """A saved captioner with the foreign tower, and its processor."""
    config = LlavaAudioConfig(**{**tiny_config.to_dict(), "audio_config": {"model_type": "mel_mean_audio"}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaAudioForConditionalGeneration(config)
    processor = LlavaAudioProcessor(
        image_processor=tiny_processor.image_processor,
        tokenizer=tiny_processor.tokenizer,
        feature_extractor=LlavaAudioFeatureExtractor(**config.audio_config.feature_extractor_kwargs),
        patch_size=8,
        chat_template=PLAIN_CHAT_TEMPLATE,
    )
    folder = tmp_path_factory.mktemp("toy") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toy(toy_dir):
    model = LlavaAudioForConditionalGeneration.from_pretrained(toy_dir).eval()
    return model, LlavaAudioProcessor.from_pretrained(toy_dir)


def sound(seconds: float, pitch: int = 440) -> np.ndarray:
    time = np.arange(round(seconds * 16_000)) / 16_000
    return np.sin(2 * np.pi * pitch * time).astype(np.float32)


def test_foreign_tower_is_loaded_from_the_configuration(toy, toy_dir):
    model, processor = toy
    assert type(model.model.audio_tower).__name__ == "MelMeanModel"
    assert json.loads((toy_dir / "config.json").read_text())["audio_config"]["model_type"] == "mel_mean_audio"
    assert type(AutoConfig.from_pretrained(toy_dir).audio_config).__name__ == "MelMeanConfig"
    extractor = processor.feature_extractor
    assert (extractor.patch_size, extractor.tokens_per_column, extractor.mean) == (8, 1, -4.346)
    model.config.check_processor(processor)


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_foreign_tower_captions_a_batch_as_its_clips_alone(toy, padding):
    model, processor = toy
    clips = [sound(2.0), sound(0.7, pitch=1500), sound(1.3, pitch=200)]  # 198, 68 and 128 frames
    texts = [processor.format_prompt(SOUND_PROMPT, audio=True, prefix=True)] * 3
    options = {"audio_kwargs": {"padding": padding}, "return_tensors": "pt"}
    batch = processor(text=texts, audio=clips, **options)
    counts = (batch["input_ids"] == processor.audio_token_id).sum(-1).tolist()
    assert counts == {"max_length": [32] * 3, "longest": [25, 9, 16]}[padding]

    def captions(inputs):
        with torch.no_grad():
            return model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :].tolist()

    alone = [captions(processor(text=texts[0], audio=clip, **options))[0] for clip in clips]
    assert captions(batch) == alone
    assert len(set(map(tuple, alone))) > 1


def test_foreign_tower_keeps_the_features_of_transformers(toy, toy_dir):
    model, processor = toy
    tower = model.model.audio_tower
    assert model.get_encoder(modality="audio") is tower
    assert model._no_split_modules >= {"MelMeanBlock", "LlamaDecoderLayer", "CLIPEncoderLayer"}
    assert "CavMaeLayer" not in model._no_split_modules
    # The tower has no attention; the rest of the model uses the selected implementation.
    loaded = LlavaAudioForConditionalGeneration.from_pretrained(toy_dir, attn_implementation="eager")
    assert loaded.config.text_config._attn_implementation == "eager"
    assert loaded.config.vision_config._attn_implementation == "eager"
    features = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = model.model.encode_audio(features)
    torch.testing.assert_close(loaded.eval().model.encode_audio(features), expected, rtol=0, atol=0)

    half = LlavaAudioForConditionalGeneration.from_pretrained(toy_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        assert half.get_audio_features(features).pooler_output[0].dtype == torch.bfloat16

    loaded.train().activation_checkpointing_enable()
    runs = []
    loaded.model.audio_tower.block.fc.register_forward_hook(lambda *_: runs.append(1))
    loaded.model.encode_audio(features).square().mean().backward()
    assert len(runs) == 2  # recomputed in the backward pass
    assert loaded.model.audio_tower.block.fc.weight.grad.abs().sum() > 0


STRANGER = """
source, clip, folder = sys.argv[1:]
sys.path.insert(0, folder)

import numpy as np
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

report = {}
try:
    AutoConfig.from_pretrained(source, trust_remote_code=True)
except ValueError as error:
    report["before"] = str(error)
import mel_mean_tower

model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
text = processor.format_prompt("What sound can be heard in this scene ?", audio=True, prefix=True)
inputs = processor(text=text, audio=np.load(clip), return_tensors="pt")
report["tokens"] = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
print(json.dumps(report))
"""


def test_foreign_tower_works_in_remote_code_once_its_package_is_imported(toy, toy_dir, run_without_package, tmp_path):
    model, processor = toy
    np.save(tmp_path / "clip.npy", sound(1.0))
    report = run_without_package(STRANGER, tmp_path, toy_dir, tmp_path / "clip.npy", TOWER.parent)
    assert (
        "'mel_mean_audio' is unknown; known audio towers: cav_mae_audio, ced_audio. Import the package"
        in report["before"]
    )
    text = processor.format_prompt(SOUND_PROMPT, audio=True, prefix=True)
    inputs = processor(text=text, audio=sound(1.0), return_tensors="pt")
    assert report["tokens"] == model.generate(**inputs, **GREEDY).tolist()


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("audio-spectrogram-transformer", "is not an audio tower: ASTConfig lacks output_size, num_audio_tokens"),
        ("llama", "is not an audio tower: LlamaConfig lacks output_size, num_audio_tokens, feature_extractor_kwargs"),
        ("cav_mae", "'cav_mae' is unknown"),
    ],
)
def test_unknown_and_unsuitable_towers_are_refused_with_the_known_ones(model_type, message, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=f"{message}.*known audio towers: .*cav_mae_audio"):
        LlavaAudioConfig(audio_config={"model_type": model_type})
    tiny_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["audio_config"]["model_type"] = model_type
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="known audio towers: .*cav_mae_audio"):
        AutoConfig.from_pretrained(tmp_path)


def test_configuration_of_another_model_is_refused():
    with pytest.raises(ValueError, match="LlamaConfig lacks output_size"):
        LlavaAudioConfig(audio_config=LlavaAudioConfig().text_config)


@pytest.mark.parametrize("audio_config", [None, {}, {"model_type": "cav_mae_audio"}, {"model_type": None}])
def test_no_model_type_means_cav_mae(audio_config):
    config = LlavaAudioConfig(audio_config=audio_config)
    assert config.audio_config.to_dict() == CavMaeAudioConfig().to_dict()


def test_known_towers_are_those_registered(tower):
    assert {config_class.model_type for config_class in AUDIO_TOWERS} == {"cav_mae_audio", "ced_audio"}
    assert set(known_audio_towers()) >= {"cav_mae_audio", "ced_audio", "mel_mean_audio"}


def test_tower_without_token_mask_or_model_is_refused(tower, tiny_config):
    class Unmasked(tower.MelMeanConfig):
        model_type = "unmasked_audio"

    class UnmaskedModel(PreTrainedModel):
        config_class = Unmasked

        def __init__(self, config):
            super().__init__(config)
            self.post_init()

    config = LlavaAudioConfig(**{**tiny_config.to_dict(), "audio_config": Unmasked()})
    with pytest.raises(ValueError, match="Unrecognized configuration class.*Unmasked"):
        LlavaAudioForConditionalGeneration(config)
    AutoModel.register(Unmasked, UnmaskedModel)
    with pytest.raises(ValueError, match="UnmaskedModel is not an audio tower: it lacks token_mask"):
        LlavaAudioForConditionalGeneration(config)


def test_tower_that_miscounts_its_tokens_is_named(toy):
    model, _ = toy
    features = torch.zeros(1, 64, 64)
    assert model.get_audio_features(features).pooler_output[0].shape == (8, 32)
    patch_size, model.config.audio_config.patch_size = model.config.audio_config.patch_size, 16
    try:
        with pytest.raises(ValueError, match=r"MelMeanModel returned 8 tokens for 64 frames, but .*\(64\) is 4"):
            model.get_audio_features(features)
    finally:
        model.config.audio_config.patch_size = patch_size


def test_processor_that_counts_otherwise_is_refused(tiny_config, tiny_processor, toy):
    tiny_config.check_processor(tiny_processor)
    model, processor = toy
    with pytest.raises(ValueError, match="writes 16 audio placeholders for 64 frames, .* returns 8 tokens; build"):
        model.config.check_processor(tiny_processor)
    with pytest.raises(ValueError, match="writes 8 audio placeholders for 64 frames, .* returns 16 tokens"):
        tiny_config.check_processor(processor)
    with pytest.raises(ValueError, match="has 64 mel bins, the audio tower 'cav_mae_audio' takes 128"):
        LlavaAudioConfig().check_processor(tiny_processor)


@pytest.mark.parametrize("fields", [{}, {"num_mel_bins": 64, "patch_size": 32, "max_length": 256}])
def test_feature_extractor_of_the_configuration_counts_as_the_tower(fields):
    config = CavMaeAudioConfig(**fields)
    extractor = LlavaAudioFeatureExtractor(**config.feature_extractor_kwargs)
    for frames in (1, 31, 32, 33, 256, 1024):
        assert extractor.num_audio_tokens(frames) == config.num_audio_tokens(frames)
    rows, columns = config.grid_size
    assert config.num_audio_tokens(config.max_length) == rows * columns


class Whisperlike(PreTrainedConfig):
    """A number of tokens that is not a multiple of columns: two convolutions of stride 2."""

    model_type = "whisperlike_audio"
    output_size: int = 32
    feature_extractor_kwargs = {}

    def num_audio_tokens(self, num_frames: int) -> int:
        return (num_frames - 1) // 4 + 1


def test_other_feature_extractor_with_its_own_rule(tiny_config, tiny_processor):
    """The processor gets the number of tokens from its feature extractor, of any class."""

    class EveryFourth(LlavaAudioFeatureExtractor):
        def num_audio_tokens(self, num_frames: int) -> int:
            return (num_frames - 1) // 4 + 1

    processor = LlavaAudioProcessor(
        image_processor=tiny_processor.image_processor,
        tokenizer=tiny_processor.tokenizer,
        feature_extractor=EveryFourth(num_mel_bins=64, max_length=256),
        chat_template=PLAIN_CHAT_TEMPLATE,
    )
    inputs = processor(text="<audio>", audio=sound(1.0))
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 64
    LlavaAudioConfig(**{**tiny_config.to_dict(), "audio_config": Whisperlike()}).check_processor(processor)


def test_sound_is_cast_for_a_tower_that_does_not(toy, toy_dir):
    half = LlavaAudioForConditionalGeneration.from_pretrained(toy_dir, dtype=torch.bfloat16)
    features = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = half.model.encode_audio(features)
        expected = half.model.audio_tower(features.to(torch.bfloat16)).last_hidden_state
        with pytest.raises(RuntimeError, match="type"):
            half.model.audio_tower(features)
    assert torch.equal(tokens, expected)
