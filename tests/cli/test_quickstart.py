"""The quickstart: errors before training, its table of examples, and (slow) the whole run."""

import json

import pytest
from PIL import Image

from dali_llava.cli import main, quickstart
from dali_llava.cli.quickstart import print_examples, train
from dali_llava.eval.results import load_results
from dali_llava.train import align, distill, prefix_tune
from dali_llava.train.avworld import captioner_cache, pretrain_tower


@pytest.fixture
def untrained(monkeypatch):
    """Fail if a captioner is loaded: invalid arguments must be rejected before."""

    def fail(*args):
        raise AssertionError("training has begun")

    monkeypatch.setattr(captioner_cache, "pretrained_captioner", fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "mmd,emd"], "--methods: unknown method 'emd'; choose from all, contrastive, mmd, ot, ot_att"),
        (["--methods", ""], "--methods: unknown method ''; choose from all"),
        (["--methods", "ot,mmd,ot"], "--methods ot,mmd,ot: duplicate method"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--esc10", "nowhere"], "nowhere: no such folder; give the folder of ESC-10"),
    ],
)
def test_bad_arguments_are_named_before_anything_trains(words, message, untrained, tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "run"), *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_all_methods_are_the_papers(monkeypatch, tmp_path):
    """Objectives that are added or registered are not included."""

    class Begun(Exception):
        pass

    def note(out, seed, methods, recordings):
        raise Begun(methods)

    monkeypatch.setattr(quickstart, "train", note)
    with pytest.raises(Begun) as begun:
        main(["quickstart", "--out", str(tmp_path / "run"), "--methods", "all", "--debug"])
    assert begun.value.args == (["contrastive", "mmd", "ot", "ot_att"],)


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


@pytest.mark.parametrize("recordings", [None, "ESC-10"])
def test_recordings_alone_are_heard_before_the_alignment(recordings, tmp_path, monkeypatch):
    """The stages in order, each with its base."""
    ran = []

    def stage_of(name):
        def main(words: list[str]) -> None:
            base, output = (words[words.index(flag) + 1] for flag in ("--base_model", "--output_dir"))
            ran.append((name, base.rpartition("/")[2], output.rpartition("/")[2], "--dataset_options" in words))

        return main

    for stage in (align, distill, prefix_tune, pretrain_tower):
        name = stage.__name__.rpartition(".")[2]
        monkeypatch.setattr(stage, "main", stage_of(name))
    (tmp_path / "cached").mkdir()
    monkeypatch.setattr(captioner_cache, "pretrained_captioner", lambda config: tmp_path / "cached")
    merged = []
    monkeypatch.setattr("dali_llava.cli.quickstart.merge_checkpoint", lambda *args, **kwargs: merged.append(args))
    folders = train(tmp_path / "run", 0, ["ot"], recordings)
    heard = [("pretrain_tower", "prefix", "tower", True)] if recordings else []
    assert ran == [
        ("prefix_tune", "captioner", "prefix", False),
        *heard,
        ("align", "tower" if recordings else "prefix", "ot-aligned", recordings is not None),
        ("distill", "ot-aligned", "ot-distilled", recordings is not None),
    ]
    assert folders["model"] == tmp_path / "run" / "model"
    assert merged == [(tmp_path / "run" / "ot-distilled", folders["model"])]


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
    """Takes four minutes on two cores. The claims state the expected figures."""
    assert main(["quickstart", "--out", str(tmp_path), "--methods", "mmd"]) == 0
    results = load_results(tmp_path)
    assert {claim.verdict for claim in results.claims if "unchanged" in claim.claim} == {"holds"}
    table = {(row.method, row.stage, row.modality, row.split): row for row in results.rows}
    assert table["mmd", "aligned", "audio", "test"].metrics["sound_recall"] >= 0.6
    assert Image.open(tmp_path / "figures" / "mean_tokens.png").format == "PNG"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llava_audio"
    assert "captions beside their references" in capsys.readouterr().out
