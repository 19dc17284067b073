"""Labels with a byte-level tokenizer: exactly the answer and its end token, after the tokens of the prompt."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from dali_llava.processing import SOUND_PROMPT, LlavaAudioFeatureExtractor, LlavaAudioProcessor
from dali_llava.train.data.collators import IGNORED, Turn, collate_turns


ANSWERS = [
    "a dog barks",
    "",
    "A café's bell — 钟声 🔔 — rings,  twice.",
    "\n\n(two lines,\n and blanks)",
]


@pytest.fixture
def processor(language_model_dir) -> LlavaAudioProcessor:
    tokenizer = AutoTokenizer.from_pretrained(language_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<audio>", "<prefix>"]})
    size = {"height": 16, "width": 16}
    return LlavaAudioProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        LlavaAudioFeatureExtractor(num_mel_bins=64, max_length=256),
        patch_size=8,
        prefix_length=2,
    )


def test_labels_decode_to_the_answer_and_its_end_token(processor):
    image = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
    batch = collate_turns([Turn(SOUND_PROMPT, answer, image, prefix=True) for answer in ANSWERS], processor)
    for input_ids, mask, labels, answer in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], ANSWERS, strict=True
    ):
        learnt = labels != IGNORED
        assert processor.decode(labels[learnt]) == answer + "<|im_end|>"
        assert torch.equal(input_ids[learnt], labels[learnt]) and labels[-1] == processor.tokenizer.eos_token_id
        assert processor.decode(labels[learnt], skip_special_tokens=True) == answer
        # the other tokens are those that generation starts from, with the image of 4 tokens and the prefix of 2
        prompt = processor(text=processor.format_prompt(SOUND_PROMPT, image=True, prefix=True), images=image)
        assert torch.equal(input_ids[mask.bool() & ~learnt], prompt["input_ids"][0])
        assert [
            (prompt["input_ids"] == token).sum() for token in (processor.image_token_id, processor.prefix_token_id)
        ] == [4, 2]


def test_first_token_of_an_answer_is_not_merged_with_the_prompt(processor):
    """The tokenizer merges the line break before the answer with its first word."""
    tokenizer, prompt = processor.tokenizer, processor.format_prompt("What can be heard?")
    prompt_ids = tokenizer(prompt)["input_ids"]
    text_ids = tokenizer(processor.format_prompt("What can be heard?", answer=ANSWERS[0]))["input_ids"]
    assert text_ids[: len(prompt_ids)] != prompt_ids
    (labels,) = collate_turns([Turn("What can be heard?", ANSWERS[0])], processor)["labels"]
    expected = tokenizer(ANSWERS[0] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert labels.tolist() == [IGNORED] * len(prompt_ids) + expected


def test_template_whose_answered_turn_does_not_start_with_the_prompt_is_refused(processor):
    processor.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    with pytest.raises(ValueError, match="does not start with the prompt.*<think>.*use another chat template"):
        collate_turns([Turn("What can be heard?", "a dog")], processor)
