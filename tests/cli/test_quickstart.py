"""The quickstart: what it refuses before anything trains, its table of examples, and (slow) the whole run."""

import json

import pytest
from PIL import Image

from dali_llava.cli import main
from dali_llava.cli.quickstart import print_examples
from dali_llava.eval.results import load_results
from dali_llava.train import captioner_cache


@pytest.fixture
def untrained(monkeypatch):
    """Fails when a captioner is asked for: by then the arguments should have been refused."""

    def fail(*args):
        raise AssertionError("training has begun")

    monkeypatch.setattr(captioner_cache, "pretrained_captioner", fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "mmd,emd"], "--methods: unknown method 'emd'; choose from all, contrastive, mmd, ot, ot_att"),
        (["--methods", ""], "--methods: unknown method ''; choose from all"),
        (["--methods", "ot,mmd,ot"], "--methods ot,mmd,ot: a method comes twice"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--esc10", "nowhere"], "nowhere: no such folder; give the folder of ESC-10"),
    ],
)
def test_bad_arguments_are_named_before_anything_trains(words, message, untrained, tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "run"), *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_missing_classes_of_esc10_are_all_named(untrained, tmp_path, capsys):
    for name in ("001 - Dog bark", "002 - Rain"):
        folder = tmp_path / "esc10" / name
        folder.mkdir(parents=True)
        for fold in range(1, 5):
            (folder / f"{fold}-1-A.ogg").touch()
    assert main(["quickstart", "--out", str(tmp_path / "run"), "--esc10", str(tmp_path / "esc10")]) == 1
    error = capsys.readouterr().err
    assert "no recordings of waves ('Sea waves'), baby ('Baby cry')" in error and "fire ('Fire crackling')" in error
    assert "dog" not in error.split(";")[0] and error.count("\n") == 1


def test_examples_are_a_section_a_clip_and_a_line_a_method(capsys):
    systems = [
        f"{m}-{s}" for m in ("mmd", "ot") for s in ("aligned-audio", "distilled-audio", "distilled-audiovisual")
    ]
    captions = {system: f"said by {system}" for system in systems}
    print_examples([("a dog barking", captions), ("rain falling", captions)], ["mmd", "ot"])
    printed = capsys.readouterr().out
    assert printed.count("a dog barking") == printed.count("rain falling") == 1
    assert all(printed.count(f"said by {system} ") == 2 for system in systems)


@pytest.mark.slow
def test_the_whole_run(tmp_path, capsys):
    """Four minutes on two cores; what it must reach is in its claims."""
    assert main(["quickstart", "--out", str(tmp_path), "--methods", "mmd"]) == 0
    results = load_results(tmp_path)
    assert {claim.verdict for claim in results.claims if "unchanged" in claim.claim} == {"holds"}
    table = {(row.method, row.stage, row.modality, row.split): row for row in results.rows}
    assert table["mmd", "aligned", "audio", "test"].metrics["sound_recall"] >= 0.6
    assert Image.open(tmp_path / "figures" / "mean_tokens.png").format == "PNG"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llava_audio"
    assert "captions beside their references" in capsys.readouterr().out
