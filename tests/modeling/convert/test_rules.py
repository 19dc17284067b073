"""Rules: every source tensor and every weight of the model is accounted for."""

import pytest
import torch
from safetensors.torch import save_file

from dali_llava.modeling.convert.rules import Copy, Drop, Grow, Rename, Split, Start, apply_rules
from dali_llava.modeling.convert.sources import open_source


RULES = [
    Drop(r"head\..*", "classifier"),
    Split(r"blocks\.(\d+)\.qkv\.(weight|bias)", [rf"layers.\1.{part}_proj.\2" for part in "qkv"]),
    Rename(r"blocks\.(\d+)\.fc\.weight", r"layers.\1.fc.weight"),
    Grow(r"embed", r"embed"),
]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "blocks.0.qkv.weight": (6, 3),
        "blocks.0.qkv.bias": (6,),
        "blocks.0.fc.weight": (4, 3),
        "embed": (5, 2),
        "head.weight": (7, 3),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def expected() -> dict[str, torch.Size]:
    shapes = {"embed": (8, 2), "layers.0.fc.weight": (4, 3)}
    shapes |= {f"layers.0.{part}_proj.weight": (2, 3) for part in "qkv"}
    shapes |= {f"layers.0.{part}_proj.bias": (2,) for part in "qkv"}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


@pytest.fixture
def convert(tmp_path):
    def convert(tensors, expected, **kwargs):
        save_file(tensors, tmp_path / "model.safetensors")
        return apply_rules(open_source(tmp_path), kwargs.pop("rules", RULES), expected, **kwargs)

    return convert


def test_tensors_are_renamed_split_grown_and_dropped(convert, tensors, expected):
    conversion = convert(tensors, expected)
    weights = dict(conversion)
    assert list(weights) == list(expected)
    assert torch.equal(weights["layers.0.fc.weight"], tensors["blocks.0.fc.weight"])
    fused = tensors["blocks.0.qkv.weight"]
    for index, part in enumerate("qkv"):
        assert torch.equal(weights[f"layers.0.{part}_proj.weight"], fused[2 * index : 2 * index + 2])
    assert torch.equal(weights["embed"][:5], tensors["embed"])
    torch.testing.assert_close(weights["embed"][5:], tensors["embed"].mean(0).expand(3, 2))
    assert sorted(conversion.used) == sorted(set(tensors) - {"head.weight"})
    assert conversion.dropped == {"head.weight": "classifier"} and conversion.started == {}
    assert conversion.report() == "4 tensors used\n1 dropped: classifier"


def test_weights_without_a_source_start_as_stated(convert, tensors, expected):
    fresh = {"prefix": torch.full((2, 2), 7.0)}
    shapes = expected | {"copy.fc.weight": torch.Size([4, 3]), "prefix": torch.Size([2, 2])}
    initial = {r"copy\.(.*)": Copy(r"layers.0.\1"), "prefix": Start(lambda: fresh)}
    conversion = convert(tensors, shapes, initial=initial)
    weights = dict(conversion)
    assert torch.equal(weights["copy.fc.weight"], tensors["blocks.0.fc.weight"])
    assert torch.equal(weights["prefix"], fresh["prefix"])
    assert conversion.started == {"copy.fc.weight": "copy of layers.0.fc", "prefix": "random"}
    assert conversion.report().splitlines()[2:] == [
        "1 weights start as: copy of layers.0.fc",
        "1 weights start as: random",
    ]


def test_a_new_dtype_applies_to_floating_point_numbers_only(convert, tensors, expected):
    conversion = convert(
        tensors | {"count": torch.tensor(3)},
        expected | {"count": torch.Size([])},
        rules=[*RULES, Rename("count", "count")],
    ).to(torch.bfloat16)
    weights = dict(conversion)
    assert weights.pop("count").dtype == conversion.tensors["count"].dtype == torch.int64
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in conversion.tensors.items() if name != "count"} == {torch.bfloat16}


def test_an_unknown_tensor_is_an_error(convert, tensors, expected):
    with pytest.raises(ValueError, match=r"blocks\.0\.gate is unknown"):
        convert(tensors | {"blocks.0.gate": torch.zeros(1)}, expected)


def test_a_weight_that_the_model_lacks_is_an_error(convert, tensors, expected):
    with pytest.raises(ValueError, match=r"blocks\.1\.fc\.weight becomes layers\.1\.fc\.weight, which the model does"):
        convert(tensors | {"blocks.1.fc.weight": torch.zeros(4, 3)}, expected)


def test_a_missing_tensor_is_an_error(convert, tensors, expected):
    del tensors["blocks.0.fc.weight"]
    with pytest.raises(ValueError, match=r"no tensor becomes layers\.0\.fc\.weight"):
        convert(tensors, expected)


@pytest.mark.parametrize("rows", [3, 5])
def test_a_wrong_shape_is_an_error_that_names_both(convert, tensors, expected, rows):
    tensors["blocks.0.fc.weight"] = torch.zeros(rows, 3)
    with pytest.raises(ValueError, match=rf"blocks\.0\.fc\.weight gives shape \({rows}, 3\), .* has shape \(4, 3\)"):
        convert(tensors, expected)


def test_more_rows_than_the_model_has_are_an_error(convert, tensors, expected):
    with pytest.raises(ValueError, match=r"embed gives shape \(9, 2\), but embed has shape \(8, 2\)"):
        convert(tensors | {"embed": torch.zeros(9, 2)}, expected)


def test_a_shape_that_cannot_be_split_is_an_error(convert, tensors, expected):
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv\.bias has shape \(7,\), which cannot be split into 3"):
        convert(tensors | {"blocks.0.qkv.bias": torch.zeros(7)}, expected)


def test_two_tensors_for_one_weight_are_an_error(convert, tensors, expected):
    rules = [*RULES, Rename(r"block\.(\d+)\.fc\.weight", r"layers.\1.fc.weight")]
    with pytest.raises(ValueError, match=r"blocks?\.0\.fc\.weight and blocks?\.0\.fc\.weight both become layers"):
        convert(tensors | {"block.0.fc.weight": torch.zeros(4, 3)}, expected, rules=rules)
