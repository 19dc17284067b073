"""Adapters in the files of a stage: PEFT reads them, and the loader merges them as PEFT does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from dali_llava.eval.captioner import load_captioner
from dali_llava.modeling import LlavaAudioForConditionalGeneration, LlavaAudioModel, LlavaAudioTowers
from dali_llava.modeling.adapters import read_adapter_config
from dali_llava.modeling.stage_checkpoint import find_stage, write_stage


peft = pytest.importorskip("peft", reason="peft is not installed")

LANGUAGE = r"model\.language_model\.layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)"
AUDIO = r"model\.audio_tower\.layers\.\d+\.attention\.v_proj"
CONFIGS = {
    "audio tower": {"target_modules": AUDIO, "lora_alpha": 3},
    "both": {"target_modules": f"{LANGUAGE}|{AUDIO}", "lora_alpha": 20},
    "rslora": {"target_modules": LANGUAGE, "use_rslora": True},
    "patterns": {
        "target_modules": f"{LANGUAGE}|{AUDIO}",
        "rank_pattern": {"q_proj": 2, r"layers.1.mlp.up_proj": 5},
        "alpha_pattern": {r"model\.audio_tower\..*": 7.5, "up_proj": 1},
    },
}


def load(folder) -> LlavaAudioForConditionalGeneration:
    return LlavaAudioForConditionalGeneration.from_pretrained(folder).eval()


def save_adapted(base, folder, seed: int = 0, part: str = "audio_projector", **config):
    """Save a stage on `base` with a trained `part` and an adapter, all random; returns the adapted model."""
    model = load(base)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | config))
    model.model.get_submodule(part).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    model.save_stage(folder, base=str(base), stage="distill")
    return model


@pytest.fixture(scope="module", params=["both", "rslora", "patterns"])
def stage(request, tiny_model_dir, tmp_path_factory):
    """Folders of a base and a stage with an adapter, and the adapted model."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(tiny_model_dir, folder / "base")
    return folder, save_adapted(folder / "base", folder / "stage", **CONFIGS[request.param])


@pytest.fixture
def one(tiny_model_dir, tmp_path):
    """Folder of a stage with an adapter in the language model, which a test can modify."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    save_adapted(tmp_path / "base", tmp_path / "stage", target_modules=LANGUAGE)
    return tmp_path / "stage"


@pytest.fixture(scope="module")
def logits(encode, mixed_samples):
    """`logits(model)`: the logits of samples with audio, pictures, both and neither."""
    inputs = encode(mixed_samples, padding=True)

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    return logits


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within 1e-5 of the largest logit (7.5). The rounding of float32 in this model is a third of it."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_merged_logits_are_the_adapted_ones(stage, logits):
    folder, adapted = stage
    expected, merged = logits(adapted), load(folder / "stage")
    assert (logits(load(folder / "base")) - expected).abs().max() > 0.1
    assert_same_logits(logits(merged), expected)
    assert merged.state_dict().keys() == load(folder / "base").state_dict().keys()


def test_peft_loads_the_stage_on_its_base(stage, logits):
    folder, adapted = stage
    loaded = peft.PeftModel.from_pretrained(load(folder / "base"), folder / "stage").eval()
    assert_same_logits(logits(loaded), logits(adapted))


def test_merge_equals_that_of_peft(stage):
    folder, _ = stage
    model = peft.PeftModel.from_pretrained(load(folder / "base"), folder / "stage").merge_and_unload()
    expected, merged = model.state_dict(), load(folder / "stage").state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_parts_of_the_captioner_are_merged_too(stage):
    folder, _ = stage
    whole = load(folder / "stage").state_dict()
    for part in (LlavaAudioModel, LlavaAudioTowers):
        for name, weight in part.from_pretrained(folder / "stage").state_dict().items():
            assert torch.equal(weight, whole[f"model.{name}"])


def test_files_are_those_of_peft(stage):
    folder, adapted = stage
    names = {path.name for path in (folder / "stage").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "stage.json", "config.json"} <= names
    assert not names & {"stage.safetensors", "model.safetensors"}
    config = peft.PeftConfig.from_pretrained(folder / "stage")
    assert config.base_model_name_or_path == str(folder / "base") and config.inference_mode
    assert config.target_modules == adapted.peft_config["default"].target_modules
    tensors = load_file(folder / "stage" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.") and "default" not in name for name in tensors)


def test_stage_names_its_tensors_as_the_parameters(stage):
    """A trainer restores them by name."""
    folder, adapted = stage
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    tensors = find_stage(folder / "stage").tensors()
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in tensors.items())


def test_chain_adds_the_adapters_in_order(tiny_model_dir, tmp_path, logits):
    """Adapter, adapter on the same layers, and a stage that replaces adapted weights."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    save_adapted(tmp_path / "base", tmp_path / "first", seed=1, **CONFIGS["both"])
    adapted = save_adapted(tmp_path / "first", tmp_path / "second", seed=2, part="prefix", **CONFIGS["patterns"])
    expected = logits(adapted)
    assert_same_logits(logits(load(tmp_path / "second")), expected)

    model = load(tmp_path / "second")
    model.requires_grad_(False)
    model.model.audio_tower.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.model.audio_tower.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    model.save_stage(tmp_path / "third", base=str(tmp_path / "second"), stage="align:mmd")
    last = load(tmp_path / "third")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in last.state_dict().items())
    save_adapted(tmp_path / "third", tmp_path / "fourth", seed=4, **CONFIGS["audio tower"])
    chained = peft.PeftModel.from_pretrained(last, tmp_path / "fourth").merge_and_unload()
    assert_same_logits(logits(load(tmp_path / "fourth")), logits(chained))


