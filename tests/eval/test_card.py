"""Model cards: their metadata, their figures, and the cards in model_cards/."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dali_llava.cli import main
from dali_llava.eval.card import MARKER, TEMPLATE, model_card, recipe_card
from dali_llava.eval.results import Results, Row, load_results, write_results


ROOT = Path(__file__).parents[2]
SEED0 = ROOT / "docs" / "data" / "avworld_seed0.json"
FULL = ROOT / "train" / "configs" / "full"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)*(?:e-?\d+)?")
SOURCES = [
    {"kind": "llava", "name": "org/llava", "revision": "4f2c", "license": "llama2", "license_from": "README.md"},
    {"kind": "cav-mae", "name": "audio.pth", "license": "bsd-2-clause", "license_from": "known for cav-mae"},
]
MANIFEST = {
    "engine": "ddp",
    "processes": 2,
    "arguments": {"dataset": "audioset", "split": "train", "learning_rate": 2.5e-4, "lora": [], "seed": 7},
}
STATE = {
    "global_step": 1250,
    "epoch": 3.5,
    "log_history": [
        {"loss": 2.75, "clips_per_second": 11.5},
        {"loss": 1.625, "clips_per_second": 12.5},
        {"train_runtime": 913.25},
    ],
}


def write_model(folder: Path, stage: str | None = None, base: str = "", trained: str = "", sources=()) -> Path:
    """Write the JSON files of a checkpoint, without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_audio", "sources": list(sources)}))
    if stage is not None:
        description = {"stage": stage, "base_model_name_or_path": base, "trained": [trained]}
        (folder / "stage.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """The folders of a quickstart, with a checkpoint of the alignment."""
    write_model(tmp_path / "captioner")
    write_model(tmp_path / "prefix", "prefix", "../captioner", "model.prefix.weight")
    aligned = write_model(tmp_path / "ot_att-aligned", "align:ot_att", "../prefix", "model.audio_tower.norm.bias")
    write_model(
        tmp_path / "ot_att-distilled", "distill", "../ot_att-aligned", "model.audio_projector.linear_1.bias", SOURCES
    )
    for step, state in ((900, {}), (1250, STATE)):
        checkpoint = aligned / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "checkpoint.json").write_text(json.dumps(MANIFEST))
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


def numbers(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def unexplained(card: str, *recorded: str) -> set[str]:
    """The numbers of a card that are not in a record, rounded to as many digits as the card has."""
    known = set().union(*map(numbers, recorded))
    figures = [float(one) for one in known if one.count(".") == 1]

    def explained(number: str) -> bool:
        digits = len(number.partition(".")[2])
        rounded = number.count(".") == 1 and any(f"{one:.{digits}f}" == number for one in figures)
        return number in known or rounded

    return {number for number in numbers(card) if not explained(number)}


def test_every_number_of_a_card_is_recorded(run):
    recorded = [SEED0.read_text(), *(file.read_text() for file in run.rglob("*.json"))]
    card = model_card(run / "ot_att-distilled", [SEED0], "ours").content
    assert len(numbers(card)) > 40
    assert unexplained(card, *recorded) == set()
    assert unexplained(card + "\nCIDEr-D is 2.176, with 3 seeds and 77%.", *recorded) == {"2.176", "3", "77"}
    assert numbers(TEMPLATE.read_text()) == set()


def test_a_card_states_the_stages_their_training_and_the_sources(run):
    card = model_card(run / "ot_att-distilled")
    stages = re.findall(r"^### (.+)$", card.text, re.M)
    assert stages == ["prefix", "align:ot_att", "distill"]
    lines = card.text.splitlines()
    for line in (
        *("- base: prefix", "- trained: audio_tower", "- learning_rate: 0.00025", "- steps: 1250", "- epochs: 3.5"),
        *("- loss (last): 1.625", "- clips_per_second (last): 12.5", "- seconds: 913.25", "- processes: 2"),
        "Training: audioset.",
        "| cav-mae | audio.pth | - | bsd-2-clause | known for cav-mae |",
    ):
        assert line in lines, line
    assert "- lora: " not in card.text and str(run) not in card.text
    assert (card.data.license, card.data.license_name) == ("other", "bsd-2-clause-and-llama2")
    assert (card.data.base_model, card.data.datasets) == (["org/llava"], ["audioset"])


def test_a_model_without_results_has_none(tmp_path):
    card = model_card(write_model(tmp_path / "model", sources=SOURCES[:1]))
    assert card.data.eval_results is None and card.data.license == "llama2" and card.data.model_name == "model"
    assert numbers(card.text.replace("llama2", "").replace("4f2c", "")) == set()
    assert "## Hardware" not in card.text and "## Results\n\nNone." in card.text


def test_the_metadata_is_parsed_as_written(run, tmp_path):
    """By the library's reader: every metric of every row of the model, and of no other."""
    out = tmp_path / "card.md"
    words = ["card", str(run / "ot_att-distilled"), "--results", str(SEED0), "--name", "ours", "--out", str(out)]
    assert main(words) == 0
    read = ModelCard.load(out)
    rows = [row for row in load_results_of(SEED0) if (row.method, row.stage) == ("ot_att", "distilled")]
    expected = {
        (row.modality, row.split, metric): value
        for row in rows
        for metric, value in row.metrics.items()
        if value is not None
    }
    found = {
        (one.dataset_config, one.dataset_split, one.metric_type): one.metric_value for one in read.data.eval_results
    }
    assert found == expected and len(rows) == 4 and len(read.data.eval_results) == len(expected)
    assert {(one.dataset_type, one.dataset_args["clips"]) for one in read.data.eval_results} == {("avworld", 400)}
    assert read.data.model_name == "ours"
    again = ModelCard(str(read))
    assert again.data.to_dict() == read.data.to_dict()


def load_results_of(path: Path) -> list[Row]:
    return load_results(path).rows


def test_the_rows_that_evaluate_names_by_the_folder_are_taken(tmp_path):
    model = write_model(tmp_path / "mine")
    rows = [Row(name, "aligned", "audio", "test", 0, 3, {"cider_d": value}) for name, value in (("mine", 1), ("x", 2))]
    path, _ = write_results(Results("clotho", 2.0, {}, rows), tmp_path)
    card = model_card(model, [path])
    assert [(one.dataset_type, one.metric_value) for one in card.data.eval_results] == [("clotho", 1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: [run / "none"], "none: no such folder"),
        (lambda run: [write_model(run / "x", "align:mmd", "../gone", "a.b")], "gone"),
        (lambda run: [run / "prefix", run / "captioner"], "a second model"),
        (lambda run: [FULL / "lavcap.yaml"], "needs --out and --name"),
        (lambda run: [run / "captioner", "--results", SEED0], "no row of .*captioner.*give the folder of the stage"),
        (lambda run: [run / "prefix", "--results", run / "none.json"], "none.json: no such results file"),
        (lambda run: [run / "prefix", "--results", write(run / "r.json", "{")], "r.json: not a results file"),
        (
            lambda run: [run / "prefix", "--results", write(run / "r.json", '{"rows": [{"model": 1}]}')],
            "r.json: not a",
        ),
        (lambda run: [write(run / "prefix" / "config.json", "[]").parent], "config.json: not a JSON object"),
        (
            lambda run: [write(run / "prefix" / "README.md", "# Mine\n").parent],
            "README.md: not written by this command",
        ),
        (lambda run: [write(run / "r.yaml", "- a"), "--name", "r", "--out", run / "r.md"], "r.yaml: not a config"),
    ],
)
def test_wrong_input_is_told_in_one_line(make, message, run, capsys):
    words = [str(word) for word in make(run)]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["card", *words]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(message, error[0])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_the_own_card_is_replaced_and_another_with_force(run):
    readme = write(run / "prefix" / "README.md", "# Mine\n")
    assert main(["card", str(run / "prefix"), "--force"]) == 0
    first = readme.read_text()
    assert MARKER in first and first.startswith("---\n")
    assert main(["card", str(run / "prefix"), "--name", "renamed"]) == 0
    assert readme.read_text() == first.replace("\n# prefix", "\n# renamed").replace("name: prefix", "name: renamed")


