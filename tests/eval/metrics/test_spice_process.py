"""SPICE: finding CoreNLP, and the input and output of the Java process."""

import json
import os
import sys

import pytest

from dali_llava.eval.metrics.spice_process import CORENLP_JARS, find_corenlp, spice


@pytest.fixture
def corenlp(tmp_path):
    folder = tmp_path / "corenlp" / "stanford-corenlp-full-2015-12-09"
    folder.mkdir(parents=True)
    for jar in CORENLP_JARS:
        (folder / jar).touch()
    return folder


def test_find_corenlp(corenlp, tmp_path, monkeypatch):
    monkeypatch.delenv("CORENLP_HOME", raising=False)
    assert find_corenlp(corenlp.parent) == corenlp
    monkeypatch.setenv("AAC_METRICS_CACHE_PATH", str(tmp_path))
    assert find_corenlp() is None
    corenlp.parent.rename(tmp_path / "aac-metrics")
    assert find_corenlp() == tmp_path / "aac-metrics" / corenlp.name
    monkeypatch.setenv("CORENLP_HOME", str(tmp_path / "aac-metrics"))
    assert find_corenlp() == tmp_path / "aac-metrics" / corenlp.name


def test_named_folder_without_corenlp(tmp_path, corenlp):
    (corenlp / CORENLP_JARS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{corenlp}: does not contain stanford-corenlp"):
        find_corenlp(corenlp)


@pytest.mark.skipif(os.name != "posix", reason="the replacement for Java is a script with a #! line")
def test_spice_process(tmp_path, corenlp):
    java = tmp_path / "java"
    java.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        f"json.dump(sys.argv, open({str(tmp_path / 'argv.json')!r}, 'w'))\n"
        "asked = json.load(open(sys.argv[sys.argv.index('-out') - 1]))\n"
        "scores = [{'image_id': e['image_id'], 'scores': {'All': {'f': len(e['refs']) / 4}}} for e in asked]\n"
        "json.dump(scores, open(sys.argv[sys.argv.index('-out') + 1], 'w'))\n"
    )
    java.chmod(0o755)
    assert spice(["a dog", "rain"], [["a dog", "dogs"], ["rain"]], str(java), corenlp).clips.tolist() == [2 / 4, 1 / 4]
    command = json.loads((tmp_path / "argv.json").read_text())
    assert all(str(corenlp / jar) in command[command.index("-cp") + 1] for jar in CORENLP_JARS)
    java.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="SPICE failed .* out of memory"):
        spice(["a dog"], [["a dog"]], str(java), corenlp)
