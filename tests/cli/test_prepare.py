"""`dali-llava prepare`: its output, its exit codes, and a folder with every kind of bad file."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.cli import build_parser, main
from dali_llava.cli.prepare import CLIP_SETTINGS
from dali_llava.processing.corpora import configuration_of, known_corpora, load_corpus
from dali_llava.processing.corpora.options import options_of
from dali_llava.processing.shards import ClipSettings
from dali_llava.processing.shards.clip import clip_key


RATE = 16_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def prepare(capsys):
    """Run the command with two processes; return (exit code, stdout, last line of stderr)."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        code = main(["prepare", *map(str, words), "--num-proc", "2"])
        captured = capsys.readouterr()
        return code, captured.out, (captured.err.splitlines() or [""])[-1]

    return run


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def write_clip(path: Path, seconds: float = 2.0, samples: np.ndarray | None = None, still: bool = False, track=True):
    """Write a 32 x 24 video at 5 frames per second, with a new colour each second, and noise or `samples`."""
    import av

    with av.open(str(path), "w", format="mp4") as output:
        video = output.add_stream("mpeg4", rate=5)
        video.width, video.height, video.pix_fmt = 32, 24, "yuv420p"
        audio = output.add_stream("aac", rate=RATE, layout="mono") if track else None
        for index in range(round(5 * seconds)):
            colour = np.full((24, 32, 3), 90 if still else 40 + 60 * (index // 5), np.uint8)
            output.mux(video.encode(av.VideoFrame.from_ndarray(colour, format="rgb24")))
        output.mux(video.encode())
        if track:
            frame = av.AudioFrame.from_ndarray((sound(seconds) if samples is None else samples)[None], "fltp", "mono")
            frame.sample_rate = RATE
            output.mux(audio.encode(frame))
            output.mux(audio.encode())


@pytest.fixture(scope="module")
def good_clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_clip(path)
    return path


# name -> reason
BAD = {
    "empty": "broken",
    "truncated": "broken",
    "text": "broken",
    "mute": "no_sound",
    "sound_only": "no_picture",
    "silent": "silent",
    "frozen": "frozen",
    "short": "too_short",
    "missing": "missing",
}


def write_bad(folder: Path, name: str, good: Path) -> None:
    path = folder / f"{name}.mp4"
    if name == "empty":
        path.touch()
    elif name == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif name == "text":
        path.write_text("This is no video.\n" * 100)
    elif name == "mute":
        write_clip(path, track=False)
    elif name == "sound_only":
        soundfile.write(folder / "sound_only.wav", sound(2.0), RATE)
    elif name == "silent":
        write_clip(path, samples=np.zeros(2 * RATE, np.float32))
    elif name == "frozen":
        write_clip(path, still=True)
    elif name == "short":
        write_clip(path, seconds=0.6)


def test_a_folder_in_which_five_per_cent_are_bad(prepare, good_clip, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    (media / "sub.folder").mkdir(parents=True)
    good = [f"sub.folder/clip {number:03d}" for number in range(170)]
    for name in good:
        os.link(good_clip, media / f"{name}.mp4")
    (media / "sub.folder" / "clip 007.mp4").rename(
        media / "sub.folder" / "clip 007.webm"
    )  # a wrong suffix does not matter
    for name in BAD:
        write_bad(media, name, good_clip)
    with open(media / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("id", "caption"))
        table.writerows((name, f"what {name} sounds like") for name in sorted([*good, *BAD]))
    code, printed, _ = prepare("folder", "--data-dir", media, "--out", out, "--clips-per-shard", 50)
    assert code == 0
    lines = printed.splitlines()
    assert lines[0].startswith("179 clips: 170 ready (0.10 h of sound, ")
    assert lines[0].endswith(" MB), 9 left out; 4 of 4 shards done")
    counts = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    assert counts == {"broken": 3, **dict.fromkeys(set(BAD.values()) - {"broken"}, 1)}
    with open(out / "report.csv", newline="") as file:
        assert {row["id"]: row["reason"] for row in csv.DictReader(file)} == BAD
    keys = set()
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        assert [name.partition(".")[2] for name in names] == ["flac", "0.jpg", "1.jpg", "json"] * (len(names) // 4)
        keys |= {name.partition(".")[0] for name in names}
    assert keys == {clip_key(name) for name in good}
    rows = list(load_corpus("shards", "train", streaming=True, data_dir=out))
    assert [row["id"] for row in rows] == good
    assert rows[5]["captions"] == ["what sub.folder/clip 005 sounds like"] and rows[5]["source"] == "folder"

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert prepare("folder", "--data-dir", media, "--out", out)[:2] == (0, printed)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_audiocaps_clips_and_whole_videos(prepare, good_clip, tmp_path):
    (tmp_path / "test.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n1,abcdefghijk,0,A dog barks\n2,abcdefghijk,0,Barking\n"
        "3,gone_-video,30,Rain\n"
    )
    shutil.copy(good_clip, tmp_path / "abcdefghijk.mp4")
    words = ("audiocaps", "--csv", tmp_path / "test.csv", "--data-dir", tmp_path, "--split", "test")
    code, printed, _ = prepare(*words, "--out", tmp_path / "out")
    assert code == 0 and "  missing           1  a file does not exist" in printed
    (row,) = load_corpus("shards", "train", streaming=True, data_dir=tmp_path / "out")
    assert (row["captions"], row["start"], row["end"]) == (["A dog barks", "Barking"], 0.0, None)
    # as a whole video, the file ends long before the clip
    code, _, error = prepare(*words, "--whole-videos", "--out", tmp_path / "whole")
    assert code == 1 and error.endswith(f"whole: no clip is ready; see the reasons in {tmp_path}/whole/report.csv")


def test_sounds_alone_need_no_pictures(prepare, tmp_path):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", sound(1.5, number), RATE)
    code, printed, _ = prepare("folder", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert code == 0 and printed.startswith("3 clips: 3 ready")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["require"] == ["audio"]
    Image.new("RGB", (32, 24)).save(tmp_path / "0.png")
    _, printed, _ = prepare("folder", "--data-dir", tmp_path, "--out", tmp_path / "both")
    assert "  no_picture        2  no picture is listed, or the file has none" in printed.splitlines()


def test_array_jobs_write_the_index_together(prepare, tmp_path):
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", sound(1.5, number), RATE)
    words = ("folder", "--data-dir", tmp_path, "--out", tmp_path / "out", "--clips-per-shard", 1, "--num-jobs", 2)
    code, printed, error = prepare(*words, "--job-id", 1)
    assert (code, error) == (0, "the other jobs have not finished; the last one writes the index")
    assert printed.startswith("2 clips: 2 ready") and "2 of 4 shards done" in printed
    code, printed, _ = prepare(*words, "--job-id", 0)
    assert code == 0 and "4 of 4 shards done" in printed and (tmp_path / "out" / "index.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{0}/out", "--job-id", "3"], "--job-id must be one of 0 to 0 (--num-jobs minus 1), not 3"),
        (["--out", "{0}/out", "--quality", "99"], "quality must be between 1 and 95, not 99"),
        (["--out", "{0}/out", "--silence", "7"], "silence must be between 0 and 1, not 7.0"),
        (["--out", "{0}/0.wav"], "{0}/0.wav: is a file; give --out a folder"),
        (["--out", "{0}/out", "--metadata", "{0}/none.csv"], "{0}/none.csv: no such file or folder; check metadata="),
        (
            ["--out", "{0}/done", "--frame-size", "224"],
            "--frame-size was 336, is 224; use the same settings, or give",
        ),
    ],
)
def test_an_error_is_one_line_with_the_remedy(prepare, tmp_path, words, message):
    media = tmp_path / "media"
    media.mkdir()
    soundfile.write(media / "0.wav", sound(1.5), RATE)
    if f"{words[1]}" == "{0}/done":
        prepare("folder", "--data-dir", media, "--out", media / "done")
    code, printed, error = prepare("folder", "--data-dir", media, *(word.format(media) for word in words))
    assert (code, printed) == (1, "")
    assert error.startswith("dali-llava: error: ") and message.format(media) in error


def test_a_folder_without_the_clips_is_refused_before_anything_is_written(prepare, tmp_path):
    (tmp_path / "test.csv").write_text("audiocap_id,youtube_id,start_time,caption\n1,abcdefghijk,0,A dog barks\n")
    words = ("audiocaps", "--csv", tmp_path / "test.csv", "--data-dir", tmp_path, "--split", "test")
    code, _, error = prepare(*words, "--out", tmp_path / "out")
    assert code == 1 and not (tmp_path / "out").exists()
    assert error.endswith(f"{tmp_path}: has no media of the 1 clips; check --data-dir and the file names")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nowhere", "--out", "o"],
        ["folder", "--out", "o"],
        ["folder", "--data-dir", "d"],
        ["audiocaps", "--data-dir", "d", "--out", "o"],
        ["audiocaps", "--data-dir", "d", "--out", "o", "--split", "evaluation"],
        ["folder", "--data-dir", "d", "--out", "o", "--frames", "0"],
        ["folder", "--data-dir", "d", "--out", "o", "--require", "video"],
        ["cav_mae_json", "--data-dir", "d", "--out", "o"],
    ],
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["prepare", *words])
    assert exit_info.value.code == 2 and "usage: dali-llava prepare" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(known_corpora()))
