"""Chat templates of language models: media at the start of a turn, one start token, and the end of an answer."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, CLIPImageProcessor

from dali_llava.processing import (
    DALI_CHAT_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    LlavaAudioFeatureExtractor,
    LlavaAudioProcessor,
)
from dali_llava.processing.assembly import end_token_ids
from dali_llava.processing.chat_templates import with_media


QUESTION = "What can be heard?"
PLACEHOLDERS = ["<image>", "<audio>", "<prefix>"]
# like that of Llama 2, which writes the start token and the end token itself
INST = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# an end token that is not that of the tokenizer
CHAT_TURNS = "{% for message in messages %}{{ message['content'] + '<turn>' }}{% endfor %}"


@pytest.fixture
def tokenizer(language_model_dir):
    """`byte_level_tokenizer` with the placeholders, loaded for each test, so that the test can modify it."""
    tokenizer = AutoTokenizer.from_pretrained(language_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": PLACEHOLDERS})
    return tokenizer


def make_processor(tokenizer, **options) -> LlavaAudioProcessor:
    return LlavaAudioProcessor(CLIPImageProcessor(), tokenizer, LlavaAudioFeatureExtractor(), **options)


def test_template_of_the_tokenizer_is_the_default(tokenizer):
    processor = make_processor(tokenizer)
    user = f"<|im_start|>user\n<image><audio><prefix>\n{QUESTION}<|im_end|>\n"
    assert processor.format_prompt(QUESTION, True, True, True) == user + "<|im_start|>assistant\n"
    assert processor.format_prompt(QUESTION) == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    # the line break after the end token is not a part of the answer
    answered = processor.format_prompt(QUESTION, True, True, True, answer="a dog")
    assert answered == user + "<|im_start|>assistant\na dog<|im_end|>"


def test_conversation_of_blocks_and_strings_is_written_in_order(tokenizer):
    processor = make_processor(tokenizer)
    picture = {"role": "user", "content": [{"type": "text", "text": "Q1"}, {"type": "image"}]}
    turns = [{"role": "system", "content": "S"}, picture, {"role": "assistant", "content": "A1"}]
    written = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in (("system", "S"), ("user", "<image>\nQ1"), ("assistant", "A1"))
    )
    assert processor.apply_chat_template(turns) == written
    as_strings = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    assert processor.apply_chat_template(as_strings) == tokenizer.apply_chat_template(as_strings, tokenize=False)


def test_template_that_is_given_or_absent(tokenizer):
    assert make_processor(tokenizer, chat_template=PLAIN_CHAT_TEMPLATE).chat_template == PLAIN_CHAT_TEMPLATE
    tokenizer.chat_template = None
    assert make_processor(tokenizer).chat_template == DALI_CHAT_TEMPLATE


def test_adapted_template_is_saved_loaded_and_not_adapted_again(tokenizer, tmp_path):
    processor = make_processor(tokenizer)
    processor.save_pretrained(tmp_path)
    loaded = LlavaAudioProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == processor.chat_template == with_media(processor.chat_template)
    assert loaded.format_prompt("Q", audio=True, answer="A") == processor.format_prompt("Q", audio=True, answer="A")
    assert make_processor(loaded.tokenizer).chat_template == processor.chat_template


def test_template_with_a_start_token_gives_one_start_token(tokenizer):
    """Whether the tokenizer adds the start token or leaves it to the template."""
    tokenizer.chat_template = INST
    processor = make_processor(tokenizer)
    ids = {}
    for adds in (False, True):
        if adds:
            start = ("<|im_start|>", tokenizer.bos_token_id)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[start]
            )
        text = processor.format_prompt(QUESTION, audio=True, answer="a dog")
        assert text.startswith("[INST] <audio>" if adds else "<|im_start|>[INST] <audio>")
        assert text.endswith("[/INST] a dog <|im_end|>")
        ids[adds] = tokenizer(text)["input_ids"]
    assert ids[True] == ids[False] and ids[True].count(tokenizer.bos_token_id) == 1


def test_answer_ends_with_the_end_token_where_the_template_writes_none(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    assert make_processor(tokenizer).format_prompt("Q", answer="A") == "Q\nA<|im_end|>"


def test_end_tokens_include_that_of_the_template(tokenizer):
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert [end_token_ids(make_processor(tokenizer), known) for known in (None, end, [start, end])] == [
        *[end] * 2,
        [start, end],
    ]
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TURNS
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert make_processor(tokenizer).format_prompt("Q", answer="A") == "Q<turn>A<turn>"
    assert end_token_ids(make_processor(tokenizer), end) == [end, turn]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{% for b in m['content'] %}{{ b['text'] }}{% endfor %}{% endfor %}",
            "does not write",
        ),
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("{{ messages[0]['content'].unknown() }}", "no attribute 'unknown'"),
    ],
)
def test_template_that_takes_no_strings_is_refused(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"chat template cannot be used.*{reason}.*pass chat_template"):
        make_processor(tokenizer)
