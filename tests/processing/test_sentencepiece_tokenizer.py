"""The tokenizer of a SentencePiece model has the ids of SentencePiece, and of LLaVA around its image."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_llava.processing.assembly import add_llava_tokens, load_language_model_tokenizer, load_tokenizer
from dali_llava.processing.sentencepiece_tokenizer import load_sentencepiece


TEXTS = [
    "",
    " ",
    "the dog barks",
    " the dog",
    "   three spaces   and  two at the end  ",
    "a\nb\n\n the\tend\r\n",
    "café naïve CAFÉ e\u0301",  # the last one is two characters, which are not composed
    "🐶 barks🐶🐶",
    "犬が吠える",
    "▁the ▁",
    "In 2024, 3.14 % ?!",
]


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_file):
    return load_sentencepiece(sentencepiece_file)


@pytest.fixture(scope="module")
def reference(sentencepiece_file):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(sentencepiece_file))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_those_of_sentencepiece(text, tokenizer, reference):
    ids = reference.encode(text, add_bos=True)
    assert tokenizer(text)["input_ids"] == ids and ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.convert_ids_to_tokens(ids) == reference.id_to_piece(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")


def test_characters_without_a_token_are_bytes(tokenizer):
    assert tokenizer.tokenize("🐶") == ["▁", *(f"<0x{byte:02X}>" for byte in "🐶".encode())]
    assert tokenizer.tokenize("\n") == ["▁", "<0x0A>"]


CHARACTERS = st.one_of(st.sampled_from("the dogcat  \n▁é🐶"), st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(CHARACTERS, max_size=30))
def test_ids_of_any_text_equal_those_of_sentencepiece(text, tokenizer, reference):
    assert tokenizer(text)["input_ids"] == reference.encode(text, add_bos=True)


@pytest.mark.parametrize("after", ["\nWhat sound", "What sound", " What", "  two", "🐶", "\n"])
def test_text_after_an_image_has_the_ids_of_the_original_program(after, sentencepiece_file, reference):
    """The original program encodes the text before and after an image separately, and puts the image between."""
    tokenizer = load_sentencepiece(sentencepiece_file)
    add_llava_tokens(tokenizer)
    image = tokenizer.convert_tokens_to_ids("<image>")
    expected = [*reference.encode("USER: ", add_bos=True), image, *reference.encode(after)]
    assert tokenizer(f"USER: <image>{after}")["input_ids"] == expected


def test_the_tokens_of_the_prompt_of_llava(sentencepiece_file):
    """llava-hf/llava-1.5-7b-hf gives 1 3148 1001 29901 29871 32000 29871 13 5618: a space after the image."""
    tokenizer = load_sentencepiece(sentencepiece_file)
    add_llava_tokens(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("USER: <image>\nWhat")["input_ids"])
    image = tokens.index("<image>")
    assert tokens[0] == "<s>" and "".join(tokens[1:image]) == "▁USER:▁" and tokens[image - 1] == "▁"
    assert tokens[image + 1 : image + 3] == ["▁", "<0x0A>"] and "".join(tokens[image + 3 :]) == "What"


def test_a_folder_without_tokenizer_json(sentencepiece_file, tmp_path):
    shutil.copy(sentencepiece_file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast and len(tokenizer) == 324
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>", "<audio>", "<prefix>"]) == [320, 321, 322, 323]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (321, 2, 0)


@pytest.mark.parametrize("load", [load_tokenizer, load_language_model_tokenizer])
def test_a_missing_package_names_both_remedies(load, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").touch()
    monkeypatch.setattr("dali_llava.processing.sentencepiece_tokenizer.is_sentencepiece_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"pip install \"dali-llava\[sentencepiece\]\", or copy a tokenizer"
    ) as error:
        load(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.model'}: ") and "\n" not in message
    assert message.endswith(
        "tokenizer.json with the same vocabulary there, for LLaVA-1.5 that of llava-hf/llava-1.5-7b-hf"
    )


def test_a_damaged_file_is_refused(sentencepiece_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="tokenizer.model: cannot be read .* copy it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda proto: setattr(proto.trainer_spec, "model_type", 1),  # unigram
        lambda proto: setattr(proto.trainer_spec, "byte_fallback", False),
        lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False),
        lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True),
        lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"map"),
        lambda proto: proto.Clear(),
    ],
)
def test_other_settings_than_those_of_llama_are_refused(change, sentencepiece_file, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sentencepiece_file.read_bytes())
    change(proto)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="tokenizer.model: not the SentencePiece model of a Llama; copy a tokenizer"):
        load_tokenizer(tmp_path)
