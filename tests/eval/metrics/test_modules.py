"""All metrics load from their files with `evaluate.load`, without a network, and compute scores."""

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import evaluate
import pytest


METRICS = Path(__file__).parents[3] / "eval" / "metrics"
PREDICTIONS = ["A dog barks at night.", "Rain falls on tin roofs."]
REFERENCES = [["a dog barks at night", "a cat"], ["rain falls on tin roofs"]]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a metric with an empty cache, from a working folder outside the repository."""
    monkeypatch.chdir(tmp_path)

    def load(name: str) -> evaluate.Metric:
        return evaluate.load(str(METRICS / f"{name}.py"), cache_dir=str(tmp_path))

    return load


def test_bleu(load):
    scores = load("bleu").compute(predictions=PREDICTIONS, references=REFERENCES, tokenizer="python")
    assert scores.pop("tokenizer") == "python"
    assert scores == pytest.approx({f"bleu_{n}": 1.0 for n in range(1, 5)}, abs=1e-8)


def test_rouge_l(load):
    scores = load("rouge_l").compute(predictions=PREDICTIONS, references=REFERENCES, tokenizer="python")
    assert scores == {"rouge_l": 1.0, "tokenizer": "python"}


def test_cider_d(load):
    # The second reference of the first clip has no words in common with the caption.
    scores = load("cider_d").compute(predictions=PREDICTIONS, references=REFERENCES, tokenizer="python")
    assert scores["cider_d"] == pytest.approx((10 / 2 + 10) / 2, abs=0.2)


@pytest.mark.skipif(shutil.which("java") is None, reason="PTB needs Java on the PATH")
def test_auto_means_ptb_where_java_is(load):
    assert load("rouge_l").compute(predictions=["It isn't."], references=[["it is n't"]]) == {
        "rouge_l": 1.0,
        "tokenizer": "ptb",
    }


def test_meteor(load, meteor, monkeypatch):
    metric = load("meteor")
    # The loaded copy would start another Java process, which takes seconds; test_meteor_alone does this.
    monkeypatch.setattr(sys.modules[type(metric).__module__], "MeteorScorer", lambda: nullcontext(meteor))
    scores = metric.compute(predictions=PREDICTIONS, references=REFERENCES, tokenizer="python")
    assert scores == {"meteor": 1.0, "tokenizer": "python"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java on the PATH")
def test_meteor_alone(load):
    assert load("meteor").compute(predictions=PREDICTIONS, references=REFERENCES) == {
        "meteor": 1.0,
        "tokenizer": "ptb",
    }


@pytest.mark.parametrize("name", ["sound_recall", "seen_recall"])
def test_recall(load, name):
    sources = [[["dog", "puppy"], ["church bell"]], [["rain"]]]
    assert load(name).compute(predictions=PREDICTIONS, references=sources) == {name: 2 / 3}
    assert load(name).compute(predictions=PREDICTIONS, references=[[], [["rain"]]]) == {name: 1.0}


def test_visual_bias(load):
    scores = load("visual_bias").compute(predictions=PREDICTIONS, visual_words=["night", "red"])
    assert scores == {"visual_bias": 0.5}


@pytest.mark.parametrize("path", sorted(METRICS.glob("*.py")), ids=lambda path: path.name)
def test_one_import_a_line(path):
    # `evaluate` parses imports line by line, and reports the other lines of a bracketed list as missing packages.
    lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in lines if line.endswith("(") or (line.startswith("import ") and "," in line)]
