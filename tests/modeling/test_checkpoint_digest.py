"""The hash of a checkpoint's files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.checkpoint_digest import checkpoint_digest
from dali_llava.modeling.loading import find_checkpoint


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    """Folder of a run: a captioner, and on it a stage `prefix`."""
    shutil.copytree(tiny_model_dir, tmp_path / "run" / "captioner")
    model = LlavaAudioForConditionalGeneration.from_pretrained(tmp_path / "run" / "captioner")
    model.requires_grad_(False)
    model.model.prefix.requires_grad_(True)
    model.save_stage(tmp_path / "run" / "prefix", base=str(tmp_path / "run" / "captioner"), stage="prefix")
    return tmp_path / "run"


def digest(folder) -> str:
    return checkpoint_digest(find_checkpoint(folder))


def change(path, name: str | None = None) -> None:
    """Adds a small number to one tensor of a safetensors file."""
    tensors = load_file(path)
    tensors[name or next(iter(tensors))] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def test_each_tensor_counts(run):
    weights = run / "captioner" / "model.safetensors"
    whole = weights.read_bytes()
    names = list(load_file(weights))
    seen = {digest(run / "prefix")}
    for name in names:
        change(weights, name)
        seen.add(digest(run / "prefix"))
        weights.write_bytes(whole)
    assert len(seen) == 1 + len(names)
    assert digest(run / "prefix") in seen
    change(run / "prefix" / "stage.safetensors")
    assert digest(run / "prefix") not in seen


@pytest.mark.parametrize(
    ("folder", "name"),
    [("prefix", "config.json"), ("captioner", "tokenizer.json"), ("captioner", "processor_config.json")],
)
def test_configuration_and_processor_count(run, folder, name):
    before = digest(run / "prefix")
    path = run / folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added": 1}))
    assert digest(run / "prefix") != before


def test_the_place_of_a_run_does_not_count(run, tmp_path):
    before = digest(run / "prefix")
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    assert digest(tmp_path / "elsewhere" / "copy" / "prefix") == before
    assert digest(run / "captioner") != before


def test_large_tensors_are_read_in_blocks_up_to_their_ends(run):
    """4 MiB: 16 blocks of 64 KiB begin every 4 MiB - 64 KiB over 15 bytes, the last ends with the tensor."""
    weights = run / "captioner" / "model.safetensors"
    tensors = load_file(weights) | {"large": torch.zeros(2**20)}
    seen = set()
    for index in (None, 0, 2**14 - 1, 2**20 - 2**14, 2**20 - 1, (2**22 - 2**16) // 15 // 4 + 1):
        tensors["large"].zero_()
        if index is not None:
            tensors["large"][index] = 1
        save_file(tensors, weights, metadata={"format": "pt"})
        seen.add(digest(run / "captioner"))
    assert len(seen) == 6


def test_a_damaged_file_is_named(run):
    path = run / "captioner" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*copy or save"):
        digest(run / "prefix")
