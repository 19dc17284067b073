"""The words of `dali-llava convert`: pairs of kind and source, usage errors, and sources on the Hub."""

import importlib

import pytest

from dali_llava.cli import convert, main
from dali_llava.modeling.convert import get_converter
from dali_llava.modeling.convert.download import find_source


def refused(capsys, *words: str) -> str:
    """The last line of a usage error."""
    with pytest.raises(SystemExit) as error:
        main(["convert", *words])
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def kinds(monkeypatch):
    """A kind of each sort, so that the tests do not depend on the registered ones."""
    monkeypatch.setattr(convert, "BASES", {"llava": "whole", "other": "whole"})
    monkeypatch.setattr(convert, "PARTS", {"tower": "part"})


def test_every_kind_has_a_converter_and_its_help(capsys):
    with pytest.raises(SystemExit) as error:
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert error.value.code == 0 and "example" in shown and "{kinds}" not in shown
    for kind, line in (convert.BASES | convert.PARTS).items():
        assert callable(get_converter(kind))
        assert f"  {kind:<16}{line}" in shown
    with pytest.raises(SystemExit):
        main(["export-llava", "--help"])
    assert "dali-llava export-llava captioner llava" in capsys.readouterr().out


def test_sources_are_composed_in_order(kinds):
    pairs, out = convert.parse_sources(["llava", "a", "tower", "b", "out"], None)
    assert pairs == [("llava", "a"), ("tower", "b")] and str(out) == "out"
    pairs, _ = convert.parse_sources(["tower", "b", "out"], "base")
    assert pairs == [("llava", "base"), ("tower", "b")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("out",), "give KIND SOURCE pairs and then OUT"),
        (("llava", "a"), "give KIND SOURCE pairs and then OUT"),
        (("llava", "a", "tower", "out"), "give KIND SOURCE pairs and then OUT"),
        (("lava", "a", "out"), "lava: unknown kind of source; choose one of llava, other, tower"),
        (("tower", "a", "out"), "tower: is only a part of a captioner; add --base MODEL, or `llava MODEL` before it"),
        (("tower", "a", "llava", "b", "out"), "llava b: only the first source, or --base, can be a whole captioner"),
        (("llava", "a", "out", "--base", "b"), "llava a: only the first source, or --base, can be a whole captioner"),
        (("llava", "a", "out", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_usage_errors(words, message, kinds, capsys):
    assert message in refused(capsys, *words)


@pytest.mark.parametrize("command", [["convert", "llava"], ["export-llava"]])
def test_a_hub_id_without_network(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dali_llava.modeling.loading.is_offline_mode", lambda: True)
    assert main([*command, "nobody/llava", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "nobody/llava: no such folder, and no such model in the cache of the Hub; offline mode is on" in message
    assert message.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["convert", "llava"], ["export-llava"]])
def test_a_source_that_does_not_exist(command, tmp_path, capsys):
    assert main([*command, str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'absent'}: no such folder, and not a valid ORG/NAME" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"tower\.pth: no such file; check the path"):
        find_source("tower.pth")


def test_only_the_files_that_are_needed_are_downloaded(monkeypatch, tmp_path):
    """A repository with safetensors files: its pickled files stay on the Hub."""
    download = importlib.import_module("dali_llava.modeling.convert.download")
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    files = {"org/new": ["a.safetensors", "a.bin"], "org/old": ["a.bin"]}
    monkeypatch.setattr(download, "reach_hub", lambda name, options: {})
    monkeypatch.setattr(download.HfApi, "list_repo_files", lambda self, name: files[name])
    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    assert find_source("org/new") == find_source("org/old") == tmp_path
    assert "*.safetensors" in asked["org/new"] and "*.bin" not in asked["org/new"]
    assert "*.bin" in asked["org/old"] and "*.json" in asked["org/old"]


def test_a_language_model_needs_a_vision_tower(language_model_dir, tmp_path, capsys):
    assert main(["convert", "language-model", str(language_model_dir), str(tmp_path / "out")]) == 1
    assert "a language model has no vision tower; add --vision" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
