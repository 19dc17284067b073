"""Assembly of a processor from the parts of released models."""

import copy

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.processing.assembly import (
    add_llava_tokens,
    add_placeholders,
    assemble_processor,
    load_audio_settings,
    load_image_processor,
    load_tokenizer,
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Five tokens, none of them a placeholder."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "dog", "cat"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_placeholders_are_added_as_special_tokens(tokenizer):
    ids = add_placeholders(tokenizer)
    assert ids == {"<image>": 5, "<audio>": 6, "<prefix>": 7} and len(tokenizer) == 8
    assert tokenizer("<audio><prefix>dog cat<image>")["input_ids"] == [6, 7, 3, 4, 5]
    assert tokenizer.decode([6, 3, 7], skip_special_tokens=True).split() == ["dog"]
    assert tokenizer.pad_token == "<unk>"
    assert add_placeholders(tokenizer) == ids and len(tokenizer) == 8


def test_known_placeholders_keep_their_ids(tokenizer):
    tokenizer.add_tokens("<audio>", special_tokens=True)
    assert add_placeholders(tokenizer) == {"<image>": 6, "<audio>": 5, "<prefix>": 7}


def test_an_original_llava_gets_the_tokens_of_transformers_first(tokenizer):
    assert add_llava_tokens(tokenizer) == {"<image>": 5, "<audio>": 7, "<prefix>": 8}
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 6)


def test_the_processor_fits_the_configuration(tiny_config, tiny_processor):
    config = LlavaAudioConfig.from_dict(tiny_config.to_dict() | {"prefix_modalities": ["audiovisual"]})
    processor = assemble_processor(
        copy.deepcopy(tiny_processor.tokenizer), tiny_processor.image_processor, None, config
    )
    assert (processor.patch_size, processor.prefix_length, processor.num_additional_image_tokens) == (8, 16, 1)
    assert processor.prefix_modalities == ["audiovisual"]
    extractor = processor.feature_extractor
    assert (extractor.num_mel_bins, extractor.max_length) == (64, 256)
    vision = {"model_type": "siglip_vision_model", "image_size": 48, "patch_size": 8, "hidden_size": 32}
    fields = tiny_config.to_dict() | {"vision_config": vision, "vision_feature_select_strategy": "full"}
    siglip = LlavaAudioConfig.from_dict(fields)
    processor = assemble_processor(
        copy.deepcopy(tiny_processor.tokenizer), tiny_processor.image_processor, None, siglip
    )
    assert (processor.num_additional_image_tokens, processor.vision_feature_select_strategy) == (0, "full")


def test_other_ids_than_those_of_the_configuration_are_an_error(tiny_config, tiny_processor):
    config = LlavaAudioConfig.from_dict(tiny_config.to_dict() | {"audio_token_index": 20})
    with pytest.raises(ValueError, match="audio_token_index is 20 in the configuration, but <audio> is 5"):
        assemble_processor(tiny_processor.tokenizer, tiny_processor.image_processor, None, config)


def test_the_parts_of_our_own_checkpoint_are_kept(tiny_model_dir, tiny_processor):
    assert load_tokenizer(tiny_model_dir).get_vocab() == tiny_processor.tokenizer.get_vocab()
    image_processor = load_image_processor(tiny_model_dir)
    assert (image_processor.size, image_processor.do_center_crop) == (tiny_processor.image_processor.size, False)
    extractor, template = load_audio_settings(tiny_model_dir)
    assert extractor.num_mel_bins == 64 and template == tiny_processor.chat_template


def test_a_sentencepiece_tokenizer_without_its_library_names_the_remedy(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b\n\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match="has only tokenizer.model; run pip install sentencepiece protobuf, or copy"):
        load_tokenizer(tmp_path)
