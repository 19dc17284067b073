"""Captioners with a fusion: fused tokens fill the placeholders, and images alone are captioned as before."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModelWithProjection

from dali_llava.modeling import (
    LlavaAudioConfig,
    LlavaAudioForConditionalGeneration,
    LlavaAudioOnlyForConditionalGeneration,
    LlavaAudioTowers,
)
from dali_llava.modeling.fusion_inputs import FusionInputs
from dali_llava.processing import SOUND_PROMPT, LlavaAudioProcessor
from dali_llava.train.losses import TokenAssignmentLoss


IMAGE, AUDIO, PREFIX = 4, 5, 6
HEADS = {"fusion_options": {"num_attention_heads": 4}}
CONFIGS = {
    "shared_projector": {},
    "ot_attention": {"fusion_options": {"rescale": True}},
    "cross_attention": HEADS,
    "joint_encoder": HEADS,
    "q_former": HEADS,
}


def build(config: LlavaAudioConfig, **fields) -> LlavaAudioForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaAudioForConditionalGeneration(LlavaAudioConfig(**{**config.to_dict(), **fields})).eval()
    with torch.no_grad():
        model.model.prefix.weight.normal_(std=0.5)
        for weight in (*model.model.audio_projector.parameters(), *model.model.fusion.parameters()):
            weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def fused(request, model, tiny_config) -> LlavaAudioForConditionalGeneration:
    """A captioner with a fusion and the weights of the tiny captioner, which has none. Do not modify it."""
    captioner = build(tiny_config, fusion=request.param, **CONFIGS[request.param])
    shared = {k: v for k, v in model.state_dict().items() if "audio_projector" not in k}
    missing, unexpected = captioner.load_state_dict(shared, strict=False)
    assert not unexpected and {name.split(".")[1] for name in missing} <= {"audio_projector", "fusion"}
    return captioner


@pytest.fixture(scope="module")
def pooled(tiny_config) -> LlavaAudioForConditionalGeneration:
    """A captioner with one token per frame and OT attention. Do not modify it."""
    vision = {**tiny_config.vision_config.to_dict(), "projection_dim": 32}
    return build(tiny_config, vision_config=vision, vision_pooling="frame", fusion="ot_attention")


def new_tokens(model, inputs, **options) -> list[list[int]]:
    with torch.no_grad():
        tokens = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE, AUDIO, PREFIX], **options
        )
    rows = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


def test_images_alone_are_captioned_as_without_fusion(fused, model, encode, mixed_samples):
    """Bit for bit, also with other weights in the fusion, and beside text."""
    batch = encode([mixed_samples[1], mixed_samples[3]])
    with torch.no_grad():
        assert torch.equal(fused(**batch).logits, model(**batch).logits)
    assert new_tokens(fused, batch, num_beams=3) == new_tokens(model, batch, num_beams=3)


def test_fused_tokens_fill_the_placeholders_of_their_sample(fused, encode, mixed_samples):
    batch = encode(mixed_samples, audio_kwargs={"padding": "longest"})
    base = fused.model
    with torch.no_grad():
        images = base.encode_image(batch["pixel_values"])
        clips = base.encode_audio(batch["input_features"], batch["input_features_mask"])
        keep = base.audio_tower.token_mask(batch["input_features_mask"])
        clips = [clip[mask] for clip, mask in zip(clips, keep, strict=True)]
        expected = []
        none = images[0, :0]
        heard = [clips[0], none, clips[1], none, clips[2]]  # the clips and images of `mixed_samples`
        shown = [none, images[0], images[1], none, none]
        for row, (clip, image) in enumerate(zip(heard, shown, strict=True)):
            if len(image) and not len(clip):
                projected = {AUDIO: none, IMAGE: base.multi_modal_projector(image)}
            else:
                inputs = FusionInputs.from_samples([clip], [image])
                audio, picture = base.fusion(*inputs.to_tuple())
                audio, picture = audio[inputs.audio_mask], picture[inputs.image_mask]
                projected = {AUDIO: base.audio_projector(audio), IMAGE: base.audio_projector(picture)}
            sources = {key: iter(value) for key, value in (projected | {PREFIX: base.prefix.weight}).items()}
            word = fused.get_input_embeddings().weight
            expected.append(
                torch.stack([next(sources[t]) if t in sources else word[t] for t in batch["input_ids"][row].tolist()])
            )
            assert not list(sources[AUDIO]) and not list(sources[IMAGE])
        logits = fused(inputs_embeds=torch.stack(expected), attention_mask=batch["attention_mask"]).logits
        outputs = fused(**batch)
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[attended], logits[attended], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(outputs.image_hidden_states).all()
    assert outputs.image_hidden_states.shape == (72, 32)
    assert len(outputs.audio_hidden_states) == sum(map(len, clips))
    # for a loss between the tokens of the encoders
    both = outputs.fusion_inputs
    torch.testing.assert_close(both.audio_tokens[both.audio_mask], clips[1])
    torch.testing.assert_close(both.image_tokens[both.image_mask], images[1])


@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_batch_equals_samples_one_by_one(fused, encode, mixed_samples, beams):
    kwargs = {"audio_kwargs": {"padding": "longest"}}
    batch = encode(mixed_samples, **kwargs)
    assert (batch["attention_mask"].diff() == 1).sum() >= 4  # padding on the left
    together = new_tokens(fused, batch, num_beams=beams)
    assert new_tokens(fused, batch, num_beams=beams, use_cache=False) == together
    alone = [new_tokens(fused, encode([sample], **kwargs), num_beams=beams)[0] for sample in mixed_samples]
    assert together == alone and len(set(map(tuple, alone))) > 2
    with torch.no_grad():
        last = fused(**batch).logits[:, -1]
        singles = torch.cat([fused(**encode([sample], **kwargs)).logits[:, -1] for sample in mixed_samples])
    torch.testing.assert_close(last, singles, rtol=1e-4, atol=1e-4)


def test_towers_run_once_a_caption(fused, encode, mixed_samples):
    calls = []
    parts = {"audio": "audio_tower", "image": "vision_tower", "fusion": "fusion"}
    hooks = [
        fused.model.get_submodule(part).register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in parts.items()
    ]
    assert max(map(len, new_tokens(fused, encode(mixed_samples), num_beams=2))) > 1
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted(parts)


def test_audio_alone_is_projected_without_images(fused, encode, mixed_samples):
    batch = encode(mixed_samples[:1])
    with torch.no_grad():
        outputs = fused(**batch)
        tokens = fused.model.encode_audio(batch["input_features"])[0]
    assert outputs.fusion_inputs is None and outputs.image_hidden_states is None
    expected = {"ot_attention": F.normalize(tokens, dim=1), "shared_projector": tokens, "cross_attention": tokens}
    if (name := fused.config.fusion) in expected:
        torch.testing.assert_close(outputs.audio_hidden_states, fused.model.audio_projector(expected[name]))


def test_a_loss_between_the_encoders_tokens_trains_the_audio_tower(tiny_config, encode, mixed_samples):
    captioner = build(tiny_config, fusion="ot_attention").train()
    batch = encode(mixed_samples[:3])
    outputs = captioner(**batch, labels=batch["input_ids"])
    alignment = TokenAssignmentLoss()(*outputs.fusion_inputs.to_tuple()).loss
    tower = list(captioner.model.audio_tower.parameters())
    gradients = torch.autograd.grad(alignment, tower, retain_graph=True)
    assert all(gradient.any() for gradient in gradients)
    (outputs.loss + alignment).backward()
    assert captioner.model.audio_projector.weight.grad.any()


def test_wrong_inputs_are_refused(fused, encode, tiny_processor, mixed_samples):
    sample = mixed_samples[2]
    two = tiny_processor(
        text=["USER: What ASSISTANT:", sample["text"].replace("<audio>", "<audio><audio>")],
        images=[sample["images"]],
        audio=[sample["audio"]] * 2,
        return_tensors="pt",
    )
    with pytest.raises(ValueError, match="sample 1 has images and 2 clips; a fusion takes one clip per sample"):
        fused(**two)
    batch = encode(mixed_samples[:3])
    batch["input_ids"][batch["input_ids"] == AUDIO] = torch.where(torch.arange(128) > 0, AUDIO, 9)
    with pytest.raises(ValueError, match="contains 127 audio placeholders for 128 audio tokens"):
        fused.generate(**batch, max_new_tokens=2)
    with pytest.raises(ValueError, match="the audio projector of the fusion .* is a linear layer"):
        fused.model.copy_image_projector()


def test_two_clips_without_images_are_supported(fused, tiny_processor, mixed_samples):
    sample = mixed_samples[0]
    inputs = tiny_processor(
        text=[sample["text"].replace("<audio>", "<audio><audio>")], audio=[sample["audio"]] * 2, return_tensors="pt"
    )
    with torch.no_grad():
        assert fused(**inputs).audio_hidden_states.shape == (128, 32)


def frames_batch(config: LlavaAudioConfig, layout: list[tuple[int, bool]]) -> dict[str, torch.Tensor]:
    """Left-padded inputs of samples with (number of frames, whether there is audio), one placeholder per frame."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        [1, 8, *[AUDIO] * (64 * heard), *[IMAGE] * frames, *[PREFIX] * (16 * heard), 9, 10 + frames]
        for frames, heard in layout
    ]
    longest = max(map(len, rows))
    clips, count = sum(heard for _, heard in layout), sum(frames for frames, _ in layout)
    audio = config.audio_config
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(count, 3, 48, 48, generator=generator),
        "input_features": torch.randn(clips, audio.max_length, audio.num_mel_bins, generator=generator),
    }