def test_the_cards_of_the_repository_are_what_the_command_writes(run):
    """Write them again with `dali-llava card` if a configuration, a result or the template has changed."""
    for file in run.glob("ot_att-distilled/config.json"):
        file.write_text('{"sources": []}')
    for checkpoint in run.glob("*/checkpoint-*/*"):
        checkpoint.unlink()
    for folder in run.glob("*/checkpoint-*"):
        folder.rmdir()
    cards = {
        "avworld.md": model_card(run / "ot_att-distilled", [SEED0], "dali-avworld"),
        "dali-7b.md": recipe_card([FULL / f"{name}.yaml" for name in ("prefix_tune", "align", "distill")], "dali-7b"),
        "lavcap.md": recipe_card([FULL / "lavcap.yaml"], "lavcap"),
    }
    for name, card in cards.items():
        assert (ROOT / "model_cards" / name).read_text(encoding="utf-8").strip() == card.content.strip(), name


@pytest.mark.parametrize("name", ["dali-7b", "lavcap"])
def test_the_card_of_a_recipe_says_first_that_no_weights_exist(name):
    card = ModelCard.load(ROOT / "model_cards" / f"{name}.md")
    lines = [line for line in card.text.splitlines() if line and not line.startswith("<!--")]
    assert lines[0] == f"# {name}" and lines[1].startswith("**No weights exist for this recipe")
    assert card.data.eval_results is None and card.data.license is None
    configs = "".join(file.read_text() for file in FULL.glob("*.yaml"))
    assert unexplained(card.text.replace(f"# {name}", ""), configs) == set()
