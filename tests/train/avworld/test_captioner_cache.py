"""Cache of the pretrained captioner: trained once, written atomically, and keyed by everything it depends on."""

from pathlib import Path

import pytest

from dali_llava.train.avworld import captioner_cache
from dali_llava.train.avworld.captioner_cache import captioner_key, pretrained_captioner


@pytest.fixture
def trainings(monkeypatch, tmp_path) -> list[list[str]]:
    """Records the command lines of trainings, which write one file instead; the cache is a temporary folder."""
    calls = []

    def main(argv: list[str]) -> None:
        calls.append(argv)
        output = Path(argv[argv.index("--output_dir") + 1])
        output.mkdir()
        (output / "config.json").write_text("{}")
        if "--fail" in argv:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(captioner_cache.pretrain_captioner, "main", main)
    monkeypatch.setenv("DALI_LLAVA_CACHE", str(tmp_path / "cache"))
    return calls


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "captioner.yaml"
    path.write_text("max_steps: 2\n")
    return path


def test_captioner_is_trained_once(trainings, config, tmp_path):
    first, second = pretrained_captioner(config), pretrained_captioner(config)
    assert first == second and len(trainings) == 1
    assert first.parent == tmp_path / "cache" and (first / "config.json").is_file()


def test_another_seed_is_another_captioner(trainings, config):
    folders = {pretrained_captioner(config, words) for words in ([], ["--seed", "1"], ["--seed", "2"])}
    assert len(folders) == len(trainings) == 3
    assert trainings[1][:3] == [str(config), "--seed", "1"]


def test_key_follows_the_configurations_text(config, tmp_path):
    same = tmp_path / "same.yaml"
    same.write_text(config.read_text())
    assert captioner_key(config, []) == captioner_key(same, [])
    same.write_text("max_steps: 3\n")
    assert captioner_key(config, []) != captioner_key(same, [])


def test_failed_training_leaves_nothing_behind(trainings, config, tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        pretrained_captioner(config, ["--fail"])
    assert list((tmp_path / "cache").iterdir()) == []
