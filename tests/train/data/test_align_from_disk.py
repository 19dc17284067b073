"""The alignment reads clips from files and shards, in order or as a stream, and replaces broken ones."""

import itertools
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.rows import open_audio, open_frames
from dali_llava.processing.shards import prepare_shards
from dali_llava.train import align
from dali_llava.train.arguments import AlignmentArguments
from dali_llava.train.command_line import run_stage as run_stage_script
from dali_llava.train.data.corpus import stream_rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Twelve clips of AVWorld in four shards. Read-only."""
    folder = tmp_path_factory.mktemp("shards")
    rows = load_corpus("avworld", "train", sizes={"train": 12})
    prepare_shards(rows, folder, clips_per_shard=3, num_proc=1)
    return folder


@pytest.fixture
def broken_folder(tmp_path) -> Path:
    """A folder with the media of six clips, two of which have truncated audio."""
    media = tmp_path / "media"
    media.mkdir()
    for row in load_corpus("avworld", "train", sizes={"train": 6}):
        (media / f"{row['id']}.flac").write_bytes(row["audio"]["bytes"])
        open_frames(row, [0])[0].save(media / f"{row['id']}.png")
    for number in (1, 4):
        path = media / f"train-{number:06d}.flac"
        path.write_bytes(path.read_bytes()[:200])
    return media


def of_shards(folder: Path) -> list[str]:
    return [
        "--dataset",
        "shards",
        "--cache_features",
        "false",
        "--dataset_options",
        json.dumps({"data_dir": str(folder)}),
    ]


def test_shards_train_what_their_features_train(shards, run_dir, run_stage, tmp_path):
    plain = [*of_shards(shards), "--augmentation_noise", "0", "--augmentation_roll", "0", "--frame", "0"]
    opened = run_stage("aligned", run_dir / "prefix", tmp_path / "opened", *plain, "--dataloader_num_workers", "2")
    stored = run_stage("aligned", run_dir / "prefix", tmp_path / "stored", *plain, "--cache_features", "true")
    expected = dict(stored.pretrained.audio_tower.named_parameters())
    for name, parameter in opened.pretrained.audio_tower.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-4)
    assert opened.state.global_step == 2 and "broken_clips" not in opened.state.log_history[-1]


def test_a_stream_trains(shards, run_dir, run_stage, tmp_path):
    trainer = run_stage(
        *("aligned", run_dir / "prefix", tmp_path, *of_shards(shards), "--streaming", "true"),
        *("--max_steps", "5", "--dataloader_num_workers", "2", "--shuffle_buffer", "4"),
    )
    assert trainer.state.global_step == 5  # 20 clips of 12
    assert all(torch.isfinite(parameter).all() for parameter in trainer.pretrained.audio_tower.parameters())


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_clips_give_way_and_are_counted(broken_folder, run_dir, run_stage, tmp_path, workers):
    options = json.dumps({"data_dir": str(broken_folder)})
    trainer = run_stage(
        *("aligned", run_dir / "prefix", tmp_path / "out", "--dataset", "folder", "--dataset_options", options),
        *("--cache_features", "false", "--max_steps", "4", "--dataloader_num_workers", str(workers)),
    )
    # four steps are two passes of four and two clips
    assert trainer.state.log_history[-1]["broken_clips"] >= 4 and trainer.state.global_step == 4


def test_stored_features_leave_broken_clips_out(broken_folder, run_dir, run_stage, tmp_path, caplog):
    options = json.dumps({"data_dir": str(broken_folder)})
    words = ("--dataset", "folder", "--dataset_options", options)
    with caplog.at_level(logging.WARNING):
        trainer = run_stage("aligned", run_dir / "prefix", tmp_path / "out", *words)
    assert trainer.train_dataset["id"][:] == [f"train-{number:06d}" for number in (0, 2, 3, 5)]
    told = [record.getMessage() for record in caplog.records if "the clip is skipped" in record.getMessage()]
    assert [message.partition(":")[0] for message in told] == ["clip 'train-000001'", "clip 'train-000004'"]
    for path in broken_folder.glob("*.flac"):
        path.write_bytes(b"")
    shutil.move(broken_folder, broken_folder.with_name("elsewhere"))
    options = json.dumps({"data_dir": str(broken_folder.with_name("elsewhere"))})
    with pytest.raises(ValueError, match="none of 6 clips can be opened"):
        run_stage("aligned", run_dir / "prefix", tmp_path / "out", "--dataset", "folder", "--dataset_options", options)


def streamed(shards: Path, tmp_path: Path, **arguments):
    options = {"dataset": "shards", "dataset_options": {"data_dir": str(shards)}, "max_steps": 1}
    return stream_rows(AlignmentArguments(output_dir=str(tmp_path), use_cpu=True, **options | arguments))


def test_a_stream_goes_on_without_end_in_another_order(shards, run_dir, run_stage, tmp_path):
    words = [*of_shards(shards), "--streaming", "true", "--shuffle_buffer", "3"]
    stream = run_stage("aligned", run_dir / "prefix", tmp_path, *words).train_dataset
    names = [row["id"] for row in itertools.islice(stream, 36)]
    # the buffer delays the clips of a pass by up to three places
    passes = [names[:12], names[12:24], names[24:]]
    assert len(set(names)) == 12 and all(abs(names.count(name) - 3) <= 1 for name in set(names))
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_read_their_own_shards(shards, tmp_path, workers):
    parts = []
    for rank in range(2):
        loader = DataLoader(streamed(shards, tmp_path), batch_size=2, num_workers=workers, collate_fn=list)
        arguments = AlignmentArguments(output_dir=str(tmp_path), use_cpu=True, streaming=True)
        mine = prepare_data_loader(
            loader,
            num_processes=2,
            process_index=rank,
            dispatch_batches=arguments.accelerator_config.dispatch_batches,
            put_on_device=False,
        )
        parts.append({row["id"] for batch in itertools.islice(mine, 9) for row in batch})
    assert len(parts[0]) == len(parts[1]) == 6 and not parts[0] & parts[1]


def test_a_stream_holds_what_was_kept(shards, tmp_path):
    (tmp_path / "kept.txt").write_text("train-000007\ntrain-000002\n")
    names = {row["id"] for row in itertools.islice(streamed(shards, tmp_path, kept=str(tmp_path)), 10)}
    assert names == {"train-000002", "train-000007"}
    (tmp_path / "kept.txt").write_text("of another corpus\n")
    with pytest.raises(ValueError, match="shards, split train: no rows to train on"):
        streamed(shards, tmp_path, kept=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": -1}, "a stream has no end; give the number of steps, --max_steps N"),
        (
            {"cache_features": True},
            "cache_features is not supported for streams; disable one of the two, --cache_features none",
        ),
        ({"halve_every": 5}, "halve_every is not supported for streams"),
    ],
)
def test_what_a_stream_cannot_serve(shards, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        streamed(shards, tmp_path, **arguments)


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_sounds_alone_cannot_be_aligned(broken_folder, run_dir, run_stage, tmp_path, streaming):
    for picture in broken_folder.glob("*.png"):
        picture.unlink()
    words = ("--dataset", "folder", "--dataset_options", json.dumps({"data_dir": str(broken_folder)}))
    with pytest.raises(ValueError, match="folder, split train: no pictures, which the alignment needs"):
        run_stage(
            *("aligned", run_dir / "prefix", tmp_path / "out", *words, "--cache_features", "false"),
            *("--streaming", streaming),
        )


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_script_ends_in_a_line(broken_folder, run_dir, stage_words, tmp_path, monkeypatch, capsys, workers):
    options = json.dumps({"data_dir": str(broken_folder)})
    words = stage_words(
        *("aligned", run_dir / "prefix", tmp_path / "out", "--dataset", "folder", "--dataset_options", options),
        *("--cache_features", "false", "--dataloader_num_workers", workers),
    )
    monkeypatch.setattr("sys.argv", ["align.py", *words])
    run_stage_script(align.main)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"{tmp_path}/out: align:mmd, 2 steps")
    assert re.search(r"; [23456] clips could not be opened and were replaced$", told)
    for path in broken_folder.glob("*.flac"):
        path.write_bytes(b"")
    with pytest.raises(
        SystemExit, match=r"^align.py: error: 100 consecutive clips cannot be opened; last error: clip 'tr"
    ) as end:
        run_stage_script(align.main)
    assert "\n" not in end.value.code and len(end.value.code) < 400


def test_a_schedule_needs_its_epochs(shards, run_dir, tmp_path):
    (tmp_path / "align.yaml").write_text("streaming: true\nobjective: ot_att\nmax_steps: 2\nuse_cpu: true\n")
    places = ["--base_model", str(run_dir / "prefix"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="a stream has no epochs; give those of the objective, --schedule_epochs N"):
        align.main([str(tmp_path / "align.yaml"), *places, *of_shards(shards)])


def test_rows_of_shards_are_the_corpus(shards):
    source = load_corpus("avworld", "train", sizes={"train": 12})
    rows = load_corpus("shards", "train", data_dir=str(shards))
    assert rows["id"] == source["id"] and rows["labels"] == source["labels"]
    torch.testing.assert_close(open_audio(rows[7]), open_audio(source[7]), rtol=0, atol=2**-16)
