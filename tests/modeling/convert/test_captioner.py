"""A captioner composed of parts: the parts are replaced, and must fit the configuration."""

import pytest
import torch

from dali_llava.modeling.convert import get_converter
from dali_llava.modeling.convert.captioner import PREFIX, captioner_shapes, new_audio_weights, with_fields
from dali_llava.modeling.convert.rules import Conversion, LazyTensor
from dali_llava.processing.assembly import load_tokenizer


SOURCE = {"kind": "fake", "name": "fake.pth", "license": "mit", "license_from": "test"}


@pytest.fixture
def captioner(write_llava):
    folder = write_llava()
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 64}
    return get_converter("llava")(folder, load_tokenizer(folder), audio_config=audio)


def prefix_of(rows: int) -> Conversion:
    weight = torch.full((rows, 32), 3.0)
    return Conversion(
        {PREFIX + "weight": LazyTensor(weight.shape, weight.dtype, lambda: weight, "prefix")}, ["prefix"]
    )


def test_a_part_is_replaced(captioner):
    replaced = captioner.with_part(
        with_fields(captioner.config, prefix_length=4), prefix_of(4), replaces=(PREFIX,), source=SOURCE
    )
    weights = dict(replaced.conversion)
    assert torch.equal(weights[PREFIX + "weight"], torch.full((4, 32), 3.0))
    assert weights.keys() == captioner.conversion.tensors.keys() == captioner_shapes(captioner.config).keys()
    assert replaced.config.prefix_length == 4 and captioner.config.prefix_length == 16
    assert replaced.config.sources == [*captioner.config.sources, SOURCE | {"parts": ["prefix"]}]
    assert list(replaced.reports) == ["llava-old", "fake.pth"] and replaced.reports["fake.pth"] == "1 tensors used"


def test_a_part_that_does_not_fit_is_an_error(captioner):
    with pytest.raises(ValueError, match=r"fake.pth: the shape of model.prefix.weight is \(4, 32\) in the"):
        captioner.with_part(captioner.config, prefix_of(4), replaces=(PREFIX,), source=SOURCE)
    scalar = torch.tensor(1)
    unknown = Conversion({PREFIX + "count": LazyTensor(scalar.shape, scalar.dtype, lambda: scalar, "count")})
    with pytest.raises(ValueError, match=r"the shape of model.prefix.count is \(\) in the sources and none in"):
        captioner.with_part(captioner.config, unknown, replaces=(), source=SOURCE)
    with pytest.raises(ValueError, match=r"the shape of model.prefix.weight is none in the sources and \(16, 32\) in"):
        captioner.with_part(captioner.config, Conversion({}), replaces=(PREFIX,), source=SOURCE)


def test_new_weights_depend_on_the_seed_alone(captioner):
    random = torch.random.get_rng_state()
    one, other, third = (new_audio_weights(captioner.config, seed)() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not torch.equal(one[PREFIX + "weight"], third[PREFIX + "weight"])
    assert torch.equal(torch.random.get_rng_state(), random)
