"""`dali-llava plan`: its tables and its errors."""

import pytest

from dali_llava.cli import main
from dali_llava.train.command_line import CONFIGS


PREFIX = str(CONFIGS / "full" / "prefix_tune.yaml")


def test_the_plan_of_a_base_model(tiny_model_dir, capsys):
    words = ["--base_model", str(tiny_model_dir), "--gpu-memory", "80", "--per_device_train_batch_size", "4"]
    assert main(["plan", PREFIX, *words, "--max_steps", "7"]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["prefix", "512", "512", "0.00"] in lines
    assert "fits: " in shown.out and "of 80 GB per GPU, 1 GPU(s), ddp" in shown.out
    assert "update: 4 samples of 180 tokens (720 tokens)" in shown.out
    assert "updates: 7; training " in shown.out and "assuming 125 TFLOP/s per GPU" in shown.out
    assert str(tiny_model_dir) in shown.err


def test_a_plan_that_does_not_fit_says_so(tiny_model_dir, capsys):
    assert main(["plan", PREFIX, "--base_model", str(tiny_model_dir), "--gpu-memory", "0.000001"]) == 0
    assert "does not fit: " in capsys.readouterr().out


def test_distillation_also_plans_the_captioning(tiny_model_dir, capsys):
    words = ["--base_model", str(tiny_model_dir), "--caption_max_new_tokens", "6", "--stage", "distill"]
    assert main(["plan", str(CONFIGS / "full" / "distill.yaml"), *words, "--clips", "80"]) == 0
    shown = capsys.readouterr().out
    assert "memory per GPU, captioning" in shown and "\ncache " in shown
    assert "updates: 2; training " in shown and ", captioning " in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no.yaml", "--stage", "align"], "no.yaml: the configuration does not exist"),
        (["no.yaml"], "no.yaml: its name does not start with a stage; give --stage"),
        (
            [PREFIX, "--stage", "aline"],
            "stage: unknown stage 'aline'; known: prefix_tune, align, distill, sft, lavcap.",
        ),
        ([PREFIX, "--gpus", "0"], "gpus: must be positive, not 0"),
        ([PREFIX, "--gpu-memory", "-80"], "--gpu-memory: must be positive, not -80"),
        ([PREFIX, "--engine", "zero4"], "engine: unknown engine 'zero4'"),
        ([PREFIX, "--base_model", "no/folder/of/this/name"], "no/folder/of/this/name: "),
    ],
)
def test_wrong_input_is_one_line(words, message, capsys):
    assert main(["plan", *words]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"dali-llava: error: {message}")
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [["--lerning_rate", "1"], ["--gpus", "many"], ["--field"]])
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", PREFIX, *words])
    assert exit_info.value.code == 2
    assert words[0] in capsys.readouterr().err
