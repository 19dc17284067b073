"""Loading by name: the Hub, chains of stages, offloading and quantisation, for whole checkpoints and stages."""

import json
import shutil
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from dali_llava.eval.captioner import load_captioner
from dali_llava.eval.runner import CaptionRunner, Sample, weights_digest
from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration, LlavaAudioModel
from dali_llava.modeling.loading import find_checkpoint, reach_hub
from dali_llava.processing import SEE_PROMPT, SOUND_PROMPT


PARTS = (
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.audio_tower",
    "model.audio_projector",
    "model.prefix",
    "model.language_model",
    "lm_head",
)


@pytest.fixture(scope="module", params=["tied", "untied"])
def chain(request, tiny_config, tiny_processor, tmp_path_factory):
    """The folder of a run: `base`, the stages `prefix` and `aligned` on it, and `whole`, the merged model."""
    folder = tmp_path_factory.mktemp(request.param)
    config = LlavaAudioConfig.from_dict(tiny_config.to_dict())
    # bitsandbytes packs 4-bit weights in blocks of 64
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 128
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = request.param == "tied"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaAudioForConditionalGeneration(config)
        model.save_pretrained(folder / "base")
        tiny_processor.save_pretrained(folder / "base")
        for name, part, base in (
            ("prefix", model.model.prefix, "base"),
            ("aligned", model.model.audio_tower, "prefix"),
        ):
            model.requires_grad_(False)
            part.requires_grad_(True)
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
            model.save_stage(folder / name, base=str(folder / base), stage=name)
    model.save_pretrained(folder / "whole")
    tiny_processor.save_pretrained(folder / "whole")
    return folder


def captions(folder, **options) -> list[str]:
    """Captions of sounds, pictures and both, with the loader and the runner of the commands."""
    draw = np.random.default_rng(3)
    samples = []
    for number in range(3):
        sound = (0.3 * np.sin(np.arange(24_000) * (0.02 + 0.2 * number))).astype(np.float32)
        picture = Image.fromarray(draw.integers(0, 256, (48, 48, 3), dtype=np.uint8))
        samples.append(Sample(f"audio{number}", SOUND_PROMPT, audio=sound))
        samples.append(Sample(f"image{number}", SEE_PROMPT, image=picture))
        samples.append(Sample(f"both{number}", SOUND_PROMPT, image=picture, audio=sound))
    runner = CaptionRunner(*load_captioner(str(folder), **options), max_new_tokens=8)
    results = list(runner.run(samples, progress=False))
    assert [result.error for result in results] == [None] * len(samples)
    return [result.caption for result in results]


@pytest.fixture(scope="module")
def expected(chain):
    """Captions of the merged model, without offloading and quantisation."""
    found = captions(chain / "whole")
    assert len(set(found)) >= 6  # otherwise equal captions would have little meaning
    assert captions(chain / "base") != found
    return found


OFFLOADS = {
    "one device": {"device_map": "cpu"},
    "auto": {"device_map": "auto"},
    "disk": {"device_map": dict.fromkeys(PARTS, "disk")},
    "towers on disk": {"device_map": dict.fromkeys(PARTS, "cpu") | dict.fromkeys(PARTS[:5:2], "disk")},
    "prefix on disk": {"device_map": dict.fromkeys(PARTS, "cpu") | {"model.prefix": "disk"}},
    "little memory": {"device_map": "auto", "max_memory": {"cpu": 200_000}},
}


