"""The command ablate: errors before training, what each row trains from, and rows that are not trained again."""

import json

import pytest

from dali_llava.cli import ablate, main
from dali_llava.eval.avworld import ablation
from dali_llava.eval.avworld.ablation import ablation_rows
from dali_llava.eval.results import Row
from dali_llava.processing import corpora
from dali_llava.train import lavcap
from dali_llava.train.avworld import captioner_cache, pretrain_tower
from dali_llava.train.command_line import as_words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "lavcap,sum"], "--rows: unknown row 'sum'; choose from audio, concatenation"),
        (["--rows", "audio,audio"], "--rows audio,audio: duplicate row"),
        (["--seeds", "0,x"], "--seeds 0,x: expected numbers such as 0,1,2"),
        (["--seeds", "-1"], "--seeds -1: expected numbers"),
        (["--seeds", "1,1"], "--seeds 1,1: duplicate seed"),
    ],
)
def test_bad_arguments_are_named_before_anything_trains(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "train_row", lambda *_: pytest.fail("training has begun"))
    assert main(["ablate", "lavcap", "--out", str(tmp_path / "run"), *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unknown_method_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["ablate", "dali"])
    assert exit.value.code == 2 and "invalid choice: 'dali'" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["ablate", "--help"])
    assert "dali-llava ablate lavcap --rows" in capsys.readouterr().out


def test_all_rows_are_arguments_of_the_stage(tmp_path):
    config = str(ablate_config())
    for name, arguments in ablation_rows().items():
        words = [config, "--output_dir", str(tmp_path), "--use_cpu", "true", *as_words(arguments)]
        parsed = lavcap.parse(words)
        assert all(getattr(parsed, field) == value for field, value in arguments.items()), name


def ablate_config():
    from dali_llava.train.command_line import CONFIGS

    return CONFIGS / "avworld" / "lavcap.yaml"


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The stages that run, without training: (stage, folder of the base, folder of the output, seed)."""
    ran = []

    def stage_of(name):
        def main(words: list[str]) -> None:
            base, output, seed = (words[words.index(flag) + 1] for flag in ("--base_model", "--output_dir", "--seed"))
            (tmp_path / output).mkdir(parents=True)
            ran.append((name, base.rpartition("/")[2], output.rpartition("/")[2], seed))

        return main

    (tmp_path / "cached").mkdir()
    monkeypatch.setattr(captioner_cache, "pretrained_captioner", lambda config: tmp_path / "cached")
    monkeypatch.setattr(pretrain_tower, "main", stage_of("tower"))
    monkeypatch.setattr(lavcap, "main", stage_of("lavcap"))
    monkeypatch.setattr(corpora, "load_corpus", lambda *_, **__: None)
    monkeypatch.setattr(ablation, "score_row", scored)
    return ran


def scored(name, model, seed, rows, split, out, scorer) -> Row:
    assert model.is_dir() and model.name == name
    return Row(
        name, "supervised", "audiovisual", split, seed, 1, {"cider_d": 1.0 + seed, "meteor": None}, {"meteor": "x"}
    )


def test_rows_are_trained_from_the_tower_of_their_seed_once(ran, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["ablate", "lavcap", "--out", str(out), "--seeds", "0,1", "--rows"]
    assert main([*words, "concatenation"]) == 0
    assert ran == [
        ("tower", "captioner", ".tower", "0"),
        ("lavcap", "tower", "concatenation", "0"),
        ("tower", "captioner", ".tower", "1"),
        ("lavcap", "tower", "concatenation", "1"),
    ]
    ran.clear()
    assert main([*words, "concatenation,concatenation_loss"]) == 0
    assert ran == [("lavcap", "tower", "concatenation_loss", str(seed)) for seed in (0, 1)]
    assert "Table II" in capsys.readouterr().out
    content = json.loads((out / "ablation.json").read_text())
    assert [(row["method"], row["seed"]) for row in content["rows"]] == [
        (name, seed) for seed in (0, 1) for name in ("concatenation", "concatenation_loss")
    ]
    assert (out / "seed0" / "tower").is_dir() and not (out / "seed0" / ".tower").exists()
