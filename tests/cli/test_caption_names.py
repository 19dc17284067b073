"""File names as users have them, and folders, given to `dali-llava caption`."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

from dali_llava.cli import main


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