def test_the_options_of_a_corpus_are_those_of_its_configuration(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["prepare", name, "--help"])
    shown = capsys.readouterr().out
    assert exit_info.value.code == 0
    options = {option.name for option in options_of(configuration_of(name))} - {"missing"}
    assert options and all(f"--{option.replace('_', '-')}" in shown for option in options)
    (example,) = re.findall(r"^example: dali-llava (prepare .*)$", shown, re.M)
    parsed = build_parser().parse_args(shlex.split(example))
    assert {setting: getattr(parsed, setting) for setting in CLIP_SETTINGS} == {
        setting: getattr(ClipSettings(), setting) for setting in CLIP_SETTINGS
    }
    assert parsed.corpus == name


def test_help_needs_no_torch():
    code = "import sys\nfrom dali_llava.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    code += 'sys.exit("torch" in sys.modules or "datasets" in sys.modules)'
    subprocess.run([sys.executable, "-c", code, "prepare", "folder", "--help"], check=True, capture_output=True)


def test_real_clips(prepare, shared_data, tmp_path):
    code, printed, _ = prepare("folder", "--data-dir", shared_data / "clips", "--out", tmp_path / "out")
    assert code == 0 and printed.startswith("2 clips: 2 ready (0.01 h of sound")
    rows = list(load_corpus("shards", "train", streaming=True, data_dir=tmp_path / "out"))
    assert [len(row["frames"]) for row in rows] == [10, 10]
