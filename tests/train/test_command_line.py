"""Command line of the stages: one YAML file, options that override it, and errors that name key and file."""

import importlib
import json
import re

import pytest
import yaml

from dali_llava.processing import corpora
from dali_llava.train.arguments import AlignmentArguments, DistillationArguments, PrefilterArguments, PrefixArguments
from dali_llava.train.avworld.pretrain_captioner import CaptionerArguments
from dali_llava.train.avworld.tower import TowerArguments
from dali_llava.train.command_line import (
    CONFIGS,
    parse_stage_arguments,
    read_stage_config,
    run_stage,
    warn_of_single_process,
)
from dali_llava.train.trainers.lavcap import LavcapArguments
from dali_llava.train.trainers.supervised import SupervisedArguments


ARGUMENTS = {
    "prefilter": PrefilterArguments,
    "captioner": CaptionerArguments,
    "prefix_tune": PrefixArguments,
    "pretrain_tower": TowerArguments,
    "align": AlignmentArguments,
    "align_recordings": AlignmentArguments,
    "distill": DistillationArguments,
    "sft": SupervisedArguments,
    "lavcap": LavcapArguments,
}
FILES = sorted(path for folder in ("avworld", "full") for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.fixture
def parse(tmp_path):
    """`parse(text, *words)`: parses the alignment's arguments from a YAML file with this text and from options."""

    def parse(text: str, *words: str) -> AlignmentArguments:
        path = tmp_path / "stage.yaml"
        path.write_text(text)
        output = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
        return parse_stage_arguments(AlignmentArguments, "about the stage", [str(path), *output, *words])

    return parse


def test_values_come_from_the_file(parse):
    arguments = parse("learning_rate: 3.0e-3\nmax_steps: 7\ncache_features: true\nsplit: val\nobjective: ot\n")
    assert (arguments.learning_rate, arguments.max_steps, arguments.cache_features) == (3e-3, 7, "all")
    assert (arguments.split, arguments.objective) == ("val", "ot")


def test_command_line_wins_over_the_file(parse):
    text = "learning_rate: 3.0e-3\nmax_steps: 7\ncache_features: true\n"
    arguments = parse(text, "--learning_rate", "5e-4", "--cache_features", "false")
    assert (arguments.learning_rate, arguments.max_steps, arguments.cache_features) == (5e-4, 7, "none")


def test_defaults_are_the_papers(parse):
    """Adam's betas (0.95, 0.999), rate 1e-4, coupled decay 5e-7, noise 0.1."""
    arguments = parse("")
    assert (arguments.learning_rate, arguments.adam_beta1, arguments.adam_beta2) == (1e-4, 0.95, 0.999)
    assert (arguments.weight_decay, arguments.augmentation_noise) == (5e-7, 0.1)
    assert (arguments.base_model, arguments.objective_options, arguments.dataset_options) == (None, {}, {})


def test_null_leaves_the_default(parse):
    assert parse("learning_rate: null\nmax_samples:\n").max_samples is None


def test_mappings_come_from_file_or_command_line(parse):
    text = "objective_options: {width: 8}\ndataset_options:\n  sizes: {train: 4}\n  seed: 3\n"
    arguments = parse(text)
    assert arguments.objective_options == {"width": 8}
    assert arguments.dataset_options == {"sizes": {"train": 4}, "seed": 3}
    assert parse(text, "--dataset_options", json.dumps({"seed": 5})).dataset_options == {"seed": 5}


@pytest.mark.parametrize("name", ["dataset_options", "objective_options"])
@pytest.mark.parametrize("text", ["data_dir=clips", "[1]", '{"seed": ', "3"])
def test_options_that_are_no_mapping(parse, name, text):
    with pytest.raises(ValueError, match=f"^{name}: expected JSON such as .*, not '{re.escape(text)}'"):
        parse("", f"--{name}", text)


def test_lists_keep_their_items(parse):
    assert parse("label_names: [a, b]\n").label_names == ["a", "b"]


@pytest.mark.parametrize("text", ["lerning_rate: 1\nseed: 1\n", "seed: 1\nlerning_rate: 1\n"])
def test_unknown_key_names_key_and_file(parse, tmp_path, text):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "stage.yaml")) + ".*unknown key lerning_rate;"):
        parse(text)


def test_key_of_another_stage_is_unknown(parse):
    with pytest.raises(ValueError, match="unknown key caption_temperature"):
        parse("caption_temperature: 0.2\n")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n"])
def test_file_must_be_a_mapping(parse, text):
    with pytest.raises(ValueError, match=r"stage\.yaml: expected 'field: value' lines, found a (list|str)"):
        parse(text)


def test_bad_yaml_is_one_line_with_the_file(parse, tmp_path):
    with pytest.raises(ValueError) as error:
        parse("learning_rate: [1, 2\nseed: 0\n")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'stage.yaml'}: not valid YAML: ") and "\n" not in message


def test_missing_file_is_named_with_the_examples(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{tmp_path / 'no.yaml'}: the configuration does not exist")
    ) as error:
        parse_stage_arguments(AlignmentArguments, "about", [str(tmp_path / "no.yaml")])
    assert str(CONFIGS) in str(error.value)


