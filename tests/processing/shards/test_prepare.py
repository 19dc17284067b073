"""Whole runs: the content of the shards, their order, and the other files of the folder."""

import csv
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from dali_llava.processing.shards import ClipSettings, ShardSummary, prepare_shards
from dali_llava.processing.shards.clip import clip_key
from dali_llava.processing.shards.lock import output_lock
from dali_llava.processing.shards.pool import Died, WorkerPool
from dali_llava.processing.shards.writer import write_whole


def test_a_folder_holds_every_clip_once_and_in_order(corpus, unbroken):
    names = [f"shard-{number:06d}" for number in range(7)]
    expected = {f"{name}.{extension}" for name in names for extension in ("tar", "json")}
    assert {path.name for path in unbroken.iterdir()} == expected | {
        *("settings.json", "index.json", "report.csv", ".lock-0-of-1")
    }
    members = []
    for name in names:
        with tarfile.open(unbroken / f"{name}.tar") as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.isfile() and member.mode == 0o644
                members.append(member.name)
    extensions = ("flac", "0.jpg", "1.jpg", "json")
    assert members == [f"{name}.{extension}" for name in corpus["id"] for extension in extensions]


def test_the_index_tells_what_is_there(unbroken):
    index = json.loads((unbroken / "index.json").read_text())
    assert (index["rows"], index["clips"], index["dropped"]) == (20, 20, {})
    assert index["seconds"] == pytest.approx(20 * 1.2)
    assert [shard["clips"] for shard in index["shards"]] == [3] * 6 + [2]
    assert index["bytes"] == sum(shard["bytes"] for shard in index["shards"])
    for shard in index["shards"]:
        content = (unbroken / shard["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    settings = json.loads((unbroken / "settings.json").read_text())
    assert index["settings"] == settings
    assert (settings["clips_per_shard"], settings["frame_size"], settings["sampling_rate"]) == (3, 336, 16_000)
    assert (unbroken / "report.csv").read_text() == "id,reason,detail\n"


def test_datasets_own_builder_reads_a_shard(unbroken, corpus, tmp_path):
    # Inferred columns would turn FLAC into an `Audio` feature, which needs torchcodec.
    texts = datasets.List(datasets.Value("string"))
    about = {"id": datasets.Value("string"), "captions": texts, "labels": texts, "source": datasets.Value("string")}
    about |= {"start": datasets.Value("float64"), "end": datasets.Value("float64")}
    features = {"__key__": datasets.Value("string"), "__url__": datasets.Value("string"), "json": about}
    features |= {"flac": datasets.Value("binary"), "0.jpg": datasets.Image(), "1.jpg": datasets.Image()}
    shards = datasets.load_dataset(
        "webdataset",
        data_files=str(unbroken / "*.tar"),
        split="train",
        streaming=True,
        features=datasets.Features(features),
        cache_dir=str(tmp_path),
    )
    rows = list(shards)
    assert [row["__key__"] for row in rows] == corpus["id"]
    for row, source in zip(rows, corpus, strict=True):
        assert row["json"]["captions"] == source["captions"] and row["0.jpg"].size == (64, 48)
        samples, _ = soundfile.read(io.BytesIO(row["flac"]))
        np.testing.assert_array_equal(samples, soundfile.read(source["audio"]["path"])[0])


@pytest.mark.parametrize("num_proc", [2, 3])
def test_the_number_of_processes_changes_nothing(made, corpus, unbroken, tmp_path, num_proc):
    summary = prepare_shards(corpus, tmp_path, clips_per_shard=3, num_proc=num_proc)
    assert summary.is_complete and (summary.rows, summary.clips) == (20, 20)
    assert made["contents"](tmp_path) == made["contents"](unbroken)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_an_array_of_jobs_gives_the_same_folder(made, corpus, unbroken, tmp_path, order):
    summaries = []
    for place, job_id in enumerate(order):
        assert not (tmp_path / "index.json").exists()
        summaries.append(prepare_shards(corpus, tmp_path, clips_per_shard=3, num_proc=1, num_jobs=3, job_id=job_id))
        assert summaries[-1].is_complete == (place == 2)
    assert summaries[0].shards == len(range(order[0], 7, 3)) and summaries[0].num_shards == 7
    assert made["contents"](tmp_path) == made["contents"](unbroken)


def test_any_number_of_jobs_may_finish_what_others_began(made, corpus, unbroken, tmp_path):
    prepare_shards(corpus, tmp_path, clips_per_shard=3, num_proc=1, num_jobs=4, job_id=2)
    assert prepare_shards(corpus, tmp_path, num_proc=1).is_complete  # clips_per_shard comes from the settings
    assert made["contents"](tmp_path) == made["contents"](unbroken)


def test_a_finished_run_is_not_run_again(made, corpus, tmp_path, monkeypatch):
    first = prepare_shards(corpus, tmp_path, clips_per_shard=8, num_proc=1)
    before = made["contents"](tmp_path)
    monkeypatch.delitem(prepare_shards.__globals__, "WorkerPool")
    assert prepare_shards(corpus, tmp_path, num_proc=1) == first
    assert made["contents"](tmp_path) == before


def test_a_shard_that_was_lost_or_cut_is_made_again(made, corpus, unbroken, tmp_path):
    prepare_shards(corpus, tmp_path, clips_per_shard=3, num_proc=1)
    (tmp_path / "shard-000001.tar").unlink()
    os.truncate(tmp_path / "shard-000004.tar", 1000)
    (tmp_path / "shard-000006.json").unlink()
    prepare_shards(corpus, tmp_path, num_proc=1)
    assert made["contents"](tmp_path) == made["contents"](unbroken)


def test_the_size_of_a_shard_is_met_from_a_sample(made, tmp_path):
    rows = []
    for number in range(80):  # 1.28 MB each: noise hardly compresses
        samples = np.random.default_rng(number).uniform(-1, 1, 640_000)
        soundfile.write(tmp_path / f"{number % 8}.wav", samples, 16_000) if number < 8 else None
        rows.append(made["make_row"](f"c{number}", tmp_path / f"{number % 8}.wav"))
    settings = ClipSettings(require=("audio",))
    prepare_shards(made["as_corpus"](rows), tmp_path / "out", settings, shard_size=25, num_proc=2)
    sizes = [shard["bytes"] / 1e6 for shard in json.loads((tmp_path / "out" / "index.json").read_text())["shards"]]
    assert len(sizes) >= 4 and all(size == pytest.approx(25, rel=0.05) for size in sizes[:-1])


def test_reasons_are_counted_and_listed(made, corpus, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(32_000), 16_000)
    (tmp_path / "text.wav").write_text("no sound")
    make_row, picture = made["make_row"], (Path(corpus[0]["frames"][0]["path"]),)
    bad = [
        make_row("gone", tmp_path / "gone.wav", picture),
        make_row("silent, too", tmp_path / "silent.wav", picture),
        make_row("text", tmp_path / "text.wav", picture),
        make_row("clip-004", Path(corpus[4]["audio"]["path"]), picture),
        make_row("a.b", tmp_path / "gone.wav", picture),
    ]
    rows = made["as_corpus"]([*corpus.select(range(5)), *bad, *corpus.select(range(5, 7))])
    summary = prepare_shards(rows, tmp_path / "out", clips_per_shard=5, num_proc=2)
    expected = {"missing": 2, "broken": 1, "silent": 1, "duplicate": 1}
    assert summary == ShardSummary(12, 7, summary.bytes, pytest.approx(7 * 1.2), expected, 3, 3)
    assert str(summary).splitlines()[0].endswith("5 left out; 3 of 3 shards done")
    assert "  silent            1  the sound's peak is below --silence" in str(summary).splitlines()
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        report = list(csv.DictReader(file))
    reasons = {"gone": "missing", "silent, too": "silent", "text": "broken", "clip-004": "duplicate", "a.b": "missing"}
    assert {row["id"]: row["reason"] for row in report} == reasons and all(row["detail"] for row in report)
    # all clips of the second shard are left out: it has a record and no archive
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["name"] for shard in index["shards"]] == ["shard-000000.tar", "shard-000002.tar"]
    assert not (tmp_path / "out" / "shard-000001.tar").exists()
    again = prepare_shards(rows, tmp_path / "out", num_proc=1)
    assert again == summary


def test_media_may_move_between_two_runs(made, corpus, tmp_path):
    prepare_shards(corpus, tmp_path, clips_per_shard=5, num_proc=1, num_jobs=2, job_id=0)
    moved = corpus.map(lambda row: {"audio": {"path": None, "bytes": Path(row["audio"]["path"]).read_bytes()}})
    assert prepare_shards(moved, tmp_path, num_proc=1).clips == 20


def test_a_file_that_turns_up_and_a_caption_that_changes_renew_their_shards_alone(made, corpus, tmp_path):
    rows = [*corpus]
    rows[4] |= {"audio": None, "frames": [], "start": 30.0}  # the row of a clip without media
    summary = prepare_shards(made["as_corpus"](rows), tmp_path / "out", clips_per_shard=3, num_proc=1)
    assert summary.dropped == {"missing": 1}
    before = made["contents"](tmp_path / "out")
    rows[4], rows[7]["captions"] = corpus[4], ["another"]
    prepare_shards(made["as_corpus"](rows), tmp_path / "out", num_proc=1, num_jobs=2, job_id=0)
    assert not (tmp_path / "out" / "index.json").exists()
    assert prepare_shards(made["as_corpus"](rows), tmp_path / "out", num_proc=1).clips == 20
    after = made["contents"](tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == {
        *("shard-000001.tar", "shard-000001.json", "shard-000002.tar", "shard-000002.json"),
        *("index.json", "report.csv"),
    }
    prepare_shards(made["as_corpus"](rows), tmp_path / "whole", clips_per_shard=3, num_proc=1)
    assert made["contents"](tmp_path / "whole") == after


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": ClipSettings(frame_size=224)}, "--frame-size was 336, is 224;"),
        ({"settings": ClipSettings(require=("audio",))}, "--require was audio,frames, is audio;"),
        (
            {"settings": ClipSettings(keep_silent=True, silence=0.01)},
            "--silence was 0.001, is 0.01; --keep-silent was",
        ),
        ({"clips_per_shard": 4}, "--clips-per-shard was 8, is 4;"),
        ({"shard_size": 100}, "--shard-size was 500, is 100;"),
        ({"corpus": "other"}, "corpus was None, is other;"),
        ({"keep": range(19)}, "rows was 20, is 19;"),
        ({"keep": range(19, -1, -1)}, "the clips or their order differ;"),
    ],
)
def test_other_settings_are_named(made, corpus, tmp_path, changes, message):
    prepare_shards(corpus, tmp_path, clips_per_shard=8, num_proc=1, num_jobs=3, job_id=0)
    before = made["contents"](tmp_path)
    rows = corpus.select(changes.pop("keep", range(20)))
    with pytest.raises(ValueError, match="was started with other settings: ") as error:
        prepare_shards(rows, tmp_path, num_proc=1, **changes)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert made["contents"](tmp_path) == before


