"""Clips of several frames: placeholders, order of the pixel values, the front end of LAVCap, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from dali_llava.processing import PLAIN_CHAT_TEMPLATE, LlavaAudioFeatureExtractor, LlavaAudioProcessor


GRID, HEARD = 36, 64  # tokens per image of 48 x 48 pixels and per clip of 2.56 s


@pytest.fixture
def processor_of(tiny_tokenizer):
    """A function that builds a processor of several frames."""

    def build(num_frames: int = 4, side: int = 48, **options) -> LlavaAudioProcessor:
        return LlavaAudioProcessor(
            CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
            tiny_tokenizer,
            LlavaAudioFeatureExtractor(num_mel_bins=64, max_length=256),
            **{"patch_size": 8, "chat_template": PLAIN_CHAT_TEMPLATE, "num_frames": num_frames, **options},
        )

    return build


def pictures(count: int, width: int = 48, height: int = 48) -> list[Image.Image]:
    pixels = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def placeholders(inputs, processor) -> list[int]:
    return (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist()


@pytest.mark.parametrize(("pooling", "tokens"), [("patches", GRID), ("frame", 1)])
def test_one_placeholder_stands_for_all_frames_of_its_text(processor_of, pooling, tokens):
    processor, frames = processor_of(vision_pooling=pooling), pictures(6)
    texts = [
        processor.format_prompt("What", image=True, audio=True),
        processor.format_prompt("What", audio=True),
        processor.format_prompt("What", image=True),
        processor.format_prompt("What", image=True),
    ]
    sound = np.zeros(16_000, np.float32)
    inputs = processor(text=texts, images=[frames[:3], [], frames[3:4], frames[4:]], audio=[sound, sound])
    assert placeholders(inputs, processor) == [3 * tokens, 0, tokens, 2 * tokens]
    assert (inputs["input_ids"] == processor.audio_token_id).sum(-1).tolist() == [HEARD, HEARD, 0, 0]
    alone = processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], alone)
    # the frames of a text are adjacent, and its row equals the text processed alone
    for row, shown in ((0, frames[:3]), (3, frames[4:])):
        ids = inputs["input_ids"][row]
        first = int((ids == processor.image_token_id).int().argmax())
        assert (ids[first : first + len(shown) * tokens] == processor.image_token_id).all()
        single = processor(text=texts[row], images=shown, audio=[sound] if row == 0 else None)
        assert torch.equal(single["input_ids"][0], ids[-single["input_ids"].shape[1] :])
        assert torch.equal(
            processor(text=texts[row], images=[shown], audio=[sound] if row == 0 else None).input_ids, single.input_ids
        )


def test_one_frame_equals_one_picture(processor_of):
    single, several = processor_of(num_frames=1), processor_of(num_frames=20)
    (picture,) = pictures(1)
    expected = single(text="<image> a", images=picture)
    for images in (picture, [picture], [[picture]]):
        inputs = several(text="<image> a", images=images)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_several_placeholders_take_one_picture_each(processor_of):
    processor, frames = processor_of(num_frames=2), pictures(5)
    inputs = processor(text=["<image> a <image> dog <image>", "<image>"], images=[frames[:3], frames[3:]])
    assert placeholders(inputs, processor) == [3 * GRID, 2 * GRID]
    assert torch.equal(inputs["pixel_values"], processor.image_processor(frames, return_tensors="pt")["pixel_values"])
    flat = processor(text=["<image> a <image>", "<image>"], images=frames[:3])
    assert placeholders(flat, processor) == [2 * GRID, GRID]


def test_the_answer_mask_of_a_chat_accounts_for_all_frames(processor_of):
    processor = processor_of()
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]},
        {"role": "assistant", "content": "a dog"},
    ]
    inputs = processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"images": pictures(3)},
    )
    assert placeholders(inputs, processor) == [3 * GRID]
    marked = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert processor.decode(inputs["input_ids"][0][marked]).split() == ["a", "dog", "</s>"]


def test_front_end_of_lavcap(processor_of):
    """20 frames whose centre is cropped to 224 x 224, with one token per frame."""
    processor = processor_of(num_frames=20, side=224, patch_size=14, pad_to_square=False, vision_pooling="frame")
    ramp = np.broadcast_to((np.arange(320) // 2).astype(np.uint8)[None, :, None], (224, 320, 3))
    inputs = processor(text="<image>", images=[Image.fromarray(np.ascontiguousarray(ramp))] * 20)
    assert inputs["pixel_values"].shape == (20, 3, 224, 224) and placeholders(inputs, processor) == [20]
    mean, deviation = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    columns = inputs["pixel_values"][0, 0, 0] * deviation + mean
    expected = torch.arange(48, 272) // 2 / 255  # columns 48 to 271 of 320
    torch.testing.assert_close(columns, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([pictures(5)], "text 0 has 5 frames, but the processor takes at most num_frames=4"),
        (pictures(5), "text 0 has 5 frames, but the processor takes at most num_frames=4"),
        ([[]], "1 <image> tokens in the text but no images"),
        ([], "1 <image> tokens in the text but no images"),
        (None, "1 <image> tokens in the text but no images"),
    ],
)
def test_wrong_numbers_of_frames(processor_of, images, message):
    with pytest.raises(ValueError, match=message):
        processor_of()(text="<image> a", images=images)


def test_frames_without_the_placeholders_for_them(processor_of):
    with pytest.raises(ValueError, match=r"\[1, 1\] <image> tokens, but \[0, 1\] images"):
        processor_of()(text=["<image>", "<image>"], images=[[], pictures(3)])
    with pytest.raises(ValueError, match=r"\[0, 2\] <image> tokens, but \[2, 3\] images"):
        processor_of()(text=["a", "<image> <image>"], images=[pictures(2), pictures(3)])
    with pytest.raises(ValueError, match=r"\[1\] <image> tokens, but \[2\] images"):
        processor_of(num_frames=1)(text=["<image>"], images=[pictures(2)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_pooling": "mean"}, "vision_pooling='mean' is unknown; choose patches or frame"),
        ({"num_frames": 0}, "num_frames=0, frame_rate=2.0; give at least 1 frame"),
        ({"frame_rate": 0.0}, "frame_rate=0.0; give at least 1 frame and a rate above 0"),
    ],
)
def test_bad_options(processor_of, options, message):
    with pytest.raises(ValueError, match=message):
        processor_of(**options)


def test_options_are_saved_and_the_pooling_is_that_of_the_model_beside(processor_of, tmp_path):
    processor_of(num_frames=20, frame_rate=4.0, vision_pooling="frame").save_pretrained(tmp_path)
    loaded = LlavaAudioProcessor.from_pretrained(tmp_path)
    assert (loaded.num_frames, loaded.frame_rate, loaded.vision_pooling) == (20, 4.0, "frame")
    assert loaded.frame_options == {"num_frames": 20, "frame_rate": 4.0, "shorter_side": 48}
    assert processor_of(num_frames=1).frame_options["shorter_side"] is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_audio", "vision_pooling": "patches"}))
    assert LlavaAudioProcessor.from_pretrained(tmp_path).vision_pooling == "patches"