def test_unknown_option_exits_with_2(parse, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("seed: 1\n", "--lerning_rate", "1")
    assert exit.value.code == 2
    assert "--lerning_rate" in capsys.readouterr().err


def test_abbreviated_options_are_refused(parse):
    with pytest.raises(SystemExit):
        parse("seed: 1\n", "--learning_r", "1")


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help_describes_the_stage_and_its_fields(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_stage_arguments(AlignmentArguments, "about the stage", argv)
    shown = capsys.readouterr().out
    assert exit.value.code == 0
    assert all(word in shown for word in ("CONFIG.yaml", "about the stage", "--objective", "--base_model"))


def test_all_stages_have_configurations():
    small = ("captioner", "pretrain_tower", "align_recordings")  # full-size models are pretrained
    assert {(path.parent.name, path.stem) for path in FILES} == {
        *(("avworld", stage) for stage in ARGUMENTS),
        *(("full", stage) for stage in ARGUMENTS if stage not in small),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_configuration_parses_into_what_it_says(path, tmp_path):
    values = yaml.safe_load(path.read_text())
    # half precision needs an accelerator, as full-size runs do
    words = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    arguments = parse_stage_arguments(ARGUMENTS[path.stem], "about", [str(path), *words])
    values.pop("bf16", None)
    for key, value in values.items():
        assert getattr(arguments, key) == value, key
    assert arguments.split in corpora.configuration_of(arguments.dataset).splits


def test_avworlds_alignment_has_the_attentive_schedules_six_epochs():
    align = read_stage_config(CONFIGS / "avworld" / "align.yaml", set(AlignmentArguments.__dataclass_fields__))
    assert align["schedule_epochs"] == 6 and "objective" not in align  # given on the command line


def test_full_size_configurations_are_the_papers():
    known = set(AlignmentArguments.__dataclass_fields__) | set(DistillationArguments.__dataclass_fields__)
    align, distill, prefix = (
        read_stage_config(CONFIGS / "full" / f"{stage}.yaml", known) for stage in ("align", "distill", "prefix_tune")
    )
    assert (align["num_train_epochs"], align["per_device_train_batch_size"]) == (20, 256)
    assert (align["learning_rate"], align["halve_from"], align["halve_every"]) == (1e-4, 10, 5)
    assert (distill["learning_rate"], distill["per_device_train_batch_size"]) == (2e-4, 40)
    assert (distill["warmup_steps"], distill["num_train_epochs"]) == (0.03, 1)
    assert (prefix["learning_rate"], prefix["max_samples"]) == (2e-4, 16)


def test_script_tells_bad_input_in_one_line(monkeypatch):
    def main(argv: list[str]) -> None:
        raise ValueError(f"{argv[0]}: unknown key\n  bogus")

    monkeypatch.setattr("sys.argv", ["train/align.py", "stage.yaml"])
    with pytest.raises(SystemExit) as ended:
        run_stage(main)
    # A string makes Python print it and exit with code 1.
    assert ended.value.code == "align.py: error: stage.yaml: unknown key bogus"


@pytest.mark.parametrize("words", [["stage.yaml", "--debug"], ["stage.yaml", "--debug", "--seed", "1"]])
def test_debug_keeps_the_traceback_of_an_error_in_training(monkeypatch, words):
    """`--debug` without a value is removed before the stage's arguments are parsed."""
    given = []

    def main(argv: list[str]) -> None:
        given.extend(argv)
        raise ValueError("loss is NaN")

    monkeypatch.setattr("sys.argv", ["train/align.py", *words])
    with pytest.raises(ValueError, match="loss is NaN") as error:
        run_stage(main)
    assert error.traceback[-1].name == "main"
    assert given == [word for word in words if word != "--debug"]


def test_debug_with_a_value_is_the_trainers(monkeypatch):
    words = ["stage.yaml", "--debug", "underflow_overflow"]
    monkeypatch.setattr("sys.argv", ["train/align.py", *words])
    given = []
    run_stage(given.extend)
    assert given == words


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"MASTER_ADDR": "node1"}, False),
    ],
)
def test_processes_that_were_not_started_are_warned_of(capsys, environment, warned):
    warn_of_single_process(environment)
    error = capsys.readouterr().err
    assert error.startswith("warning: accelerate launch was asked for several processes") == warned
    assert ("--multi_gpu" in error) == warned


def test_accelerate_sets_what_the_warning_reads(monkeypatch):
    """Uses the environment that the launcher sets for two processes on a CPU."""
    launch = importlib.import_module("accelerate.commands.launch")
    utilities = importlib.import_module("accelerate.utils.launch")
    words = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    arguments = launch.launch_command_parser().parse_args([*words, "train/align.py"])
    arguments.use_cpu = arguments.debug = False
    arguments.num_cpu_threads_per_process, arguments.gpu_ids = 1, "all"
    _, environment = utilities.prepare_simple_launcher_cmd_env(arguments)
    assert {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(environment) and "WORLD_SIZE" not in environment


def test_tensorboard_is_the_default_if_it_is_installed(parse, monkeypatch):
    monkeypatch.setattr("dali_llava.train.arguments.find_spec", lambda name: object())
    assert parse("").report_to == ["tensorboard"]
    monkeypatch.setattr("dali_llava.train.arguments.find_spec", lambda name: None)
    assert parse("").report_to == []
    assert parse("report_to: none\n").report_to == []


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", '"dali-llava[tensorboard]"'), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_missing_tracker_is_named_with_its_package(parse, monkeypatch, name, package):
    monkeypatch.setattr("dali_llava.train.arguments.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape(f"report_to: {name} is not installed; run pip install {package}")):
        parse("", "--report_to", name)


def test_unknown_tracker_is_named(parse):
    with pytest.raises(ValueError, match="report_to: wandbb is not supported, only .*wandb"):
        parse("", "--report_to", "wandbb")


def test_negative_distance_steps_are_an_error(parse):
    assert parse("").distance_steps == 100
    with pytest.raises(ValueError, match="distance_steps must be at least 0, not -1"):
        parse("distance_steps: -1\n")


def test_negative_sample_steps_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="sample_steps must be at least 0, not -5"):
        PrefixArguments(output_dir=str(tmp_path), use_cpu=True, sample_steps=-5)
