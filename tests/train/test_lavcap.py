"""LAVCap from its command line: its loss, what it trains, its errors, and that its model captions everywhere."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, pipeline

from dali_llava.cli import main as command_line
from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.modeling.pretrained_llava_audio import LlavaAudioPreTrainedModel
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.corpora.rows import open_audio
from dali_llava.train import lavcap
from dali_llava.train.data.clips import open_frame
from dali_llava.train.losses import TokenAssignmentLoss
from dali_llava.train.trainers.lavcap import LavcapModel


FOUR_HEADS = ["--fusion_options", '{"num_attention_heads": 4}']

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Fails if a model is loaded: bad input must be reported before."""
    monkeypatch.setattr(
        LlavaAudioPreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded")
    )


@pytest.fixture(scope="module")
def adapted(run_stage, run_dir, tmp_path_factory):
    """The distilled model after two steps with OT attention and adapters: its trainer and its folder."""
    folder = tmp_path_factory.mktemp("lavcap")
    trainer = run_stage("lavcap", run_dir / "distilled", folder, "--logging_steps", "1")
    return trainer, folder


def load(folder) -> LlavaAudioForConditionalGeneration:
    return LlavaAudioForConditionalGeneration.from_pretrained(folder).eval()


def encode(processor, rows):
    text = [processor.format_prompt(processor.sound_prompt, image=True, audio=True)] * len(rows)
    return processor(
        text=text,
        images=[[open_frame(row, 0)] for row in rows],
        audio=[open_audio(row) for row in rows],
        sampling_rate=16_000,
        return_tensors="pt",
    )


def test_adapters_and_the_fusions_projector_are_trained(adapted, run_dir):
    _, folder = adapted
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert {name.split(".")[3] for name in names} == {"audio_projector", "language_model", "audio_tower"}
    assert {name.split(".")[-3] for name in names if "lora_" in name} == {"q_proj", "v_proj"}
    description = json.loads((folder / "stage.json").read_text())
    assert description["stage"] == "lavcap"
    before, after = load(run_dir / "distilled").state_dict(), load(folder).state_dict()
    frozen = ("model.vision_tower.", "model.multi_modal_projector.", "model.prefix.", "lm_head.")
    for name in before:
        if name.startswith(frozen):
            assert torch.equal(after[name], before[name]), name


def test_saved_model_has_the_fusion_the_prompt_and_the_beams(adapted):
    _, folder = adapted
    model, processor = load(folder), LlavaAudioProcessor.from_pretrained(folder)
    assert (model.config.fusion, list(model.config.prefix_modalities)) == ("ot_attention", [])
    assert (model.generation_config.num_beams, model.generation_config.max_new_tokens) == (4, 32)
    assert GenerationConfig.from_pretrained(folder).num_beams == 4
    assert processor.sound_prompt == "Please describe the audio."
    prompt = processor.format_prompt(processor.sound_prompt, image=True, audio=True)
    assert prompt == "USER: <Speech><audio><image></Speech> Please describe the audio.\nASSISTANT:"


def test_temperature_is_saved_beside_the_stage(adapted):
    trainer, folder = adapted
    saved = load_file(folder / "objective.safetensors")
    assert set(saved) == {"log_scale"}
    assert saved["log_scale"].item() == trainer.model.objective.log_scale.item() != math.log(1 / 0.07)


