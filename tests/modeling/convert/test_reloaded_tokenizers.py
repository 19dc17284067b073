"""The tokenizer of a converted captioner has the ids of its source, also in a process without this package."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from dali_llava.processing.assembly import load_tokenizer


TEXTS = [
    "USER: <image>\nthe café <audio><prefix>\n  What ?ASSISTANT: a dog 🐶</s>",
    " the  dog\n\nis<image> on",
    "<audio> barks",
    "",
]
SCRIPT = """
from transformers import AutoProcessor
*folders, texts = sys.argv[1:]
load = AutoProcessor.from_pretrained
tokenizers = [load(folder, trust_remote_code=True).tokenizer for folder in folders]
print(json.dumps([[tokenizer(text)["input_ids"] for text in json.loads(texts)] for tokenizer in tokenizers]))
"""


@pytest.fixture
def original(write_original, sentencepiece_file) -> tuple:
    """An original LLaVA with `tokenizer.model` alone, and its CLIP."""
    llava, clip = write_original(1)
    (llava / "tokenizer.json").unlink()
    shutil.copy(sentencepiece_file, llava)
    return llava, clip


@pytest.fixture
def of_transformers(write_llava, original):
    """A LLaVA of transformers with the same vocabulary, whose tokenizer_config.json names another behaviour."""
    llava = write_llava()
    tokenizer = load_tokenizer(original[0])
    tokenizer.save_pretrained(llava)
    config = json.loads((llava / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (llava / "tokenizer_config.json").write_text(json.dumps(config))
    fields = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(fields | {"image_token_index": 320}))
    return llava


def test_ids_without_the_package_equal_those_of_the_source(
    of_transformers, original, convert, language_model_dir, convert_language_model, run_without_package, tmp_path
):
    outs = [tmp_path / name for name in ("from-transformers", "from-original", "from-language-model")]
    convert("llava", of_transformers, out=outs[0])
    convert("llava", original[0], ["--vision", original[1]], out=outs[1])
    convert_language_model(language_model_dir, outs[2])
    native, first, language_model = run_without_package(SCRIPT, tmp_path, *outs, json.dumps(TEXTS))
    tokenizer = load_tokenizer(original[0])
    assert native == first == [tokenizer(text)["input_ids"] for text in TEXTS]
    plain = AutoTokenizer.from_pretrained(language_model_dir)
    size = len(plain)
    plain.add_tokens(["<image>", "<audio>", "<prefix>"], special_tokens=True)
    assert language_model == [plain(text)["input_ids"] for text in TEXTS]
    assert [token for ids in first for token in ids if token >= 320] == [320, 322, 323, 320, 322]
    new = [token - size for ids in language_model for token in ids if token >= size]
    assert new == [0, 1, 2, 0, 1]
