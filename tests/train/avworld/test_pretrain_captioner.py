"""Inputs of the captioner's training: its architecture, tokenized dialogues and the image tokens of pictures."""

import pytest
import torch
from datasets import Dataset

from dali_llava.processing.corpora.avworld.scenes import CELL, GRID, IMAGE_SIZE
from dali_llava.train.avworld.pretrain_captioner import (
    CaptionerArguments,
    build_captioner,
    encode_pictures,
    tokenize_dialogues,
)
from dali_llava.train.command_line import CONFIGS, parse_stage_arguments
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import pixel_values


DIALOGUES = [
    [{"question": "What can you see ?", "answer": "a dog"}, {"question": "What is it ?", "answer": "a dog and a cat"}],
    [{"question": "What sound is it ?", "answer": "a bell rings"}],
    [],
    [{"question": "What can you see ?", "answer": "a cat"}],
]
SEEN = [True, False, True, True]


@pytest.fixture
def corpus(rows) -> Dataset:
    """Four rows with two pictures each, except the second, which has none. The third has no dialogue."""
    return Dataset.from_list(
        [
            {"id": row["id"], "frames": row["frames"][:2] if see else [], "dialogues": dialogue}
            for row, see, dialogue in zip(rows, SEEN, DIALOGUES, strict=True)
        ]
    )


def test_a_dialogue_becomes_a_row_a_turn(corpus, avworld_processor):
    turns = tokenize_dialogues(corpus, avworld_processor)
    assert set(turns.column_names) == {"id", "pictures", "prompt_ids", "answer_ids"}
    names = [row["id"] for row in corpus]
    assert turns["id"][:] == [f"{names[0]}/0", f"{names[0]}/1", f"{names[1]}/0", f"{names[3]}/0"]
    assert turns["pictures"][:] == [[0, 1], [0, 1], [], [4, 5]]
    tokenizer = avworld_processor.tokenizer
    said = [turn for dialogue in DIALOGUES for turn in dialogue]
    for row, turn in zip(turns, said, strict=True):
        shown = bool(row["pictures"])
        prompt = avworld_processor.format_prompt(turn["question"], image=shown)
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]
        assert row["prompt_ids"].count(avworld_processor.image_token_id) == shown
        answer = tokenizer(turn["answer"], add_special_tokens=False)["input_ids"]
        assert row["answer_ids"] == [*answer, tokenizer.eos_token_id]


@pytest.mark.parametrize("batch_size", [1, 256])
def test_image_tokens_are_every_frames(corpus, captioner, avworld_processor, batch_size):
    tokens = encode_pictures(captioner.train(), avworld_processor, corpus, batch_size)
    assert tokens.shape == (6, 36, 32) and not tokens.requires_grad
    frames = [open_frame(corpus[row], index) for row in (0, 2, 3) for index in range(2)]
    with torch.no_grad():
        expected = captioner.model.encode_image(pixel_values(frames, avworld_processor))
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


@pytest.fixture
def avworlds(tmp_path):
    """Captioner and processor built from the configuration."""
    words = [str(CONFIGS / "avworld" / "captioner.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    return build_captioner(parse_stage_arguments(CaptionerArguments, "about", words))


def test_avworlds_captioner_has_four_image_tokens_a_cell_each_and_sixteen_audio_tokens(avworlds):
    captioner, _ = avworlds
    config = captioner.config
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (IMAGE_SIZE, CELL)
    assert config.image_seq_length == GRID * GRID == 4
    assert sorted(config.audio_config.grid_size) == [2, 8]  # patches of 32 x 32 in 64 mels x 256 frames
    image = captioner.model.encode_image(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    audio = captioner.model.encode_audio(torch.zeros(1, 256, 64))
    assert (image.shape, audio.shape) == ((1, 4, 64), (1, 16, 64))


def test_avworlds_placeholders_are_as_many_as_its_tokens(avworlds, rows):
    _, processor = avworlds
    inputs = processor(
        text=processor.format_prompt("What can you see ?", image=True, audio=True, prefix=True),
        images=open_frame(rows[0], 0),
        audio=torch.zeros(40_960).numpy(),
        sampling_rate=16_000,
        return_tensors="pt",
    )
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    counts = {token: tokens.count(token) for token in ("<image>", "<audio>", "<prefix>")}
    assert counts == {"<image>": 4, "<audio>": 16, "<prefix>": 16}
