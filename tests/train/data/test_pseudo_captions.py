"""Pseudo-captions: provenance, reuse, stale captions, resuming, several ranks."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dali_llava
from dali_llava.eval.runner import CaptionRunner
from dali_llava.modeling import LlavaAudioForConditionalGeneration, LlavaAudioOnlyForConditionalGeneration
from dali_llava.modeling.checkpoint_digest import checkpoint_digest
from dali_llava.modeling.loading import find_checkpoint
from dali_llava.modeling.pretrained_llava_audio import LlavaAudioPreTrainedModel
from dali_llava.processing import SOUND_PROMPT
from dali_llava.processing.media import MediaError
from dali_llava.train.data import pseudo_captions
from dali_llava.train.data.caption_file import PseudoCaption, differences, read_captions, write_captions


DRIVER = Path(__file__).with_name("captions_driver.py")
NAMES = [f"balanced-{index:06d}" for index in range(8)]
ONE_STEP = ["--max_steps", "1"]
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Fails if a model is loaded."""

    def fail(*args, **kwargs):
        pytest.fail("a model is loaded")

    monkeypatch.setattr(LlavaAudioPreTrainedModel, "from_pretrained", fail)


@pytest.fixture(scope="module")
def saved(run_dir) -> Path:
    """The captions of the run's distillation."""
    return run_dir / "distilled" / "pseudo_captions.parquet"


@pytest.fixture
def output(saved, tmp_path) -> Path:
    """An output folder with the captions of the run's distillation."""
    (tmp_path / "out").mkdir()
    shutil.copy(saved, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def generated(monkeypatch) -> list[str]:
    """The ids of the clips that are captioned."""
    names, whole = [], CaptionRunner._inputs

    def listed(self, decoded):
        names.extend(sample.id for sample, _, _ in decoded)
        return whole(self, decoded)

    monkeypatch.setattr(CaptionRunner, "_inputs", listed)
    return names


@pytest.fixture
def interrupted(run_stage, run_dir):
    """`interrupted(folder)`: runs a distillation that fails after four of eight captions."""

    def interrupted(folder: Path) -> None:
        whole, started = CaptionRunner._inputs, []

        def failing(self, decoded):
            started.append(decoded)
            if len(started) == 3:
                raise RuntimeError("out of memory")
            return whole(self, decoded)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="^out of memory$"):
            patch.setattr(CaptionRunner, "_inputs", failing)
            run_stage("distilled", run_dir / "aligned", folder, "--caption_batch_size", "2")

    return interrupted