def test_frame_vectors_are_those_of_clip_with_projection(pooled):
    clip = CLIPVisionModelWithProjection(pooled.config.vision_config).eval()
    clip.vision_model.load_state_dict(pooled.model.vision_tower.state_dict())
    clip.visual_projection.load_state_dict(pooled.model.visual_projection.state_dict())
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = pooled.model.encode_image(pixels)
        assert tokens.shape == (3, 1, 32)
        assert torch.equal(tokens[:, 0], clip(pixels).image_embeds)


def test_samples_of_several_frames_equal_samples_one_by_one(pooled):
    """Frames and audio, one frame and audio, frames alone through the shared projector, and audio alone."""
    layout = [(4, True), (1, True), (3, False), (0, True)]
    batch = frames_batch(pooled.config, layout)
    frames, clips = batch["pixel_values"].split([4, 1, 3, 0]), batch["input_features"].split([1, 1, 0, 1])
    together = new_tokens(pooled, batch, num_beams=2)
    with torch.no_grad():
        logits = pooled(**batch).logits[:, -1]
        both = pooled(**batch).fusion_inputs
    assert both.image_mask.sum(1).tolist() == [4, 1] and both.audio_mask.sum(1).tolist() == [64, 64]
    assert len(pooled.model.get_image_features(frames[0]).pooler_output) == 4
    for row, (own_frames, own_clips) in enumerate(zip(frames, clips, strict=True)):
        kept = batch["attention_mask"][row].bool()
        single = {"input_ids": batch["input_ids"][row, kept][None], "attention_mask": torch.ones(1, int(kept.sum()))}
        single |= {"pixel_values": own_frames} if len(own_frames) else {}
        single |= {"input_features": own_clips} if len(own_clips) else {}
        with torch.no_grad():
            torch.testing.assert_close(logits[row], pooled(**single).logits[0, -1], rtol=1e-4, atol=1e-4)
        assert new_tokens(pooled, single, num_beams=2)[0] == together[row]