def test_loss_is_the_smoothed_cross_entropy_and_the_weighted_objective(captioner, avworld_processor, rows):
    """Against the losses of the definition, and of a second encoding by the towers."""
    config = LlavaAudioConfig.from_dict(captioner.config.to_dict() | {"fusion": "ot_attention"})
    fused = LlavaAudioForConditionalGeneration(config).eval()
    inputs = encode(avworld_processor, rows)
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) >= inputs["input_ids"].shape[1] - 5, 7, -100)
    labels = labels.expand_as(inputs["input_ids"])
    model = LavcapModel(fused, TokenAssignmentLoss(rescale=True), ot_weight=0.5, label_smoothing=0.1).eval()
    with torch.no_grad():
        output = model(labels=labels, **inputs)
        logits = fused(**inputs).logits[:, -6:-1].double().log_softmax(dim=-1)
        tokens = fused.model.encode_audio(inputs["input_features"]), fused.model.encode_image(inputs["pixel_values"])
        assignment = TokenAssignmentLoss(rescale=True)(*tokens).loss
    expected = -(0.9 * logits[..., 7].mean() + 0.1 * logits.mean())
    assert output.caption_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.assignment_loss.item() == pytest.approx(assignment.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(expected.item() + 0.5 * assignment.item(), rel=1e-5)
    assert output.num_tokens == 5 * len(rows)


def test_audio_alone_has_a_zero_objective_with_gradient(captioner, avworld_processor, rows):
    """Processes whose batch lacks pairs must not wait for the others."""
    config = LlavaAudioConfig.from_dict(captioner.config.to_dict() | {"fusion": "ot_attention"})
    model = LavcapModel(LlavaAudioForConditionalGeneration(config), TokenAssignmentLoss())
    text = [avworld_processor.format_prompt("what is it?", audio=True)] * 2
    audio = [open_audio(row) for row in rows[:2]]
    inputs = avworld_processor(text=text, audio=audio, sampling_rate=16_000, return_tensors="pt")
    output = model(labels=inputs["input_ids"], **inputs)
    output.loss.backward()
    assert output.assignment_loss == 0 and model.objective.log_scale.grad == 0
    assert output.loss == output.caption_loss


def test_accumulated_batches_train_as_one_batch(run_stage, run_dir, tmp_path):
    common = ["--lora_dropout", "0", "--learning_rate", "1e-3", "--adam_epsilon", "1e-3", "--max_grad_norm", "0"]
    run_stage("lavcap", run_dir / "aligned", tmp_path / "whole", *common)
    halves = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    run_stage("lavcap", run_dir / "aligned", tmp_path / "halves", *common, *halves)
    whole, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    start = load_file(tmp_path / "whole" / "objective.safetensors")["log_scale"]
    torch.testing.assert_close(load_file(tmp_path / "halves" / "objective.safetensors")["log_scale"], start)
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--fusion", "cross_attention", *FOUR_HEADS], {"audio_projector", "fusion", "audio_tower", "language_model"}),
        (["--fusion", "shared_projector", "--ot_weight", "0"], {"audio_projector", "audio_tower", "language_model"}),
        (["--lora", "audio_tower"], {"audio_projector", "audio_tower"}),
        (["--modalities", "audio", "--ot_weight", "0"], {"audio_projector", "audio_tower", "language_model"}),
    ],
)
def test_strategies(run_stage, run_dir, tmp_path, words, parts):
    trainer = run_stage("lavcap", run_dir / "aligned", tmp_path, "--max_steps", "1", *words)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {name.split(".")[3] for name in names} == parts
    assert hasattr(trainer.model, "objective") == ("--ot_weight" not in words)
    assert (tmp_path / "objective.safetensors").exists() == hasattr(trainer.model, "objective")
    assert load(tmp_path).config.fusion == trainer.model.config.fusion


def test_audio_tower_in_full_and_frozen_language_model(run_stage, run_dir, tmp_path):
    words = ["--lora", "none", "--train_parts", "audio_projector", "fusion", "audio_tower", "--max_steps", "1"]
    run_stage("lavcap", run_dir / "aligned", tmp_path, *words)
    names = set(load_file(tmp_path / "stage.safetensors"))
    assert {name.split(".")[1] for name in names} == {"audio_projector", "audio_tower"}