def test_shards_of_other_settings_are_not_mixed_in(corpus, tmp_path):
    prepare_shards(corpus, tmp_path, clips_per_shard=8, num_proc=1)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"shard-000000.json: its shard was written with other settings"):
        prepare_shards(corpus, tmp_path, ClipSettings(quality=50), clips_per_shard=8, num_proc=1)


@pytest.mark.parametrize("name", ["settings.json", "shard-000000.json"])
def test_files_that_are_not_ours(corpus, tmp_path, name):
    prepare_shards(corpus, tmp_path, clips_per_shard=8, num_proc=1)
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name}: is not a (settings file|record)"):
        prepare_shards(corpus, tmp_path, num_proc=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_jobs": 2, "job_id": 2}, "job_id must be one of 0 to num_jobs - 1 = 1, not 2"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"clips_per_shard": -3}, "clips_per_shard must be at least 1"),
    ],
)
def test_numbers_outside_their_range(corpus, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_shards(corpus, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus_and_a_file_in_place_of_the_folder(corpus, tmp_path):
    with pytest.raises(ValueError, match="the corpus clotho/test has no clips"):
        prepare_shards(corpus.select([]), tmp_path / "out", corpus="clotho/test")
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="out: is a file; give --out a folder"):
        prepare_shards(corpus, tmp_path / "out")


def hold(folder, job_id, num_jobs, pipe):
    with output_lock(folder, job_id, num_jobs):
        pipe.send("held")
        pipe.recv()


def test_two_runs_on_one_folder(corpus, tmp_path):
    def start(job_id, num_jobs):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, job_id, num_jobs, theirs))
        process.start()
        assert ours.recv() == "held"
        return process, ours

    def refused(job_id, num_jobs, process):
        message = f"another run (process {process.pid}) is writing to it; wait until it ends, or give another --out"
        with pytest.raises(ValueError) as error:
            prepare_shards(corpus, tmp_path, num_proc=1, job_id=job_id, num_jobs=num_jobs)
        assert message in str(error.value)
        assert not (tmp_path / "settings.json").exists()

    single, _ = start(0, 1)
    refused(0, 1, single)
    refused(1, 2, single)
    single.kill()  # the lock ends with its process
    single.join()
    job, pipe = start(1, 2)
    refused(1, 2, job)
    refused(0, 1, job)
    refused(1, 3, job)
    with output_lock(tmp_path, 0, 2):  # another job of the same array is allowed
        pass
    pipe.send("end")
    job.join()
    with output_lock(tmp_path, 0, 1):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a 1 MB file system, and a function that remounts it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here ({done.stderr.strip()})")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(made, small_disk, tmp_path):
    folder, remount = small_disk
    rows = []
    for number in range(8):
        soundfile.write(tmp_path / f"{number}.wav", np.random.default_rng(number).uniform(-1, 1, 96_000), 16_000)
        rows.append(made["make_row"](f"c{number}", tmp_path / f"{number}.wav"))
    rows, settings = made["as_corpus"](rows), ClipSettings(require=("audio",))
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); free some space") as error:
        prepare_shards(rows, folder / "out", settings, clips_per_shard=2, num_proc=2)
    assert "shard-000002.tar" in str(error.value) and "\n" not in str(error.value)
    names = {"settings.json", "shard-000000.tar", "shard-000000.json", "shard-000001.tar", "shard-000001.json"}
    assert set(made["contents"](folder / "out")) == names
    remount("size=8m")
    assert prepare_shards(rows, folder / "out", settings, num_proc=2).is_complete
    prepare_shards(rows, tmp_path / "out", settings, clips_per_shard=2, num_proc=2)
    assert made["contents"](folder / "out") == made["contents"](tmp_path / "out")


