"""Placeholders, padding, chat template, errors, and loading a checkpoint without the package."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, CLIPImageProcessor, PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

from dali_llava.processing import (
    PLAIN_CHAT_TEMPLATE,
    SOUND_PROMPT,
    LlavaAudioFeatureExtractor,
    LlavaAudioProcessor,
)


SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<audio>", "<prefix>"]
WORDS = [*SPECIALS, "USER:", "ASSISTANT:", *dict.fromkeys(f"{SOUND_PROMPT} a dog is barking".split())]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
IMAGE, AUDIO, PREFIX = 4, 5, 6


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    options = {"additional_special_tokens": SPECIALS[4:], **options}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, **options)


def make_processor(tokenizer=None, **options) -> LlavaAudioProcessor:
    return LlavaAudioProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        tokenizer=tokenizer or make_tokenizer(),
        feature_extractor=LlavaAudioFeatureExtractor(num_mel_bins=64, max_length=256),
        **{"patch_size": 8, "chat_template": PLAIN_CHAT_TEMPLATE, **options},
    )


def make_image(width: int = 48, height: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_clip(seconds: float = 2.0, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(16000 * seconds)).astype(np.float32)


def counts(input_ids: torch.Tensor) -> list[list[int]]:
    return [[int((row == token).sum()) for token in (IMAGE, AUDIO, PREFIX)] for row in input_ids]


def test_mixed_batch_expands_placeholders_and_pads_left():
    processor = make_processor()
    texts = [
        processor.format_prompt(SOUND_PROMPT, image=True, audio=True, prefix=True),
        processor.format_prompt(SOUND_PROMPT, audio=True),
        processor.format_prompt(SOUND_PROMPT, image=True),
        processor.format_prompt(SOUND_PROMPT),
    ]
    images, clips = [make_image(seed=0), make_image(seed=1)], [make_clip(seed=0), make_clip(1.0, seed=1)]
    inputs = processor(text=texts, images=images, audio=clips)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "input_features"}
    assert counts(inputs["input_ids"]) == [[36, 64, 16], [0, 64, 0], [36, 0, 0], [0, 0, 0]]
    assert inputs["pixel_values"].shape == (2, 3, 48, 48)
    assert inputs["input_features"].shape == (2, 256, 64)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert mask.tolist() == sorted(mask.tolist()) and torch.equal(ids == 3, mask == 0)
    # in order of appearance, each the same as when processed alone
    for index, clip in enumerate(clips):
        alone = processor.feature_extractor(clip)["input_features"][0]
        torch.testing.assert_close(inputs["input_features"][index], alone, rtol=0, atol=0)
    for index, image in enumerate(images):
        alone = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(inputs["pixel_values"][index], alone, rtol=0, atol=0)
    # after its padding, a row of the batch equals the sample processed alone
    alone = processor(text=texts[1], audio=clips[1])["input_ids"][0]
    assert torch.equal(inputs["input_ids"][1, -len(alone) :], alone)


def test_order_within_the_expanded_text():
    processor = make_processor(prefix_length=2)
    text = processor.format_prompt(SOUND_PROMPT, image=True, audio=True, prefix=True)
    ids = processor(text=text, images=make_image(), audio=make_clip())["input_ids"][0].tolist()
    words = SOUND_PROMPT.split()
    expected = ["USER:", *["<image>"] * 36, *["<audio>"] * 64, *["<prefix>"] * 2, *words, "ASSISTANT:"]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == expected


def test_longest_gives_tokens_by_length():
    processor = make_processor()
    texts, clips = ["<audio>", "<audio>"], [make_clip(2.0), make_clip(0.5)]  # 198 and 48 frames
    inputs = processor(text=texts, audio=clips, audio_kwargs={"padding": "longest"})
    assert counts(inputs["input_ids"]) == [[0, 4 * 13, 0], [0, 4 * 3, 0]]
    assert inputs["input_features_mask"].sum(1).tolist() == [208, 48]


def test_flat_padding_and_tokenizer_settings_do_not_reach_the_clips():
    tokenizer = make_tokenizer(padding="longest", max_length=32, padding_side="right")
    processor = make_processor(tokenizer)
    for options in ({}, {"padding": True}, {"padding": "longest", "return_tensors": "pt"}):
        inputs = processor(text=["<audio> a", "a"], audio=[make_clip()], **options)
        assert inputs["input_features"].shape == (1, 256, 64)
        assert inputs["attention_mask"][1].tolist() == [0] * 64 + [1]
    right = processor(text=["<audio> a", "a"], audio=[make_clip()], padding_side="right")
    assert right["attention_mask"][1].tolist() == [1] + [0] * 64


def test_full_size_counts():
    processor = LlavaAudioProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        make_tokenizer(),
        LlavaAudioFeatureExtractor(),
    )
    text = processor.format_prompt(SOUND_PROMPT, image=True, audio=True, prefix=True)
    inputs = processor(text=text, images=make_image(640, 360), audio=make_clip(10.0))
    assert counts(inputs["input_ids"]) == [[576, 512, 16]]


def test_full_strategy_counts_every_token():
    processor = make_processor(vision_feature_select_strategy="full", num_additional_image_tokens=0)
    assert counts(processor(text="<image>", images=make_image())["input_ids"]) == [[36, 0, 0]]


def test_images_are_padded_to_a_square_of_the_mean_colour():
    processor = make_processor()
    image = make_image(48, 24)
    square = Image.new("RGB", (48, 48), (122, 116, 104))
    square.paste(image, (0, 12))
    expected = processor.image_processor(square, return_tensors="pt")["pixel_values"]
    for same in (image, image.convert("RGBA"), np.asarray(image), torch.from_numpy(np.array(image)).permute(2, 0, 1)):
        pixels = processor(text="<image>", images=[same])["pixel_values"]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
    plain = make_processor(pad_to_square=False)(text="<image>", images=image)["pixel_values"]
    cropped = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(plain, cropped, rtol=0, atol=0)
    grey = make_image(20, 30).convert("L")
    assert processor(text="<image>", images=grey)["pixel_values"].shape == (1, 3, 48, 48)


def test_chat_template():
    plain, dali = make_processor(), make_processor(chat_template=None)
    assert plain.format_prompt("Q") == "USER: Q ASSISTANT:"
    assert plain.format_prompt("Q", audio=True, prefix=True) == "USER: <audio><prefix>\nQ ASSISTANT:"
    assert plain.format_prompt("Q", image=True, answer="A") == "USER: <image>\nQ ASSISTANT: A</s>"
    assert dali.format_prompt("Q", True, True, True) == SYSTEM + "USER: <image><audio><prefix>\nQ ASSISTANT:"
    turns = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": [{"type": "text", "text": "Q2"}]},
    ]
    rendered = dali.apply_chat_template(turns, add_generation_prompt=True)
    assert rendered == SYSTEM + "USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    own = [{"role": "system", "content": "Be brief."}, *turns[:1]]
    assert dali.apply_chat_template(own) == "Be brief. USER: Q1 "
    with pytest.raises(Exception, match="unknown role"):
        plain.apply_chat_template([{"role": "tool", "content": "x"}])


def test_apply_chat_template_with_media(tmp_path):
    processor = make_processor()
    image, clip = make_image(), make_clip()
    image.save(tmp_path / "picture.png")

    def conversation(picture):
        blocks = [
            {"type": "text", "text": SOUND_PROMPT},
            {"type": "audio", "audio": clip},
            picture,
            {"type": "prefix"},
        ]
        return [{"role": "user", "content": blocks}, {"role": "assistant", "content": "a dog is barking"}]

    by_image = conversation({"type": "image", "image": image})
    by_path = conversation({"type": "image", "path": str(tmp_path / "picture.png")})
    text_only = [{"role": "user", "content": SOUND_PROMPT}, {"role": "assistant", "content": "a dog"}]
    inputs = processor.apply_chat_template(
        [by_image, text_only, by_path], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    text = processor.format_prompt(SOUND_PROMPT, True, True, True, answer="a dog is barking")
    direct = processor(text=text, images=image, audio=clip)
    assert torch.equal(inputs["input_ids"][0], direct["input_ids"][0])
    assert torch.equal(inputs["input_ids"][2], direct["input_ids"][0])
    torch.testing.assert_close(inputs["pixel_values"], direct["pixel_values"].expand(2, -1, -1, -1), rtol=0, atol=0)
    torch.testing.assert_close(inputs["input_features"][1], direct["input_features"][0], rtol=0, atol=0)
    # the mask marks the answer and its end token, although the placeholders before it are expanded
    for row, answer in enumerate(["a dog is barking</s>", "a dog</s>", "a dog is barking</s>"]):
        marked = torch.as_tensor(inputs["assistant_masks"])[row].bool()
        assert processor.decode(inputs["input_ids"][row][marked]).replace(" </s>", "</s>") == answer


def test_turns_get_the_prefix_that_the_checkpoint_asks_for(tmp_path):
    """The media of the turn decide, unless the turn or the caller overrides them."""
    processor = make_processor(prefix_modalities=["audiovisual"])
    assert processor.format_prompt("Q", audio=True) == "USER: <audio>\nQ ASSISTANT:"
    assert processor.format_prompt("Q", image=True, audio=True) == "USER: <image><audio><prefix>\nQ ASSISTANT:"
    assert processor.format_prompt("Q", image=True) == "USER: <image>\nQ ASSISTANT:"
    assert processor.format_prompt("Q", image=True, audio=True, prefix=False) == "USER: <image><audio>\nQ ASSISTANT:"
    assert processor.format_prompt("Q", audio=True, prefix=True) == "USER: <audio><prefix>\nQ ASSISTANT:"
    sound, picture, text = {"type": "audio"}, {"type": "image"}, {"type": "text", "text": "Q"}
    first = {"role": "user", "content": [sound, picture, text]}
    turns = [first, {"role": "assistant", "content": "A"}, {"role": "user", "content": [sound, text]}]
    expected = "USER: <image><audio><prefix>\nQ ASSISTANT: A</s>USER: <audio>\nQ "
    assert processor.apply_chat_template(turns) == expected
    assert processor.apply_chat_template([turns, turns[:1]])[0] == expected
    asked = {"role": "user", "content": [*first["content"], {"type": "prefix"}]}
    assert processor.apply_chat_template([asked]).count("<prefix>") == 1
    assert first["content"] == [sound, picture, text]  # the caller's conversation is not changed


def test_prefix_modalities_are_those_of_the_model_beside(tmp_path):
    """A model configuration in the same folder takes precedence; a processor saved alone keeps its value."""
    make_processor(prefix_modalities=["audio", "audiovisual"]).save_pretrained(tmp_path)
    assert LlavaAudioProcessor.from_pretrained(tmp_path).prefix_modalities == ["audio", "audiovisual"]
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llava_audio", "prefix_modalities": ["audiovisual"]})
    )
    loaded = LlavaAudioProcessor.from_pretrained(tmp_path)
    assert loaded.prefix_modalities == ["audiovisual"]
    assert loaded.format_prompt("Q", audio=True) == "USER: <audio>\nQ ASSISTANT:"


def test_placeholders_marked_as_user_text_stay():
    """`apply_chat_template(..., sanitize_control_tokens=True)` marks the text of the user."""
    processor = make_processor(prefix_length=2)
    marked = f"{_CONTROL_TOKEN_START}<prefix>{_CONTROL_TOKEN_END}"
    texts, offsets = processor.get_text_with_replacements([f"<prefix> {marked}"])
    assert texts == [f"<prefix><prefix> {marked}"]
    assert [(offset["span"], offset["new_span"]) for offset in offsets[0]] == [((0, 8), (0, 16))]


def test_decode():
    processor = make_processor()
    ids = processor.tokenizer("a dog is barking</s>")["input_ids"]
    assert processor.decode(ids, skip_special_tokens=True) == "a dog is barking"
    assert processor.batch_decode([ids, ids[:2]], skip_special_tokens=True) == ["a dog is barking", "a dog"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "<image>", "images": [make_image()] * 2}, "1 <image> tokens and 2 images"),
        ({"text": ["<audio>", "<audio>"], "audio": [make_clip()]}, "2 <audio> tokens and 1 audio"),
        ({"text": "a", "audio": make_clip()}, "0 <audio> tokens and 1 audio"),
        ({"text": "<audio> <image>", "audio": make_clip()}, "1 <image> tokens in the text but no images"),
        ({"text": "<audio>", "audio": []}, "1 <audio> tokens in the text but no audio"),
        ({"text": ["<image> <image>", "a"], "images": [[make_image()], [make_image()]]}, r"\[2, 0\].*\[1, 1\] images"),
        ({"text": ["<audio>", "a"], "audio": [[], [make_clip()]]}, r"\[1, 0\].*\[0, 1\] clips"),
        ({"text": "<audio>", "audio": make_clip(0.05)}, r"audio sample 0 lasts 0\.050 s"),
        ({"text": "<audio>", "audio": make_clip(), "sampling_rate": 44100}, "44100 Hz"),
        ({"text": "a", "videos": [np.zeros((2, 4, 4, 3), np.uint8)]}, "videos are not supported"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(**inputs)


def test_tokenizer_without_placeholder():
    with pytest.raises(ValueError, match="no <sound> token: add it"):
        make_processor(audio_token="<sound>")
    with pytest.raises(ValueError, match="vision_feature_select_strategy='half'"):
        make_processor(vision_feature_select_strategy="half")


def test_feature_extractor_needs_a_number_of_tokens():
    with pytest.raises(ValueError, match=r"WhisperFeatureExtractor has no num_audio_tokens\(num_frames\)"):
        LlavaAudioProcessor(make_processor().image_processor, make_tokenizer(), WhisperFeatureExtractor())
    with pytest.raises(ValueError, match="NoneType has no num_audio_tokens"):
        LlavaAudioProcessor(make_processor().image_processor, make_tokenizer())


def test_placeholders_follow_the_tokens_per_column():
    """A tower that averages over mel, with one token per 16 frames."""
    extractor = LlavaAudioFeatureExtractor(num_mel_bins=64, max_length=256, tokens_per_column=1)
    processor = make_processor()
    processor.feature_extractor = extractor
    clips = [make_clip(2.0), make_clip(0.5)]  # 198 and 48 frames
    assert counts(processor(text=["<audio>"] * 2, audio=clips)["input_ids"]) == [[0, 16, 0]] * 2
    longest = processor(text=["<audio>"] * 2, audio=clips, audio_kwargs={"padding": "longest"})
    assert counts(longest["input_ids"]) == [[0, 13, 0], [0, 3, 0]]


def test_tokenizer_is_padded_on_the_left():
    tokenizer = make_tokenizer(padding_side="right")
    processor = make_processor(tokenizer)
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer(["a dog", "a"], padding=True)["attention_mask"][1] == [0, 1]
    assert processor.feature_extractor.padding_side is None


def test_save_and_load(tmp_path):
    processor = make_processor(prefix_length=4, pad_to_square=False, num_additional_image_tokens=3)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["feature_extractor"]["num_mel_bins"] == 64 and saved["image_processor"]["crop_size"]["height"] == 48
    assert saved["auto_map"]["AutoProcessor"] == "processing_llava_audio.LlavaAudioProcessor"
    assert not (tmp_path / "preprocessor_config.json").exists()
    for loaded in (LlavaAudioProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is LlavaAudioProcessor
        assert type(loaded.feature_extractor) is LlavaAudioFeatureExtractor
        assert (loaded.prefix_length, loaded.pad_to_square, loaded.num_additional_image_tokens) == (4, False, 3)
        assert loaded.chat_template == PLAIN_CHAT_TEMPLATE
        loaded.save_pretrained(tmp_path / "again")
        again = (tmp_path / "again" / "processor_config.json").read_bytes()
        assert again == (tmp_path / "processor_config.json").read_bytes()


UNTRUSTED = """
import sys
from dali_llava.processing import LlavaAudioProcessor
from transformers import AutoProcessor