def launch(cache: Path, *words: str | Path) -> list[dict]:
    """Runs a driver in two processes and returns the JSON lines that they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]


def table_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "pseudo_captions.parquet").to_pylist()


def test_each_clip_has_a_caption_and_the_file_its_provenance(saved, run_dir):
    captions, provenance = read_captions(saved)
    assert list(captions) == NAMES
    assert all(isinstance(caption, str) and error is None for caption, error in captions.values())
    assert pq.read_schema(saved).names == ["id", "caption", "error"]
    assert provenance == {
        "checkpoint": checkpoint_digest(find_checkpoint(run_dir / "aligned")),
        "dataset": "avworld",
        "dataset_options": {"sizes": {"captioner": 16, "shots": 16, "train": 16, "balanced": 8}},
        "prompt": SOUND_PROMPT,
        "modality": "audiovisual",
        "prefix": True,
        "caption_temperature": 0.2,
        "caption_max_new_tokens": 6,
        "seed": 0,
        "base_model": str(run_dir / "aligned"),
        "version": dali_llava.__version__,
    }
    assert not (run_dir / "distilled" / ".pseudo_captions").exists()


def test_captions_are_used_again_without_the_vision_tower(run_stage, run_dir, saved, output):
    trainer = run_stage("distilled", run_dir / "aligned", output)
    assert type(trainer.model) is LlavaAudioOnlyForConditionalGeneration
    assert not any("vision_tower" in name for name, _ in trainer.model.named_modules())
    assert (output / "pseudo_captions.parquet").read_bytes() == saved.read_bytes()
    captions, _ = read_captions(saved)
    assert {row["id"]: row["answer"] for row in trainer.train_dataset} == {
        name: caption for name, (caption, _) in captions.items() if caption
    }
    # The first run loaded the vision tower.
    for name in ("stage.safetensors", "config.json"):
        assert (output / name).read_bytes() == (run_dir / "distilled" / name).read_bytes()


def test_the_vision_tower_is_freed_before_training(run_stage, run_dir, tmp_path):
    trainer = run_stage("distilled", run_dir / "aligned", tmp_path / "out", *ONE_STEP)
    assert type(trainer.model) is LlavaAudioForConditionalGeneration
    assert not any("vision_tower" in name for name, _ in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--caption_temperature", "0.5"], "caption_temperature 0.2, not 0.5;"),
        (["--caption_temperature", "0"], "caption_temperature 0.2, not 0.0; seed 0, not null;"),
        (["--caption_max_new_tokens", "7"], "caption_max_new_tokens 6, not 7;"),
        (["--prompt", "What ?", "--seed", "1"], f'prompt "{SOUND_PROMPT}", not "What ?"; seed 0, not 1;'),
        (["--dataset_options", '{"sizes": {"balanced": 8}}'], 'dataset_options {"sizes": {"captioner": 16, '),
    ],
)
def test_captions_of_other_settings_are_an_error_before_a_model_is_loaded(
    run_stage, run_dir, output, unloaded, words, message
):
    remedy = f"use another output_dir, delete the file.*--captions {re.escape(str(output))}"
    with pytest.raises(ValueError, match=f"parquet: captions of other settings: {re.escape(message)}.*{remedy}"):
        run_stage("distilled", run_dir / "aligned", output, *words)


def test_captions_of_another_checkpoint_are_an_error_before_a_model_is_loaded(run_stage, run_dir, output, unloaded):
    checkpoint_of = {name: checkpoint_digest(find_checkpoint(run_dir / name))[:8] for name in ("aligned", "distilled")}
    have, expected = (f"{digest} ({run_dir / name})" for name, digest in checkpoint_of.items())
    with pytest.raises(ValueError, match=re.escape(f"other settings: checkpoint {have}, not {expected}; use another")):
        run_stage("distilled", run_dir / "distilled", output)


def test_information_is_not_compared():
    provenance = {"checkpoint": "a", "prompt": "b", "base_model": "c", "version": "1"}
    assert differences(provenance, provenance | {"base_model": "d", "version": "2"}) == []
    assert differences({}, {"prompt": "b"}) == ['prompt null, not "b"']
    assert differences(None, provenance) == ["no provenance in the file"]


def test_given_captions_are_trained_on_with_a_warning(run_stage, run_dir, tmp_path, caplog):
    file = tmp_path / "made.parquet"
    write_captions(file, {NAMES[3]: PseudoCaption("a dog"), "other": PseudoCaption("a cat")}, {"prompt": "What ?"})
    words = ["--captions", str(file), *ONE_STEP]
    with caplog.at_level(logging.WARNING, logger="dali_llava"):
        trainer = run_stage("distilled", run_dir / "aligned", tmp_path / "out", *words)
    assert [(row["id"], row["answer"]) for row in trainer.train_dataset] == [(NAMES[3], "a dog")]
    assert type(trainer.model) is LlavaAudioOnlyForConditionalGeneration
    assert not (tmp_path / "out" / "pseudo_captions.parquet").exists()
    first, second = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert "captions of other settings: checkpoint None (None), not" in first
    assert f'prompt "What ?", not "{SOUND_PROMPT}"' in first
    assert second == f"{file}: no captions for 7 of 8 clips"


def test_captions_of_a_run_can_be_given_without_a_warning(run_stage, run_dir, saved, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dali_llava"):
        run_stage("distilled", run_dir / "aligned", tmp_path / "out", "--captions", str(saved))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dali_llava")] == []
    weights = [folder / "stage.safetensors" for folder in (tmp_path / "out", run_dir / "distilled")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "captions .*no such file"),
        ({"id": ["a"]}, "no column caption; give a Parquet file with id and caption"),
        ({"id": ["a"], "caption": [["one", "two"]]}, "not a Parquet file of captions"),
        (b"id,caption\n", "not a Parquet file of captions"),
    ],
)
def test_other_files_are_an_error_before_a_model_is_loaded(run_stage, run_dir, tmp_path, unloaded, columns, message):
    file = tmp_path / "captions.parquet"
    if isinstance(columns, dict):
        pq.write_table(pa.table(columns), file)
    elif columns is not None:
        file.write_bytes(columns)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_stage("distilled", run_dir / "aligned", tmp_path / "out", "--captions", str(file))


def test_given_captions_of_other_clips_are_an_error_before_a_model_is_loaded(run_stage, run_dir, tmp_path, unloaded):
    write_captions(tmp_path / "other.parquet", {"other": PseudoCaption("a cat")}, {})
    with pytest.raises(ValueError, match=r"other\.parquet: no captions for avworld, split balanced"):
        run_stage("distilled", run_dir / "aligned", tmp_path / "out", "--captions", str(tmp_path / "other.parquet"))


def test_an_interrupted_run_keeps_the_captions_of_all_ranks(
    run_stage, run_dir, saved, tmp_path, generated, interrupted
):
    """Another batch size does not change the captions."""
    interrupted(tmp_path / "out")
    assert generated == NAMES[:4] and not (tmp_path / "out" / "pseudo_captions.parquet").exists()
    (part,) = (tmp_path / "out" / ".pseudo_captions").glob("*/rank-0.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:1]))
    part.with_name("rank-5.jsonl").write_text("".join(lines[1:]) + '{"id": "balanced-00')
    run_stage("distilled", run_dir / "aligned", tmp_path / "out", "--caption_batch_size", "3", *ONE_STEP)
    assert generated == NAMES
    assert table_of(tmp_path / "out") == table_of(saved.parent)
    assert not (tmp_path / "out" / ".pseudo_captions").exists()


def test_only_new_clips_are_captioned(run_stage, run_dir, saved, tmp_path, generated):
    words = ["distilled", run_dir / "aligned", tmp_path / "out", *ONE_STEP]
    run_stage(*words, "--max_samples", "3")
    assert generated == NAMES[:3] == [row["id"] for row in table_of(tmp_path / "out")]
    run_stage(*words)
    assert generated == NAMES
    assert table_of(tmp_path / "out") == table_of(saved.parent)


def test_a_clip_that_cannot_be_opened_is_listed_and_not_tried_again(run_stage, run_dir, tmp_path, monkeypatch, caplog):
    whole = pseudo_captions.open_audio

    def open_audio(row):
        if row["id"] == NAMES[1]:
            raise MediaError(f"{row['id']}: no audio")
        return whole(row)

    monkeypatch.setattr(pseudo_captions, "open_audio", open_audio)
    words = ["distilled", run_dir / "aligned", tmp_path / "out", *ONE_STEP]
    with caplog.at_level(logging.WARNING, logger="dali_llava"):
        first = run_stage(*words)
    expected = f"1 of 8 clips could not be captioned; first error: {NAMES[1]}: no audio"
    assert expected in [record.getMessage() for record in caplog.records]
    assert table_of(tmp_path / "out")[1] == {"id": NAMES[1], "caption": None, "error": f"{NAMES[1]}: no audio"}
    second = run_stage(*words)
    assert type(second.model) is LlavaAudioOnlyForConditionalGeneration
    assert NAMES[1] not in first.train_dataset["id"]
    assert list(first.train_dataset["id"]) == list(second.train_dataset["id"])


@pytest.mark.slow
@needs_gloo
def test_two_ranks_resume_the_captions_of_others_and_report_an_error_of_one(
    run_stage, run_dir, stage_words, saved, datasets_cache, tmp_path, interrupted
):
    failing, resumed = tmp_path / "failing", tmp_path / "resumed"
    interrupted(resumed)
    (part,) = (resumed / ".pseudo_captions").glob("*/rank-0.jsonl")
    lines = [json.loads(line) | {"caption": f"kept {number}"} for number, line in enumerate(part.open())]
    for name, kept in (("rank-0.jsonl", lines[:3]), ("rank-2.jsonl", lines[3:])):
        (part.parent / name).write_text("".join(json.dumps(line) + "\n" for line in kept))

    own = [*ONE_STEP, "--caption_batch_size", "1", "--per_device_train_batch_size", "2"]
    runs = {
        "failing": [1, stage_words("distilled", run_dir / "aligned", failing, *own)],
        "resumed": [None, stage_words("distilled", run_dir / "aligned", resumed, *own)],
    }
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    printed = launch(datasets_cache, DRIVER, tmp_path / "runs.json")
    assert {(line["name"], line["rank"]): line["error"] for line in printed} == {
        ("failing", 0): "RuntimeError: captioning failed on rank 1: RuntimeError: out of memory",
        ("failing", 1): "RuntimeError: out of memory",
        ("resumed", 0): None,
        ("resumed", 1): None,
    }
    expected = table_of(saved.parent)
    kept = [{"id": name, "caption": f"kept {number}", "error": None} for number, name in enumerate(NAMES[:4])]
    assert table_of(resumed) == kept + expected[4:]
    assert not (failing / "pseudo_captions.parquet").exists()
    run_stage("distilled", run_dir / "aligned", failing, *ONE_STEP)  # in one process
    assert table_of(failing) == expected


@pytest.mark.slow
def test_ranks_with_different_batch_counts_caption_under_zero_3(run_dir, stage_words, launch_stages, saved, tmp_path):
    """Rank 0 has three batches and rank 1 has two; the weights are sharded only afterwards."""
    own = [*ONE_STEP, "--max_samples", "5", "--caption_batch_size", "1", "--per_device_train_batch_size", "1"]
    words = stage_words("distilled", run_dir / "aligned", tmp_path / "out", *own)
    ran = launch_stages("zero3", {"captions": ("distilled", words)}, tmp_path)["captions"]
    assert (ran["engine"], ran["processes"]) == ("DeepSpeedEngine", 2)
    assert (ran["sharded"], ran["trained"]) == (ran["parameters"], 4)
    assert table_of(tmp_path / "out") == table_of(saved.parent)[:5]