def test_a_folder_that_cannot_be_written_to(small_disk, corpus):
    folder, remount = small_disk
    remount("ro")
    for out in (folder, folder / "out"):
        with pytest.raises(OSError, match=r"cannot be written \(Read-only file system\); give --out a folder on"):
            prepare_shards(corpus, out, num_proc=1)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with write_whole(path) as file:
        file.write(b"whole")
        assert not path.exists()
    with pytest.raises(KeyError), write_whole(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


TREAT = """
import os, signal
from pathlib import Path

def treat(task):
    kind, _, flag = task.partition(" ")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "once" and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return kind
"""


@pytest.fixture
def treat(tmp_path, monkeypatch):
    """A function that workers can import: "die" ends the process, "once FLAG" ends it at the first call."""
    (tmp_path / "treatment.py").write_text(TREAT)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("treatment").treat
    del sys.modules["treatment"]


@pytest.mark.parametrize("num_proc", [1, 3])
def test_a_worker_that_dies_takes_nothing_with_it(treat, tmp_path, num_proc):
    tasks = ["a", "die", "b", f"once {tmp_path / 'flag'}", "c", "die", "die", "d", *"efghijklmnop"]
    with WorkerPool(treat, num_proc) as pool:
        died = Died(-signal.SIGSEGV)
        assert list(pool.map(tasks)) == ["a", died, "b", "once", "c", died, died, "d", *"efghijklmnop"]
        assert list(pool.map([])) == []
        assert list(pool.map(["again"])) == ["again"]


def test_results_that_no_one_fetches_do_not_pile_up(treat):
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield str(number)

    with WorkerPool(treat, 2) as pool:
        results = pool.map(tasks())
        assert [next(results) for _ in range(3)] == ["0", "1", "2"]
        assert len(taken) < 20


def test_a_clip_whose_process_dies_is_reported(corpus, tmp_path, monkeypatch):
    class Deadly(WorkerPool):
        def map(self, tasks):
            for number, result in enumerate(super().map(tasks)):
                yield Died(-11) if number == 3 else result

    monkeypatch.setitem(prepare_shards.__globals__, "WorkerPool", Deadly)
    summary = prepare_shards(corpus, tmp_path, clips_per_shard=8, num_proc=1)
    assert (summary.clips, summary.dropped) == (19, {"crashed": 1})
    assert "clip-003,crashed,its process ended with SIGSEGV" in (tmp_path / "report.csv").read_text()
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert clip_key("clip-003") + ".flac" not in tar.getnames()


def test_a_script_without_a_main_guard(tmp_path):
    """Workers do not run the script of the caller, which would start more workers."""
    (tmp_path / "clips").mkdir()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 24_000)
    soundfile.write(tmp_path / "clips" / "a.wav", noise, 16_000)
    script = tmp_path / "script.py"
    script.write_text(
        "from dali_llava.processing.corpora import load_corpus\n"
        "from dali_llava.processing.shards import ClipSettings, prepare_shards\n"
        f"rows = load_corpus('folder', 'train', data_dir={str(tmp_path / 'clips')!r}, cache_dir={str(tmp_path)!r})\n"
        f"print(prepare_shards(rows, {str(tmp_path / 'out')!r}, ClipSettings(require=('audio',)), num_proc=2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 clips: 1 ready") == 1