@pytest.mark.parametrize("source", ["whole", "aligned"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_captions_are_the_same(chain, expected, tmp_path, name, source):
    assert captions(chain / source, **OFFLOADS[name], offload_folder=str(tmp_path)) == expected


@pytest.mark.parametrize("name", ["disk", "towers on disk", "little memory"])
def test_weights_go_to_disk_where_they_are_sent(chain, tmp_path, name):
    model = LlavaAudioForConditionalGeneration.from_pretrained(
        chain / "aligned", **OFFLOADS[name], offload_folder=str(tmp_path)
    )
    assert "disk" in model.hf_device_map.values()
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert list(tmp_path.glob("*.safetensors"))


def test_digest_of_offloaded_weights_is_that_of_the_weights(chain, tmp_path):
    options = OFFLOADS["disk"] | {"offload_folder": str(tmp_path)}
    model = LlavaAudioForConditionalGeneration.from_pretrained(chain / "aligned", **options)
    whole = LlavaAudioForConditionalGeneration.from_pretrained(chain / "whole")
    base = LlavaAudioForConditionalGeneration.from_pretrained(chain / "base")
    assert weights_digest(model) == weights_digest(whole) != weights_digest(base)


def test_disk_without_a_folder_is_an_error(chain):
    with pytest.raises(ValueError, match="aligned: .*offload_folder=DIR"):
        captions(chain / "aligned", **OFFLOADS["disk"])


@pytest.mark.parametrize("source", ["whole", "aligned"])
def test_tied_weights_stay_together(chain, tmp_path, source):
    options = {"device_map": dict.fromkeys(PARTS, "cpu") | {"lm_head": "disk"}, "offload_folder": str(tmp_path)}
    if LlavaAudioConfig.from_pretrained(chain / source).tie_word_embeddings:
        with pytest.raises(ValueError, match="lm_head.weight and .*embed_tokens.weight are the same weight; put both"):
            captions(chain / source, **options)
    else:
        assert captions(chain / source, **options) == captions(chain / source)


def torchao_config() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# The package, a quantisation, and the minimum cosine of its logits with those of the unquantised model.
QUANTISATIONS = {
    "bitsandbytes 8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), 0.99),
    "bitsandbytes 4 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True), 0.5),
    "torchao 8 bits": ("torchao", torchao_config, 0.99),
    "quanto 8 bits": ("optimum.quanto", lambda: QuantoConfig(weights="int8"), 0.99),
    "quanto 4 bits": ("optimum.quanto", lambda: QuantoConfig(weights="int4"), 0.5),
}


def quantised(name: str):
    package, make, _ = QUANTISATIONS[name]
    if find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed (pip install 'dali-llava[quantization]')")
    return {"quantization_config": make()}


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_quantised_stage_captions_as_the_quantised_whole(chain, name):
    assert captions(chain / "aligned", **quantised(name)) == captions(chain / "whole", **quantised(name))


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_a_stages_own_weights_are_quantised(chain, tiny_processor, name):
    model = LlavaAudioForConditionalGeneration.from_pretrained(chain / "aligned", **quantised(name))
    linear = model.model.audio_tower.layers[0].mlp.fc1
    assert type(linear) is not torch.nn.Linear or type(linear.weight.data) is not torch.Tensor
    assert type(model.model.prefix.weight.data) is torch.Tensor

    sound = np.sin(np.arange(24_000) * 0.1).astype(np.float32)
    prompt = tiny_processor.format_prompt(SOUND_PROMPT, image=True, audio=True, prefix=True)
    inputs = tiny_processor(text=prompt, audio=sound, images=Image.new("RGB", (48, 48), "red"), return_tensors="pt")
    plain = LlavaAudioForConditionalGeneration.from_pretrained(chain / "whole")
    with torch.no_grad():
        one, other = (each(**inputs).logits.float().flatten() for each in (model, plain))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) >= QUANTISATIONS[name][2]


def test_stage_trained_over_a_quantised_base_loads_over_the_plain_one(chain, tmp_path):
    model = LlavaAudioForConditionalGeneration.from_pretrained(chain / "base", **quantised("bitsandbytes 8 bits"))
    model.requires_grad_(False)
    model.model.prefix.requires_grad_(True)
    with torch.no_grad():
        model.model.prefix.weight.fill_(0.5)
    model.save_stage(tmp_path / "stage", base=str(chain / "base"), stage="prefix")
    assert "quantization_config" not in json.loads((tmp_path / "stage" / "config.json").read_text())
    loaded = LlavaAudioForConditionalGeneration.from_pretrained(tmp_path / "stage")
    assert (loaded.model.prefix.weight == 0.5).all()
    assert type(loaded.model.audio_tower.layers[0].mlp.fc1) is torch.nn.Linear


def test_stage_over_stored_quantised_weights_is_refused(chain, tmp_path):
    folder = shutil.copytree(chain, tmp_path / "run")
    tensors = load_file(folder / "base" / "model.safetensors")
    name = "model.audio_tower.layers.0.mlp.fc1.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"base: {name} is stored quantised.*unquantised base"):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "aligned")


def test_renamed_weights_of_the_base_give_way_to_the_stage(chain, tmp_path):
    """A base with a weight name that transformers renames when it loads the file."""
    folder = shutil.copytree(chain, tmp_path / "run")
    tensors = load_file(folder / "base" / "model.safetensors")
    renamed = {name.replace("model.audio_tower.", "model.ears."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    options = {"key_mapping": {r"^model\.ears": "model.audio_tower"}}
    loaded = LlavaAudioForConditionalGeneration.from_pretrained(folder / "aligned", **options).state_dict()
    for name, tensor in LlavaAudioForConditionalGeneration.from_pretrained(chain / "whole").state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_backbone_and_auto_class_go_the_same_road(chain, tmp_path):
    options = OFFLOADS["prefix on disk"] | {"offload_folder": str(tmp_path)}
    loaded = AutoModelForImageTextToText.from_pretrained(chain / "aligned", **options)
    assert type(loaded) is LlavaAudioForConditionalGeneration and loaded.name_or_path == str(chain / "aligned")
    backbone = LlavaAudioModel.from_pretrained(chain / "aligned", device_map="cpu").state_dict()
    whole = LlavaAudioModel.from_pretrained(chain / "whole").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in backbone.items())


def test_missing_weights_are_an_error_unless_asked_for(chain, tmp_path):
    folder = shutil.copytree(chain, tmp_path / "run")
    tensors = load_file(folder / "base" / "model.safetensors")
    del tensors["model.audio_projector.linear_1.bias"]
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing, the first is model.audio_projector.linear_1.bias"):
        load_captioner(str(folder / "aligned"))
    model, _ = load_captioner(str(folder / "aligned"), strict=False)
    assert not model.model.audio_projector.linear_1.bias.any()


def test_generation_configuration_of_the_base_is_kept(chain, tmp_path):
    folder = shutil.copytree(chain, tmp_path / "run")
    path = folder / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 77}))
    assert (
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "aligned").generation_config.max_new_tokens == 77
    )


