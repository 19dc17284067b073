"""A captioner from a language model and a vision tower: the same logits as both in LLaVA, and bad sources."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.convert.export_llava import export_llava
from dali_llava.modeling.convert.language_model import convert
from dali_llava.processing.assembly import load_language_model_tokenizer


WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 48, "patch_size": 8, "initializer_range": 0.3, "initializer_factor": 3.0}
CLASS = "vision_model.embeddings.class_embedding"
AUDIO = {"num_mel_bins": 64, "max_length": 256, **WIDTH}


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    """A CLIP model with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        CLIPModel(CLIPConfig(text_config=WIDTH, vision_config=WIDTH | IMAGE)).save_pretrained(folder)
    return folder


def convert_to(folder, source, vision) -> LlavaAudioForConditionalGeneration:
    """The captioner, loaded from its folder, without missing or unused weights."""
    folder.mkdir()
    convert(source, load_language_model_tokenizer(source), vision, AUDIO).save(folder)
    model, report = LlavaAudioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def captioner_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("converted") / "model"


@pytest.fixture(scope="module")
def captioner(language_model_dir, clip_dir, captioner_dir):
    return convert_to(captioner_dir, language_model_dir, clip_dir)


def test_text_logits_and_tokens_equal_those_of_the_language_model(captioner, language_model_dir):
    plain = AutoModelForCausalLM.from_pretrained(language_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(language_model_dir)
    inputs = tokenizer("What can be heard?", return_tensors="pt")
    rows = plain.config.vocab_size
    assert captioner.config.text_config.vocab_size == 320  # for three more tokens, in a multiple of 64
    with torch.no_grad():
        logits = captioner(**inputs).logits
        torch.testing.assert_close(logits[..., :rows], plain(**inputs).logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.1
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(captioner.generate(**inputs, **options), plain.generate(**inputs, **options))


def test_tied_embeddings_stay_tied_and_new_rows_are_the_mean(captioner, language_model_dir):
    assert captioner.config.tie_word_embeddings and captioner.config.text_config.tie_word_embeddings
    assert captioner.lm_head.weight is captioner.get_input_embeddings().weight
    assert captioner.config.text_config.num_key_value_heads == 2
    embeddings = load_file(language_model_dir / "model.safetensors")["model.embed_tokens.weight"]
    rows = captioner.lm_head.weight.detach()
    old, new = rows[: len(embeddings)], rows[len(embeddings) :]
    assert torch.equal(old, embeddings)
    torch.testing.assert_close(new, embeddings.mean(0).expand_as(new), rtol=0, atol=1e-6)
    assert captioner.config.image_token_id == len(embeddings)
    captioner.resize_token_embeddings(len(rows) + 5)
    assert captioner.lm_head.weight is captioner.get_input_embeddings().weight
    assert len(captioner.lm_head.weight) == captioner.config.text_config.vocab_size == len(rows) + 5
    captioner.resize_token_embeddings(len(rows))


def test_image_logits_equal_those_of_native_llava(captioner, clip_dir):
    fields = {"image_token_index": captioner.config.image_token_id, "tie_word_embeddings": True}
    vision = CLIPVisionConfig.from_pretrained(clip_dir)
    native = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=captioner.config.text_config, **fields)
    ).eval()
    towers = CLIPModel.from_pretrained(clip_dir).vision_model.state_dict()
    language_model = {
        name: weight
        for name, weight in captioner.state_dict().items()
        if "language_model" in name or "lm_head" in name
    }
    projector = captioner.model.multi_modal_projector.state_dict()
    native.load_state_dict(
        language_model
        | {f"model.vision_tower.{name}": weight for name, weight in towers.items()}
        | {f"model.multi_modal_projector.{name}": weight for name, weight in projector.items()}
    )
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, 30, (2, 50), generator=generator)
    input_ids[:, 4:40] = captioner.config.image_token_id
    batch = {"input_ids": input_ids, "pixel_values": torch.randn(2, 3, 48, 48, generator=generator)}
    with torch.no_grad():
        logits = captioner(**batch).logits
        assert torch.equal(logits, native(**batch).logits)
        assert not torch.equal(logits[0, -1], captioner(**batch | {"input_ids": input_ids.roll(1, 0)}).logits[1, -1])


