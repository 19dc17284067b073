"""The prompts of LAVCap as the paper prints them (table V), with audio before visual tokens."""

import pytest

from dali_llava.processing.lavcap_prompts import (
    TRAINING_REQUESTS,
    lavcap_chat_template,
    lavcap_prompt,
)


PRINTED = {
    "I": "<Audio><audio><image></Audio> Please describe the audio.",
    "II": "<Content><audio><image></Content> Please describe the content.",
    "III": "<Audio><audio></Audio><Visual><image></Visual> Please describe the audio and visual elements.",
}


@pytest.fixture
def with_template(tiny_processor):
    """A function that returns `tiny_processor` with a chat template until the test ends."""
    own = tiny_processor.chat_template

    def change(template: str):
        tiny_processor.chat_template = template
        return tiny_processor

    yield change
    tiny_processor.chat_template = own


@pytest.mark.parametrize("name", PRINTED)
def test_prompts_are_those_of_the_paper(with_template, name):
    prompt = lavcap_prompt(name)
    processor = with_template(prompt.chat_template)
    expected = f"USER: {PRINTED[name]}\nASSISTANT:"
    assert processor.format_prompt(prompt.request, image=True, audio=True) == expected
    answered = processor.format_prompt(prompt.request, image=True, audio=True, answer="a dog")
    assert answered == expected + " a dog</s>"


def test_only_the_tags_of_given_media_are_written(with_template):
    processor = with_template(lavcap_prompt("III").chat_template)
    assert processor.format_prompt("Q", audio=True) == "USER: <Audio><audio></Audio> Q\nASSISTANT:"
    assert processor.format_prompt("Q", image=True) == "USER: <Visual><image></Visual> Q\nASSISTANT:"
    assert processor.format_prompt("Q") == "USER: Q\nASSISTANT:"
    processor = with_template(lavcap_chat_template("Speech"))
    assert processor.format_prompt("Q", audio=True, prefix=True) == (
        "USER: <Speech><audio></Speech><prefix> Q\nASSISTANT:"
    )


def test_turns_in_order(with_template):
    processor = with_template(lavcap_prompt("I").chat_template)
    sound, text = {"type": "audio"}, {"type": "text", "text": "Q1"}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text, sound, sound]},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "Be brief. USER: <Audio><audio><audio></Audio> Q1\nASSISTANT: A1</s>USER: Q2\nASSISTANT:"
    )
    with pytest.raises(Exception, match="unknown role tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_prompt_three_needs_separate_tokens():
    for fusion in ("shared_projector", "ot_attention", "cross_attention"):
        assert lavcap_prompt("III", fusion=fusion) == lavcap_prompt("III")
    for fusion in ("joint_encoder", "q_former"):
        assert lavcap_prompt("II", fusion=fusion) == lavcap_prompt("II")
        with pytest.raises(ValueError, match=f"prompt III separates .* fusion='{fusion}' joins them"):
            lavcap_prompt("III", fusion=fusion)
    with pytest.raises(ValueError, match="prompt 'IV' is unknown; choose I, II, III"):
        lavcap_prompt("IV")


def test_training_draws_from_eight_requests():
    assert len(set(TRAINING_REQUESTS)) == len(TRAINING_REQUESTS) == 8
    assert lavcap_prompt("I").request not in TRAINING_REQUESTS
