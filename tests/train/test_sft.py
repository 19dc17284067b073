"""Supervised fine-tuning from its command line: what it trains, its errors, and that captions become references."""

import csv
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.eval.runner import CaptionRunner, Sample
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.pretrained_llava_audio import LlavaAudioPreTrainedModel
from dali_llava.processing import SEE_PROMPT, SOUND_PROMPT
from dali_llava.processing.corpora.rows import open_audio
from dali_llava.train import sft
from dali_llava.train.data.clips import open_frame


trl = pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Fails if a model is loaded: bad input must be reported before."""
    monkeypatch.setattr(
        LlavaAudioPreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded")
    )


@pytest.fixture(scope="module")
def tuned(run_stage, run_dir, tmp_path_factory):
    """The aligned model after two steps on audio and audiovisual turns: its trainer and its folder."""
    folder = tmp_path_factory.mktemp("tuned")
    trainer = run_stage("supervised", run_dir / "aligned", folder, "--logging_steps", "1")
    return trainer, folder


@pytest.fixture
def clips(media_dir, tmp_path):
    """`clips(rows)`: a folder corpus with a video, a sound and a picture, and a table with these rows."""

    def clips(rows: list[dict]) -> list[str]:
        folder = tmp_path / "clips"
        folder.mkdir()
        for name, source in (("video.mp4", "clip.mp4"), ("sound.wav", "bark.wav"), ("picture.jpg", "photo.jpg")):
            shutil.copy(media_dir / source, folder / name)
        with open(folder / "metadata.csv", "w", newline="") as file:
            table = csv.DictWriter(file, ["file_name", "caption", "labels"])
            table.writeheader()
            table.writerows(rows)
        options = json.dumps({"data_dir": str(folder), "missing": "keep"})
        return ["--dataset", "folder", "--split", "train", "--dataset_options", options]

    return clips


def load(folder) -> LlavaAudioForConditionalGeneration:
    return LlavaAudioForConditionalGeneration.from_pretrained(folder).eval()


def test_trainer_is_of_trl(tuned):
    trainer, _ = tuned
    assert isinstance(trainer, trl.SFTTrainer) and isinstance(trainer.args, trl.SFTConfig)
    assert (trainer.args.packing, trainer.args.max_length, trainer.args.gradient_checkpointing) == (False, None, False)


def test_projector_is_trained_and_nothing_else(tuned, run_dir):
    _, folder = tuned
    before, after = load(run_dir / "aligned").state_dict(), load(folder).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if name.startswith("model.audio_projector.")}
    description = json.loads((folder / "stage.json").read_text())
    assert description["stage"] == "sft" and set(description["trained"]) == changed
    assert set(load_file(folder / "stage.safetensors")) == changed
    assert not (folder / "README.md").exists()  # the model card of TRL does not know the stages


def test_picture_logits_are_untouched(tuned, run_dir, avworld_processor, rows):
    text = [avworld_processor.format_prompt(SEE_PROMPT, image=True)] * len(rows)
    inputs = avworld_processor(text=text, images=[open_frame(row, 0) for row in rows], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(load(tuned[1])(**inputs).logits, load(run_dir / "aligned")(**inputs).logits)


def test_prefix_precedes_the_question_as_in_the_base_model(tuned, run_stage, run_dir, tmp_path):
    trainer, folder = tuned
    assert list(load(folder).config.prefix_modalities) == ["audio", "audiovisual"]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    config = trainer.model.config
    assert (batch["input_ids"] == config.prefix_token_id).sum(1).tolist() == [config.prefix_length] * 4
    distilled = run_stage("supervised", run_dir / "distilled", tmp_path, "--modalities", "audio")
    assert list(load(tmp_path).config.prefix_modalities) == ["audiovisual"]
    batch = distilled.data_collator([trainer.train_dataset[index] for index in range(4)])
    assert not (batch["input_ids"] == config.prefix_token_id).any()


@pytest.mark.parametrize(
    ("parts", "modality", "expected"),
    [
        (["prefix"], "audio", ["model.prefix."]),
        (["language_model"], "audio", ["model.language_model.", "lm_head."]),
        (
            ["multi_modal_projector", "audio_tower"],
            "audiovisual",
            ["model.multi_modal_projector.", "model.audio_tower."],
        ),
    ],
)
def test_parts_are_trained_in_full(run_stage, run_dir, tmp_path, parts, modality, expected):
    words = ["--train_parts", *parts, "--modalities", modality, "--max_steps", "1"]
    run_stage("supervised", run_dir / "aligned", tmp_path, *words)
    names = set(load_file(tmp_path / "stage.safetensors"))
    assert {prefix for prefix in expected for name in names if name.startswith(prefix)} == set(expected)
    assert all(name.startswith(tuple(expected)) for name in names)


def test_adapters_are_trained_beside_the_projector(run_stage, run_dir, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    run_stage(
        "supervised", run_dir / "aligned", tmp_path, "--lora", "language_model", "audio_tower", "--lora_rank", "2"
    )
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"audio_projector", "language_model", "audio_tower"} == {name.split(".")[3] for name in names}
    before, after = load(run_dir / "aligned").state_dict(), load(tmp_path).state_dict()
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"audio_projector", "language_model", "audio_tower"}


def test_captions_become_the_references(run_stage, run_dir, tmp_path, clips):
    """Of two sounds, which all parts after the spectrogram learn by heart."""
    references = {"video": "a bell is ringing.", "sound": "a dog is barking."}
    files = {"video": "video.mp4", "sound": "sound.wav"}
    words = clips([{"file_name": files[name], "caption": caption} for name, caption in references.items()])
    words += ["--train_parts", "audio_tower", "audio_projector", "language_model", "--modalities", "audio"]
    words += ["--max_steps", "60", "--learning_rate", "1e-2", "--logging_steps", "10"]
    trainer = run_stage("supervised", run_dir / "aligned", tmp_path / "out", *words)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0]
    runner = CaptionRunner(load(tmp_path / "out"), trainer.processing_class, max_new_tokens=16)
    samples = [
        Sample(id=clip["id"], prompt=SOUND_PROMPT, audio=open_audio(clip)) for clip in list(trainer.train_dataset)
    ]
    assert {result.id: result.caption for result in runner.run(samples)} == references


def test_rows_with_other_media_are_mixed(run_stage, run_dir, tmp_path, clips):
    words = clips(
        [{"file_name": name, "caption": "a dog barking"} for name in ("video.mp4", "sound.wav", "picture.jpg")]
    )
    words += ["--modalities", "audiovisual", "audio", "image", "--per_device_train_batch_size", "3"]
    trainer = run_stage("supervised", run_dir / "aligned", tmp_path / "out", *words)
    assert trainer.state.global_step == 2
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert 1 <= len(batch["input_features"]) <= 2 and 1 <= len(batch["pixel_values"]) <= 2


def test_split_without_captions_is_an_error(run_stage, run_dir, tmp_path, unloaded):
    with pytest.raises(ValueError, match="avworld, split train: no captions; use a corpus or a split with captions"):
        run_stage("supervised", run_dir / "aligned", tmp_path / "out", "--split", "train")


def test_labels_alone_are_an_error(run_stage, run_dir, tmp_path, unloaded, clips):
    words = clips([{"file_name": "video.mp4", "labels": "dog"}])
    with pytest.raises(ValueError, match="folder, split train: no captions; .* or train with train/distill.py"):
        run_stage("supervised", run_dir / "aligned", tmp_path / "out", *words)


def test_clip_without_caption_is_named(run_stage, run_dir, tmp_path, unloaded, clips):
    words = clips([{"file_name": "video.mp4", "caption": "a dog"}, {"file_name": "sound.wav", "labels": "dog"}])
    with pytest.raises(
        ValueError, match="folder, split train: 1 of 2 clips have no caption, the first is sound; add it"
    ):
        run_stage("supervised", run_dir / "aligned", tmp_path / "out", *words)


def test_clip_without_media_is_named(run_stage, run_dir, tmp_path, unloaded, clips):
    words = clips([{"file_name": name, "caption": "a dog"} for name in ("video.mp4", "sound.wav")])
    with pytest.raises(ValueError, match="1 of 2 clips have no media for audiovisual, the first is sound; add it"):
        run_stage("supervised", run_dir / "aligned", tmp_path / "out", *words, "--modalities", "audiovisual")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modalities", "audoi"], "modalities: unknown audoi; choose from audio, image, audiovisual"),
        (["--train_parts", "vision_tower"], "train_parts: unknown vision_tower; choose from audio_projector, "),
        (
            ["--modalities", "image"],
            "train_parts: image does not use the audio_projector of .*; add one of the modaliti",
        ),
        (
            ["--modalities", "audio", "--train_parts", "multi_modal_projector"],
            "train_parts: audio does not use the multi",
        ),
        (["--modalities", "image", "--train_parts", "prefix"], "image does not use the prefix .* audio, audiovisual"),
        (
            ["--modalities", "image", "--train_parts", "language_model", "--lora", "audio_tower"],
            "lora: image does not use the audio_tower",
        ),
    ],
)
def test_bad_part_or_modality_is_an_error_with_its_remedy(run_stage, run_dir, tmp_path, unloaded, words, message):
    with pytest.raises(ValueError, match=message):
        run_stage("supervised", run_dir / "aligned", tmp_path / "out", *words)


def test_prefix_of_a_distilled_model_is_not_used_for_audio(run_stage, run_dir, tmp_path, unloaded):
    words = ["--modalities", "audio", "--train_parts", "prefix"]
    with pytest.raises(
        ValueError, match="audio does not use the prefix of .*; add one of the modalities audiovisual, or"
    ):
        run_stage("supervised", run_dir / "distilled", tmp_path / "out", *words)


def test_missing_base_is_an_error(run_stage, run_dir, tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(ValueError, match=re.escape(f"base_model {gone}: no such directory; run the stage")):
        run_stage("supervised", gone, tmp_path / "out")


def test_arguments_of_trls_text_preparation_are_unknown(run_dir, tmp_path):
    config = tmp_path / "sft.yaml"
    config.write_text("packing: true\n")
    words = ["--base_model", str(run_dir / "aligned"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="unknown key packing; --help lists"):
        sft.main([str(config), *words])