def test_the_processor_writes_a_placeholder_per_frame(pooled, tiny_processor, mixed_samples, tmp_path):
    pooled.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    processor = LlavaAudioProcessor.from_pretrained(tmp_path, num_frames=4)
    pooled.config.check_processor(processor)
    picture, sample = mixed_samples[1]["images"], mixed_samples[2]
    inputs = processor(
        text=[processor.format_prompt(SOUND_PROMPT, image=True), sample["text"]],
        images=[[picture, sample["images"], picture], [sample["images"]]],
        audio=[sample["audio"]],
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = pooled(**inputs)
        frames = pooled.model.encode_image(inputs["pixel_values"])[:, 0]
        projected = pooled.model.audio_projector(F.normalize(frames[:3], dim=1))
    assert len(frames) == 4
    torch.testing.assert_close(outputs.image_hidden_states[:3], projected)  # without audio
    both = outputs.fusion_inputs
    assert torch.equal(both.image_tokens[both.image_mask], frames[3:])


def test_models_of_frame_vectors_have_no_image_projector(pooled, tiny_processor, tmp_path):
    pooled.save_pretrained(tmp_path)
    names = {name.split(".")[1] for name in pooled.state_dict() if name.startswith("model.")}
    assert "visual_projection" in names and "multi_modal_projector" not in names
    towers, report = LlavaAudioTowers.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(towers.eval().encode_image(pixels), pooled.model.encode_image(pixels))
    heard, report = LlavaAudioOnlyForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    batch = frames_batch(pooled.config, [(0, True)])
    del batch["pixel_values"]
    with torch.no_grad():
        assert torch.equal(heard.eval()(**batch).logits, pooled(**batch).logits)
    with pytest.raises(ValueError, match="the processor has vision_pooling 'patches', the model 'frame'"):
        pooled.config.check_processor(tiny_processor)


def test_a_captioner_without_fusion_becomes_one_with_a_fusion(tiny_model_dir, encode, mixed_samples, tmp_path):
    """The base keeps its weights, and a stage on it holds only what was trained and the configuration."""
    captioner, report = LlavaAudioForConditionalGeneration.from_pretrained(
        tiny_model_dir, fusion="ot_attention", fusion_options={"rescale": True}, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {f"model.audio_projector.{name}" for name in ("weight", "bias")}
    projector = captioner.requires_grad_(False).model.audio_projector.requires_grad_(True)
    with torch.no_grad():
        projector.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    captioner.save_stage(tmp_path / "stage", base=str(tiny_model_dir), stage="lavcap")
    trained = json.loads((tmp_path / "stage" / "stage.json").read_text())["trained"]
    assert set(trained) == set(report["missing_keys"])
    loaded = LlavaAudioForConditionalGeneration.from_pretrained(tmp_path / "stage").eval()
    assert (loaded.config.fusion, loaded.config.fusion_options) == ("ot_attention", {"rescale": True})
    batch = encode(mixed_samples)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, captioner.eval()(**batch).logits)
    other = LlavaAudioForConditionalGeneration.from_pretrained(
        tmp_path / "stage", fusion="shared_projector", fusion_options={}
    )
    assert other.config.fusion == "shared_projector"
    assert torch.equal(other.model.audio_projector.weight, projector.weight)


STRANGER = """
source, arrays = sys.argv[1:]

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
media = np.load(arrays)
text = processor.format_prompt("What sound can be heard in this scene ?", image=True, audio=True, prefix=True)
inputs = processor(text=text, images=media["image"], audio=media["audio"], return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=2).tolist()
imported = sorted(name for name in sys.modules if name.partition(".")[0] == "dali_llava")
print(json.dumps({"tokens": tokens, "fusion": type(model.model.fusion).__name__, "imported": imported}))
"""


def test_checkpoints_with_a_fusion_load_without_the_package(
    tiny_config, tiny_processor, run_without_package, mixed_samples, tmp_path
):
    fused = build(tiny_config, fusion="joint_encoder", **HEADS)
    fused.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    sample = mixed_samples[2]
    np.savez(tmp_path / "media.npz", image=np.asarray(sample["images"]), audio=sample["audio"])
    report = run_without_package(STRANGER, tmp_path, tmp_path / "model", tmp_path / "media.npz")
    text = tiny_processor.format_prompt(SOUND_PROMPT, image=True, audio=True, prefix=True)
    inputs = tiny_processor(text=text, images=sample["images"], audio=sample["audio"], return_tensors="pt")
    expected = fused.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=2).tolist()
    assert report == {"tokens": expected, "fusion": "JointEncoder", "imported": []}


