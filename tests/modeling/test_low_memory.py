"""Effects of offloading and quantization on the model: the place of weights, and the dtype of packed weights."""

import copy

import accelerate
import pytest
import torch

from dali_llava.modeling import LlavaAudioForConditionalGeneration


@pytest.mark.parametrize("hook", ["cpu_offload", "disk_offload"])
def test_offloaded_model_gives_the_same_logits(hook, model, encode, mixed_samples, tiny_model_dir, tmp_path):
    """accelerate loads a weight when the forward of its module runs, so every weight must be used in a forward."""
    offloaded = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir).eval()
    offloaded.load_state_dict(model.state_dict())
    where = {"cpu_offload": {}, "disk_offload": {"offload_dir": tmp_path}}[hook]
    getattr(accelerate, hook)(offloaded, execution_device=torch.device("cpu"), **where)
    assert {parameter.device.type for parameter in offloaded.model.prefix.parameters()} == {"meta"}
    batch = encode(mixed_samples)
    with torch.no_grad():
        assert torch.equal(offloaded(**batch).logits, model(**batch).logits)


def test_sound_is_cast_to_the_dtype_of_a_weight_that_is_not_packed(model, encode, mixed_samples):
    """8-bit loading packs the weights of linear layers; `input_features` have the dtype of the other weights."""
    tower = copy.deepcopy(model.model.audio_tower).to(torch.bfloat16)
    tower.proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    seen = []
    tower.proj.forward = lambda hidden_states: seen.append(hidden_states.dtype) or hidden_states
    with torch.no_grad():
        tower(encode(mixed_samples[:1])["input_features"])
    assert seen == [torch.bfloat16]
