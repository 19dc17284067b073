"""Assembly of a processor from the parts of released models."""

import copy
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, LlavaConfig, PreTrainedTokenizerFast

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.processing import LlavaAudioProcessor
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


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    """A folder of LLaVA with a byte-pair tokenizer like that of Llama, which tokenizer_config.json names."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = BpeTrainer(vocab_size=290, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["a dog barks in the rain", "the cat sat on the mat"], trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": "<pad>"}
    named |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    LlavaConfig().save_pretrained(folder)
    return folder


def test_text_has_the_tokens_that_it_has_in_llava(llama_folder, tiny_config, tiny_processor, tmp_path):
    native = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer = load_tokenizer(llama_folder)
    ids = {
        f"{name}_token_index": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "audio", "prefix")
    }
    config = LlavaAudioConfig.from_dict(tiny_config.to_dict() | ids)
    assemble_processor(tokenizer, tiny_processor.image_processor, None, config).save_pretrained(tmp_path)
    saved = LlavaAudioProcessor.from_pretrained(tmp_path).tokenizer
    for text in ("USER: <image>\nthe dog barks ASSISTANT: a cat</s>", "  ▁é <image>the\n", ""):
        expected = native(text)["input_ids"]
        assert expected[0] == 1
        assert tokenizer(text)["input_ids"] == saved(text)["input_ids"] == expected


def test_a_missing_tokenizer_file_names_the_remedy(tmp_path):
    message = "no tokenizer.json and no tokenizer.model in it; copy or download the whole folder again"
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(tmp_path)