def test_base_in_16_bit_is_merged_in_float32_and_rounded_once(tiny_model_dir, tiny_processor, tmp_path):
    load(tiny_model_dir).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = save_adapted(tmp_path / "base", tmp_path / "stage", target_modules=LANGUAGE)
    layer = "model.language_model.layers.1.mlp.up_proj"
    merged = LlavaAudioForConditionalGeneration.from_pretrained(tmp_path / "stage").get_submodule(layer).weight
    adapted, original = model.get_submodule(layer), load(tmp_path / "base").get_submodule(layer).weight
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    expected = original.double() + 2.0 * (b.double() @ a.double())
    assert merged.dtype == original.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), expected, rtol=2**-8, atol=1e-6)
    assert (merged.double() - expected).abs().max() > 0


def test_merged_weights_can_be_offloaded(one, logits, tmp_path):
    expected = load(one)
    parts = dict.fromkeys((name for name, _ in expected.model.named_children()), "cpu")
    device_map = {f"model.{name}": place for name, place in parts.items()} | {
        "lm_head": "cpu",
        "model.language_model": "disk",
    }
    model = LlavaAudioForConditionalGeneration.from_pretrained(
        one, device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    ).eval()
    assert model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight.device.type == "meta"
    assert_same_logits(logits(model), logits(expected))


WEIGHT_SUMS = """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps({name: weight.double().sum().item() for name, weight in model.state_dict().items()}))
"""


@pytest.mark.slow  # it imports transformers in another process
def test_auto_class_without_the_package_loads_the_merged_model(one, run_without_package, tmp_path):
    expected = {name: weight.double().sum().item() for name, weight in load(one).state_dict().items()}
    assert run_without_package(WEIGHT_SUMS, tmp_path, one) == pytest.approx(expected)


