"""The writer: safetensors and transformers read what it writes."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_utils import load_state_dict

from dali_llava.modeling.convert.rules import LazyTensor
from dali_llava.modeling.convert.writer import DTYPES, write_weights


def lazy(tensors):
    return {name: LazyTensor(each.shape, each.dtype, lambda each=each: each, name) for name, each in tensors.items()}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=draw).to(dtype) for dtype in DTYPES}
    return tensors | {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "strided": torch.randn(4, 3).T}


def test_one_file(tensors, tmp_path):
    write_weights(tmp_path, lazy(tensors))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    for loaded in (load_file(tmp_path / "model.safetensors"), load_state_dict(tmp_path / "model.safetensors")):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
            assert torch.equal(loaded[name].float(), tensor.float()), name


def test_shards_and_their_index(tensors, tmp_path):
    write_weights(tmp_path, lazy(tensors), max_shard_bytes=150)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 1 and files[0].name == f"model-00001-of-{count:05d}.safetensors"
    stored = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == stored and stored.keys() == tensors.keys()
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 150 for file in files)


def test_the_files_have_the_permissions_of_the_umask(tensors, tmp_path):
    old = os.umask(0o027)
    try:
        write_weights(tmp_path, lazy(tensors))
    finally:
        os.umask(old)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_written(tensors, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr("dali_llava.modeling.convert.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the disk has 0.0 GB free; free some space"):
        write_weights(tmp_path, lazy(tensors))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path):
    wrong = LazyTensor(torch.Size([3]), torch.float32, lambda: torch.zeros(4), "somewhere")
    with pytest.raises(ValueError, match="is torch.float32 .4,., not as announced"):
        write_weights(tmp_path, {"a": wrong})