@pytest.mark.parametrize("modality", [0, 1, 3])
def test_idle_parts_change_nothing_and_get_zero_gradients(fused, encode, mixed_samples, modality, monkeypatch):
    """On several ranks, a batch of audio, of images or of text leaves no trained part without a gradient."""
    batch = encode(mixed_samples[modality : modality + 1])
    captioner = copy.deepcopy(fused).train()
    expected = captioner(**batch, labels=batch["input_ids"]).loss
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    loss = captioner(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    parts = ("audio_tower", "fusion", "audio_projector", "multi_modal_projector")
    gradients = {part: [w.grad for w in captioner.model.get_submodule(part).parameters()] for part in parts}
    assert torch.equal(loss, expected)
    assert all(gradient is not None for own in gradients.values() for gradient in own)
    used = {part for part, own in gradients.items() if any(gradient.any() for gradient in own)}
    in_use = {0: {"audio_tower", "audio_projector"}, 1: {"multi_modal_projector"}, 3: set()}
    assert used - {"fusion"} == in_use[modality]


def test_trained_parts_are_float32_on_towers_in_half_precision(tiny_config, encode, mixed_samples):
    captioner = build(tiny_config, fusion="cross_attention", **HEADS).to(torch.bfloat16)
    for part in (captioner.model.audio_projector, captioner.model.fusion):
        part.float()
    batch = encode(mixed_samples)
    outputs = captioner(**batch, labels=batch["input_ids"])
    outputs.loss.backward()
    assert outputs.fusion_inputs.audio_tokens.dtype == torch.bfloat16
    assert all(weight.grad.dtype == torch.float32 for weight in captioner.model.fusion.parameters())