for loader in (LlavaAudioProcessor, AutoProcessor):
    processor = loader.from_pretrained(sys.argv[1])
    print(type(processor).__module__, processor.tokenizer("a dog")["input_ids"])
assert "dali_llava.modeling" not in sys.modules
"""


def test_loads_without_the_model_code_and_without_asking(tmp_path):
    """config.json refers to model code in the checkpoint, which the processor of the package does not need."""
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    auto_map = {"AutoConfig": "configuration_llava_audio.LlavaAudioConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_audio", "auto_map": auto_map}))
    (tmp_path / "configuration_llava_audio.py").write_text("raise RuntimeError('the checkpoint ran its code')\n")
    run = subprocess.run(
        [sys.executable, "-c", UNTRUSTED, str(tmp_path)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "custom code" not in run.stdout + run.stderr and "to instantiate a model of type" not in run.stderr
    ids = processor.tokenizer("a dog")["input_ids"]
    assert run.stdout.splitlines() == [f"dali_llava.processing.processing_llava_audio {ids}"] * 2


ELSEWHERE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dali_llava":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())

import numpy as np
from PIL import Image
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
data = np.load(sys.argv[2])
text = processor.format_prompt("a dog", image=True, audio=True, prefix=True)
inputs = processor(text=text, images=Image.fromarray(data["image"]), audio=data["clip"])
np.savez(sys.argv[3], **{key: value.numpy() for key, value in inputs.items()})
assert "dali_llava" not in sys.modules
"""


def test_loads_where_the_package_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    processor, image, clip = make_processor(), make_image(40, 30), make_clip()
    processor.save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "data.npz", image=np.asarray(image), clip=clip)
    files = [tmp_path / "model", tmp_path / "data.npz", tmp_path / "inputs.npz"]
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, files)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    text = processor.format_prompt("a dog", image=True, audio=True, prefix=True)
    expected = processor(text=text, images=image, audio=clip)
    with np.load(tmp_path / "inputs.npz") as inputs:
        assert set(inputs) == set(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(inputs[key], value.numpy())