def test_captions_are_the_same_from_every_entrance(adapted, media_dir, tmp_path, capsys, monkeypatch):
    """The command line on the stage and on the merged model; `generate` and the pipelines with the Auto classes."""
    _, folder = adapted
    merged = tmp_path / "merged"
    assert command_line(["merge", str(folder), str(merged)]) == 0
    capsys.readouterr()
    said = []
    for model in (folder, merged):
        assert command_line(["caption", str(model), str(media_dir / "clip.mp4"), "--max-new-tokens", "8"]) == 0
        said.append(capsys.readouterr().out.strip().partition("\t")[2])
    assert said[0] == said[1]
    model = AutoModelForImageTextToText.from_pretrained(merged, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(merged, trust_remote_code=True)
    assert model.generation_config.num_beams == 4
    state, merged_state = load(folder).state_dict(), model.state_dict()
    assert state.keys() == merged_state.keys()
    assert all(torch.allclose(state[name], merged_state[name], atol=1e-6) for name in state)
    media = {"image": Image.new("RGB", (48, 48), "red"), "audio": np.sin(np.arange(16_000) / 5).astype(np.float32)}
    for kinds in (("image", "audio"), ("audio",)):
        content = [{"type": kind, kind: media[kind]} for kind in kinds]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": processor.sound_prompt}]}]
        text = processor.format_prompt(processor.sound_prompt, **dict.fromkeys(kinds, True))
        given = {"images": media["image"]} if "image" in kinds else {}
        inputs = processor(text=text, audio=media["audio"], return_tensors="pt", **given)
        tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        caption = processor.decode(tokens, skip_special_tokens=True)
        for task in ("image-text-to-text", "any-to-any"):
            (answer,) = pipeline(task, model=model, processor=processor)(
                chat, max_new_tokens=8, return_full_text=False
            )
            assert answer["generated_text"].strip() == caption.strip() != ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fusion", "sum"], "fusion 'sum' is unknown"),
        (["--fusion", "concatenate"], "has none (concatenate); give one, such as --fusion ot_attention"),
        (["--fusion_options", '{"heads": 2}'], "'ot_attention' has no option heads"),
        (["--fusion", "cross_attention", "--fusion_options", '{"num_attention_heads": 5}'], "must divide the width"),
        (["--ot_options", '{"temperature": 2}'], "ot_options: unknown option temperature"),
        (["--ot_options", '{"eps": 0}'], "ot_options: eps and num_iterations must be positive"),
        (["--ot_weight", "-1"], "ot_weight must be at least 0, not -1.0"),
        (["--modalities", "audio"], "audio alone has no image tokens"),
        (["--modalities", "image"], "modalities: image is not supported"),
        (["--train_parts", "audio_tower"], "its parts must be trained; add audio_projector, fusion"),
        (["--train_parts", "audio_projector", "fusion", "prefix"], "does not use the prefix"),
        (["--lora", "vision_tower"], "lora: unknown part vision_tower"),
        (["--prompt", "IV"], "prompt 'IV' is unknown; choose I, II, III"),
        (["--prompt", "III", "--fusion", "joint_encoder", *FOUR_HEADS], "fusion='joint_encoder' joins them"),
        (["--longest_caption", "0"], "longest_caption must be at least 1, not 0"),
        (["--label_smoothing_factor", "1"], "label_smoothing_factor must be at least 0 and less than 1"),
        (["--split", "captioner"], "no captions"),
    ],
)
def test_bad_input_before_the_model_is_loaded(unloaded, stage_words, run_dir, tmp_path, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lavcap.main(stage_words("lavcap", run_dir / "aligned", tmp_path, *words))


def test_tag_that_is_a_placeholder(stage_words, run_dir, tmp_path):
    with pytest.raises(ValueError, match="audio_tag: the tokenizer .* reads a tag"):
        lavcap.main(stage_words("lavcap", run_dir / "aligned", tmp_path, "--audio_tag", "Audio"))


def test_full_size_trains_the_papers_parameters(tmp_path):
    """LoRA on CED-base (294,912) and Llama-2-7B (4,194,304), the projector (3,149,824) and the temperature (1)."""
    arguments = lavcap.parse(
        [str(lavcap_config()), "--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    )
    base, _ = lavcap.paper_sizes()
    stage = lavcap.stage_model(arguments, lavcap.fused_config(arguments, base))
    model = stage.on_meta(base, torch.float32)
    trained = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    by_part = {
        part: sum(count for name, count in trained.items() if part in name)
        for part in ("audio_tower", "language_model", "audio_projector", "objective")
    }
    assert by_part == {
        "audio_tower": 294_912,
        "language_model": 4_194_304,
        "audio_projector": 3_149_824,
        "objective": 1,
    }
    assert sum(trained.values()) == 7_639_041


def lavcap_config():
    from dali_llava.train.command_line import CONFIGS

    return CONFIGS / "full" / "lavcap.yaml"