@pytest.mark.parametrize("base", ["base", "stage"])
def test_adapter_of_peft_loads_on_a_checkpoint_and_on_a_stage(one, logits, tmp_path, base):
    """An adapter that was trained and saved with PEFT, without this package's stages."""
    config = peft.LoraConfig(target_modules=LANGUAGE, modules_to_save=["prefix"], init_lora_weights=False)
    model = peft.get_peft_model(load(one.parent / base), config).eval()
    with torch.no_grad():
        model.base_model.model.model.prefix.modules_to_save["default"].weight.fill_(0.5)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with_peft = peft.PeftModel.from_pretrained(load(one.parent / base), tmp_path / "adapter").eval()
    assert_same_logits(logits(with_peft), expected)
    merged = load(tmp_path / "adapter")
    assert_same_logits(logits(merged), expected)
    assert torch.equal(merged.model.prefix.weight, torch.full((16, 32), 0.5))
    assert_same_logits(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")), expected)
    loaded, processor = load_captioner(str(tmp_path / "adapter"))
    assert loaded.state_dict().keys() == merged.state_dict().keys() and processor.prefix_length == 16


def test_adapter_without_its_base_is_an_error(tmp_path):
    config = peft.LoraConfig(target_modules=LANGUAGE, base_model_name_or_path=str(tmp_path / "gone"))
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="adapter_config.json: the base model .*gone is not a folder"):
        load(tmp_path / "adapter")
    config.base_model_name_or_path = None
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter_config.json has no base_model_name_or_path"):
        load(tmp_path / "adapter")


def test_stage_without_adapter_replaces_one_with_it(one):
    write_stage(one, {"model.prefix.weight": torch.ones(16, 32)}, base=str(one.parent / "base"), stage="prefix")
    assert not list(one.glob("adapter_*"))
    assert torch.equal(load(one).model.prefix.weight, torch.ones(16, 32))
    save_adapted(one.parent / "base", one, target_modules=LANGUAGE)
    assert not (one / "stage.safetensors").exists() and not [path for path in one.iterdir() if path.name[0] == "."]
    assert not torch.equal(load(one).model.prefix.weight, torch.ones(16, 32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("lora_alpha", None),
        ("a_field_of_a_later_version", {"scale": 2}),
    ],
)
def test_other_adapters_are_refused_by_field(one, field, value):
    path = one / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError) as error:
        load(one)
    assert str(path) in str(error.value) and f"{field}={value!r} is not supported" in str(error.value)


def test_default_configuration_of_peft_is_supported(tmp_path):
    """All fields that PEFT writes by default are known to the merge."""
    peft.LoraConfig(r=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path / "adapter_config.json")["r"] == 3


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_broken_configuration_is_named(one, content):
    (one / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="adapter_config.json is not a JSON configuration"):
        load(one)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(one, file):
    (one / file).unlink()
    with pytest.raises(OSError, match=file):
        load(one)


def rewrite(stage, change) -> None:
    """Apply `change` to the tensors of a stage's adapter, and list them in its `stage.json`."""
    tensors = find_stage(stage).tensors()
    change(tensors)
    description = json.loads((stage / "stage.json").read_text())
    description["trained"] = sorted(tensors)
    (stage / "stage.json").write_text(json.dumps(description))
    save_file(
        {f"base_model.model.{name.replace('.default', '')}": tensor for name, tensor in tensors.items()},
        stage / "adapter_model.safetensors",
    )


UP = "model.language_model.layers.0.mlp.up_proj"


def test_lone_factor_is_an_error(one):
    rewrite(one, lambda tensors: tensors.pop(f"{UP}.lora_B.default.weight"))
    with pytest.raises(ValueError, match=f"{UP} needs lora_A and lora_B of one rank, but has lora_A"):
        load(one)


def test_layer_of_another_shape_is_an_error(one):
    rewrite(one, lambda tensors: tensors.update({f"{UP}.lora_B.default.weight": torch.zeros(48, 4)}))
    with pytest.raises(ValueError, match=rf"{UP}.weight has shape \(48, 32\), but its base .* has shape \(64, 32\)"):
        load(one)


def test_layer_that_the_base_lacks_is_an_error(one):
    def rename(tensors):
        for factor in "AB":
            tensors[f"model.ear.lora_{factor}.default.weight"] = tensors.pop(f"{UP}.lora_{factor}.default.weight")

    rewrite(one, rename)
    with pytest.raises(ValueError, match=r"model\.ear\.weight has shape \(64, 32\).*no such weight"):
        load(one)


def test_weight_that_is_missing_in_the_base_is_an_error(one):
    path = one.parent / "base" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != f"{UP}.weight"}, path)
    with pytest.raises(ValueError, match=f"base: has no weight {UP}.weight, which an adapter of .*stage changes"):
        load(one)
