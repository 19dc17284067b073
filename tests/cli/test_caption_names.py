"""`dali-llava caption` with unusual file names and with folders."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image, features

from dali_llava.cli import main
from dali_llava.processing.media import source


def test_names_of_every_kind(tiny_model_dir, media_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    composed, decomposed = "h\u00f6ren.wav", unicodedata.normalize("NFD", "h\u00f6ren.wav")
    for name in (" blank.wav", "UPPER.WAV", "-dash.wav", decomposed):
        shutil.copy(media_dir / "bark.wav", name)
    names = [" blank.wav", "UPPER.WAV", composed, "./-dash.wav", "absent.wav", "-dash.wav"]
    code = main(["caption", "--max-new-tokens", "3", "--device", "cpu", "--json", str(tiny_model_dir), "--", *names])
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert code == 1 and captured.err == "dali-llava: error: absent.wav: no such file; check the path\n"
    assert [row["file"] for row in rows] == [name for name in names if name != "absent.wav"]


def test_a_name_that_is_not_utf8(tiny_model_dir, media_dir, tmp_path):
    names = [os.fsencode(tmp_path) + b"/h\xf6ren.wav", os.fsencode(tmp_path) + b"/gone\xf6.wav"]
    shutil.copy(media_dir / "bark.wav", names[0])
    command = [sys.executable, "-m", "dali_llava", "caption", str(tiny_model_dir), "--max-new-tokens", "3"]
    done = subprocess.run([*command, *names], capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout.split(b"\t")[0] == names[0] and done.stdout.count(b"\n") == 1
    assert b"no such file" in done.stderr and b"Traceback" not in done.stderr
    done = subprocess.run([*command, "--json", names[0]], capture_output=True, check=True)
    assert os.fsencode(json.loads(done.stdout.decode())["file"]) == names[0]


def test_a_folder_stands_for_its_media_files(tiny_model_dir, media_dir, tmp_path, capsys):
    for name in ("b.WAV", "a.wav", "deep/c.wav", ".hidden.wav", "notes.txt"):
        Path(tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(media_dir / "bark.wav", tmp_path / name)
    assert main(["caption", str(tiny_model_dir), str(tmp_path), "--max-new-tokens", "3", "--device", "cpu"]) == 0
    files = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert files == [str(tmp_path / name) for name in ("a.wav", "b.WAV", "deep/c.wav")]


@pytest.mark.parametrize(("suffix", "name"), [(".heic", "HEIF"), (".HEIF", "HEIF"), (".avif", "AVIF")])
def test_a_folder_includes_heic_and_avif_pictures(
    tiny_model_dir, media_dir, tmp_path, capsys, monkeypatch, suffix, name
):
    if name == "HEIF":
        pytest.importorskip("pillow_heif")
    elif not features.check("avif"):
        pytest.skip("this Pillow does not support AVIF")
    picture = tmp_path / f"a{suffix}"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(picture, format=name)
    shutil.copy(media_dir / "photo.jpg", tmp_path / "b.jpg")
    words = ["caption", str(tiny_model_dir), str(tmp_path), "--max-new-tokens", "3", "--device", "cpu", "--json"]
    assert main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(Path(row["file"]).name, row["modality"]) for row in rows] == [(picture.name, "image"), ("b.jpg", "image")]

    # without the optional decoder
    formats = tuple(supported for supported in source.IMAGE_FORMATS if supported not in ("HEIF", "AVIF"))
    monkeypatch.setattr(source, "IMAGE_FORMATS", formats)
    assert main(words) == 1
    captured = capsys.readouterr()
    assert [Path(json.loads(line)["file"]).name for line in captured.out.splitlines()] == ["b.jpg"]
    assert captured.err.startswith(f"dali-llava: error: {picture}: is a HEIC or AVIF picture, which needs pillow-heif")
    assert captured.err.count("\n") == 1