def test_stage_without_a_processor_takes_the_one_below(chain):
    assert not (chain / "aligned" / "processor_config.json").exists()
    assert find_checkpoint(chain / "aligned").processor == (str(chain / "base"), {})


def test_chain_that_leads_back_to_itself_is_an_error(chain, tmp_path):
    folder = shutil.copytree(chain, tmp_path / "run")
    path = folder / "prefix" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../aligned"}))
    with pytest.raises(ValueError, match="stage.json leads back to itself"):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "aligned")


def test_stage_copied_alone_names_its_base_and_how_to_get_it(chain, tmp_path):
    shutil.copytree(chain / "aligned", tmp_path / "alone")
    with pytest.raises(FileNotFoundError) as error:
        load_captioner(str(tmp_path / "alone"))
    for part in ("stage 'aligned'", "'../prefix'", str(tmp_path / "prefix"), "dali-llava merge STAGE OUT"):
        assert part in str(error.value)


@pytest.fixture
def hub_cache(chain, tmp_path):
    """A cache of the Hub that contains the folder of the run as a repository, `org/run`."""
    repository = tmp_path / "models--org--run"
    shutil.copytree(chain, repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    return {"cache_dir": str(tmp_path)}


def test_run_on_the_hub_loads_from_the_cache_where_the_hub_cannot_be_reached(chain, hub_cache, monkeypatch):
    asked = []

    def unreachable(self, *args, **kwargs):
        asked.append(args)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    options = hub_cache | {"subfolder": "aligned"}
    checkpoint = find_checkpoint("org/run", **options)
    assert [stage.name for stage in checkpoint.stages] == ["aligned", "prefix"]
    assert checkpoint.base == ("org/run", hub_cache | {"local_files_only": True, "subfolder": "base"})
    loaded = LlavaAudioForConditionalGeneration.from_pretrained("org/run", **options).state_dict()
    whole = LlavaAudioForConditionalGeneration.from_pretrained(chain / "whole").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.items())
    assert asked == [("org/run",)] * 2  # once per call, without retries


def refuse(error: Exception):
    def model_info(self, *args, **kwargs):
        raise error

    return model_info


@pytest.mark.parametrize(
    ("name", "error", "kind", "message"),
    [
        ("org/nothing", OSError("no network"), ConnectionError, r"cannot be reached \(no network\).*network"),
        ("org/nothing", TimeoutError(), ConnectionError, r"cannot be reached \(TimeoutError\)"),
        ("not/an/id", None, FileNotFoundError, "not a valid ORG/NAME of a model"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_at_once(name, error, kind, message, tmp_path, monkeypatch):
    if error is not None:
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse(error))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits and asks again"))
    with pytest.raises(kind, match=f"^{name}: no such folder.*{message}"):
        LlavaAudioForConditionalGeneration.from_pretrained(name, cache_dir=str(tmp_path))


def test_a_model_that_the_hub_does_not_have_is_told(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    response = SimpleNamespace(headers={}, request=None, status_code=404)
    for kind, message in (
        (RepositoryNotFoundError, "the Hub has no public model with this name; check the spelling"),
        (GatedRepoError, "is gated; request access"),
        (RevisionNotFoundError, "has no revision 'v2'"),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse(kind("404", response=response)))
        with pytest.raises(FileNotFoundError, match=f"org/nothing: no such folder, and .*{message}"):
            reach_hub("org/nothing", {"cache_dir": str(tmp_path), "revision": "v2"})


def test_offline_mode_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: pytest.fail("it asks the Hub"))
    with pytest.raises(ConnectionError, match="offline mode is on"):
        reach_hub("org/nothing", {"cache_dir": str(tmp_path), "local_files_only": True})
