"""Sample captions of a training: the file, the trackers, and that the training is the same without them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from dali_llava.eval.runner import CaptionRunner, Sample
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing.corpora.rows import open_audio
from dali_llava.train.data.clips import open_frame
from dali_llava.train.trainers.samples import CLIPS, MAX_NEW_TOKENS, SampleCaptions, as_table


BASES = {"prefix": "captioner", "distilled": "aligned"}


@pytest.fixture(scope="module")
def sampled(run_stage, run_dir, tmp_path_factory):
    """Trainers of both captioning stages, with samples at every step, logged to TensorBoard."""
    folder = tmp_path_factory.mktemp("sampled")
    words = ["--sample_steps", "1", "--report_to", "tensorboard", "--logging_steps", "1"]
    return {stage: run_stage(stage, run_dir / base, folder / stage, *words) for stage, base in BASES.items()}


def read_samples(trainer) -> list[dict]:
    return [json.loads(line) for line in Path(trainer.args.output_dir, "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", BASES)
def test_samples_are_captions_of_the_model_at_their_step(sampled, run_dir, stage):
    trainer, samples = sampled[stage], read_samples(sampled[stage])
    rows = [trainer.train_dataset[index] for index in range(CLIPS)]
    assert [(line["step"], line["id"]) for line in samples] == [(step, row["id"]) for step in range(3) for row in rows]
    assert [line["reference"] for line in samples] == [row["answer"] for row in rows] * 3
    for folder, step in ((run_dir / BASES[stage], 0), (trainer.args.output_dir, 2)):
        model = LlavaAudioForConditionalGeneration.from_pretrained(folder)
        runner = CaptionRunner(model, trainer.processing_class, max_new_tokens=MAX_NEW_TOKENS)
        media = [{"image": open_frame(row, 0)} if stage == "prefix" else {"audio": open_audio(row)} for row in rows]
        asked = [
            Sample(id=row["id"], prompt=row["question"], prefix=stage == "prefix", **own)
            for row, own in zip(rows, media, strict=True)
        ]
        expected = [result.caption for result in runner.run(asked)]
        assert [line["caption"] for line in samples if line["step"] == step] == expected


@pytest.mark.parametrize("stage", BASES)
def test_samples_do_not_change_the_weights(sampled, run_dir, stage):
    own, plain = Path(sampled[stage].args.output_dir), run_dir / stage
    assert (own / "stage.safetensors").read_bytes() == (plain / "stage.safetensors").read_bytes()
    assert not (plain / "samples.jsonl").exists()


def test_tensorboard_file_has_the_entries_and_the_samples(sampled):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = sampled["prefix"]
    (folder,) = Path(trainer.args.output_dir, "runs").iterdir()
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "grad_norm", "learning_rate", "clips_per_second", "memory_gb"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name])) for entry in logged]
    texts = events.Tensors("train/samples/text_summary")
    assert [event.step for event in texts] == [0, 1, 2]
    lines = [line for line in read_samples(trainer) if line["step"] == 2]
    assert texts[-1].tensor_proto.string_val[0].decode() == as_table(lines)


def test_samples_are_not_in_the_state_of_a_checkpoint(sampled):
    assert not any("samples" in entry for entry in sampled["prefix"].state.log_history)


@pytest.mark.parametrize(("step", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2])])
def test_resumed_run_keeps_the_samples_until_its_step(tmp_path, step, kept):
    lines = [json.dumps({"step": each, "id": "a", "caption": "b", "reference": "c"}) for each in range(3)]
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines, '{"step": 3, "id']))  # the run was killed
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path), train_dataset=[], eval_dataset=None)
    callback = SampleCaptions(trainer, steps=1)
    callback.measure = lambda state, control: None
    callback.on_train_begin(None, TrainerState(global_step=step), None)
    found = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert found == [line for each, line in enumerate(lines) if each in kept]


def test_table_is_one_line_per_clip():
    line = {"id": "a|b", "caption": "two\nlines", "reference": "x"}
    assert as_table([line]) == "| id | caption | reference |\n| --- | --- | --- |\n| a\\|b | two lines | x |"
