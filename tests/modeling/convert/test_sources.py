"""Sources: all formats give the same tensors, damaged files are named, and pickles run no code."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dali_llava.modeling.convert.sources import open_source


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator).to(torch.bfloat16),
        "b.count": torch.tensor(7),
    }


def write_shards(folder, tensors, ending: str) -> None:
    stem = "model" if ending == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        file = f"{stem}-{number:05d}-of-{len(tensors):05d}.{ending}"
        (save_file if ending == "safetensors" else torch.save)({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write(path, tensors, kind: str):
    """Write the tensors in a format; returns what to open."""
    if kind == "safetensors":
        save_file(tensors, path / "model.safetensors")
        return path
    if kind == "bin":
        torch.save(tensors, path / "pytorch_model.bin")
        return path
    if kind.endswith(" shards"):
        write_shards(path, tensors, kind.removesuffix(" shards"))
        return path
    if kind == "file":
        save_file(tensors, path / "tower.safetensors")
        return path / "tower.safetensors"
    wrapped = {
        "pth": tensors,
        "old pth": tensors,
        "model": {"model": tensors, "epoch": 3},
        "state_dict": {"state_dict": tensors},
        "both": {"model": {"state_dict": tensors}},
        "distributed": {f"module.{name}": tensor for name, tensor in tensors.items()},
    }[kind]
    torch.save(wrapped, path / "tower.pth", _use_new_zipfile_serialization=kind != "old pth")
    return path / "tower.pth"


@pytest.mark.parametrize(
    "kind",
    ["safetensors", "bin", "safetensors shards", "bin shards", "file", "pth", "old pth", "model", "state_dict", "both"]
    + ["distributed"],
)
def test_every_format_gives_the_same_tensors(kind, tensors, tmp_path):
    source = open_source(write(tmp_path, tensors, kind))
    assert sorted(source.names()) == sorted(tensors)
    assert len(source.files) == (3 if kind.endswith("shards") else 1)
    for name, tensor in tensors.items():
        assert (source.shape(name), source.dtype(name)) == (tensor.shape, tensor.dtype)
        assert torch.equal(source.read(name), tensor)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("place", ["beside", "alone"])
def test_a_hostile_pickle_is_refused_and_not_run(new, place, tensors, tmp_path):
    hostile = Hostile(tmp_path / "ran")
    file = tmp_path / "tower.pth"
    torch.save({**tensors, "x": hostile} if place == "beside" else hostile, file, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"tower\.pth: contains \w+\.mkdir, which is not a tensor and could run code"):
        open_source(file)
    assert not (tmp_path / "ran").exists()
    # The file would have run the code.
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_what_is_not_a_tensor_is_an_error(tensors, tmp_path):
    file = tmp_path / "tower.pth"
    torch.save({**tensors, "epoch": 3}, file)
    with pytest.raises(ValueError, match=r"tower\.pth: epoch is a int, not a tensor"):
        open_source(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="contains no named tensors"):
        open_source(file)


@pytest.mark.parametrize("kind", ["file", "pth", "old pth"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_a_truncated_file_is_named(kind, kept, tensors, tmp_path):
    path = write(tmp_path, tensors, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{path.name}: damaged"):
        open_source(path)


@pytest.mark.parametrize("kind", ["safetensors shards", "bin shards"])
def test_a_missing_shard_is_named(kind, tensors, tmp_path):
    folder = write(tmp_path, tensors, kind)
    (shard,) = folder.glob("*-00002-of-*")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name}: the shard is missing"):
        open_source(folder)


def test_a_tensor_in_two_shards_is_named(tensors, tmp_path):
    folder = write(tmp_path, tensors, "safetensors shards")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({"a.weight": tensors["a.weight"], "a.bias": tensors["a.bias"]}, second)
    with pytest.raises(ValueError, match=rf"{second.name}: a\.weight is also in {first.name}"):
        open_source(folder)


def test_a_shard_without_a_tensor_of_the_index_is_named(tensors, tmp_path):
    folder = write(tmp_path, tensors, "safetensors shards")
    second = sorted(folder.glob("*.safetensors"))[1]
    save_file({"other": tensors["a.bias"]}, second)
    with pytest.raises(ValueError, match=rf"{second.name}: has no a\.bias"):
        open_source(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: not an index"):
        open_source(tmp_path)


def test_a_path_without_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in it; expected one of model.safetensors"):
        open_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        open_source(tmp_path / "absent")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.npz: unknown kind of weights"):
        open_source(tmp_path / "weights.npz")