def test_sources_are_named_with_their_licences(language_model_dir, clip_dir, captioner, tmp_path):
    entries = [(entry["kind"], entry["name"], entry["license"]) for entry in captioner.config.sources]
    assert entries == [
        ("language-model", language_model_dir.name, "unknown"),
        ("vision", clip_dir.name, "unknown"),
    ]
    licensed = shutil.copytree(language_model_dir, tmp_path / "licensed")
    (licensed / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    entry, _ = convert(licensed, load_language_model_tokenizer(licensed), clip_dir, AUDIO).config.sources
    assert (entry["license"], entry["license_from"]) == ("apache-2.0", "README.md")


def test_exported_llava_has_the_same_logits(captioner, captioner_dir, tmp_path):
    """It keeps the rows of the placeholders, because the image token is one of them."""
    export_llava(captioner_dir, tmp_path)
    native = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert native.lm_head.weight is native.get_input_embeddings().weight
    inputs = {"input_ids": torch.tensor([[*[captioner.config.image_token_id] * 36, 40, 41]])}
    inputs["pixel_values"] = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(native(**inputs).logits, captioner(**inputs).logits)


def test_siglip_and_a_random_tower(language_model_dir, tmp_path):
    """SigLIP has no class token; a folder with a configuration alone gives the same random tower each time."""
    siglip = SiglipVisionModel(
        SiglipVisionConfig(**WIDTH | {"image_size": 48, "patch_size": 8}, vision_use_head=False)
    )
    siglip.save_pretrained(tmp_path / "siglip")
    captioner = convert_to(tmp_path / "seeing", language_model_dir, tmp_path / "siglip")
    assert captioner.config.vision_feature_select_strategy == "full"
    expected = siglip.state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in captioner.model.vision_tower.state_dict().items())
    (tmp_path / "siglip" / "model.safetensors").unlink()
    first, second = (convert_to(tmp_path / name, language_model_dir, tmp_path / "siglip") for name in ("one", "two"))
    weights, same = first.state_dict(), second.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    tower = first.model.vision_tower.embeddings.patch_embedding.weight
    assert tower.std() > 0 and not torch.equal(tower, captioner.model.vision_tower.embeddings.patch_embedding.weight)
    projectors = (first.model.multi_modal_projector, first.model.audio_projector)
    assert torch.equal(*(projector.linear_1.weight for projector in projectors))


@pytest.fixture
def sources(language_model_dir, clip_dir, tmp_path) -> tuple:
    """Copies of both sources, to damage."""
    return tuple(shutil.copytree(each, tmp_path / each.name) for each in (language_model_dir, clip_dir))


def drop_tensor(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def set_fields(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda words, clip: drop_tensor(words, "model.norm.weight"),
            ValueError,
            "no tensor becomes model.language_model.norm.weight",
        ),
        (lambda words, clip: drop_tensor(clip, CLASS), ValueError, "no tensor becomes model.vision_tower.embeddings"),
        (lambda words, clip: set_fields(words, num_hidden_layers=1), ValueError, "layers.1.*does not have; check"),
        (lambda words, clip: set_fields(words, intermediate_size=48), ValueError, r"\(32, 48\); check the widths"),
        (
            lambda words, clip: shutil.copytree(clip, words, dirs_exist_ok=True),
            ValueError,
            "clip is not a language model",
        ),
        (lambda words, clip: (words / "model.safetensors").unlink(), FileNotFoundError, "no weights in it"),
    ],
)
def test_damaged_source_is_refused(sources, damage, error, message):
    tokenizer = load_language_model_tokenizer(sources[0])
    damage(*sources)
    with pytest.raises(error, match=message):
        convert(sources[0], tokenizer, sources[1], AUDIO)


def test_other_sources_are_refused(language_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(language_model_dir)
    with pytest.raises(ValueError, match="has no vision tower; add --vision"):
        convert(language_model_dir, tokenizer)
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        convert(tmp_path / "absent", tokenizer, tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match="model.onnx: not a .gguf file"):
        convert(tmp_path / "model.onnx", tokenizer, tmp_path)


def test_gguf_without_its_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("dali_llava.processing.assembly.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"model.gguf: reading it needs.*dali-llava\[gguf\]"):
        load_language_model_tokenizer(tmp_path / "model.gguf")
