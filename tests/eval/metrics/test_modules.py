"""All metrics load from their files with `evaluate.load`, without a network, and compute scores."""

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import evaluate
import numpy as np
import pytest

from dali_llava.eval.metrics import sentence_models
from dali_llava.eval.metrics.clip_scores import ClipScores


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


def test_scores_of_captions(load):
    metric = load("rouge_l")
    pair = {"predictions": PREDICTIONS, "references": [["a dog barks at night"], ["rain"]], "tokenizer": "python"}
    scores = metric.compute(**pair, per_caption=True)
    # Precision 1 / 5 and recall 1 of the second caption.
    second = (1 + 1.44) * (1 / 5) / (1 + 1.44 / 5)
    assert scores["rouge_l_per_caption"] == pytest.approx([1.0, second], rel=1e-12)
    assert scores["rouge_l"] == pytest.approx((1 + second) / 2, rel=1e-12)


def test_vocabulary(load):
    scores = load("vocabulary").compute(predictions=["A dog barks.", "a dog, a cat"], tokenizer="python")
    assert scores == {"vocabulary": 4, "tokenizer": "python"}


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Replace SPICE, the fluency detector and the sentence encoder in a loaded module."""

    class Encoder:
        def __init__(self, name):
            assert name == "minilm"

        def similarity(self, predictions, references):
            assert predictions == PREDICTIONS  # as written, not tokenized
            return ClipScores.mean([0.5, 1.0])

    class Detector:
        def __init__(self, name):
            assert name == "detector"

        def errors(self, predictions):
            assert predictions == PREDICTIONS
            return np.array([0.0, 1.0])

    def replace(metric):
        module = sys.modules[type(metric).__module__]
        monkeypatch.setattr(sentence_models, "SentenceEncoder", Encoder)
        monkeypatch.setattr(sentence_models, "FluencyDetector", Detector)
        for name, value in {
            "SentenceEncoder": Encoder,
            "FluencyDetector": Detector,
            "spice": lambda predictions, references, java, corenlp: ClipScores.mean([1.0, 0.5]),
            "require_programs": lambda java, corenlp: (java, corenlp),
            "find_corenlp": lambda folder: tmp_path,
        }.items():
            monkeypatch.setattr(module, name, value, raising=False)
        return metric

    return replace


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("spice", {}, 0.75),
        ("spider", {}, (10 + 1 + 10 + 0.5) / 4),
        ("spider_fl", {"fluency_model": "detector"}, (10 + 1 + 0.1 * (10 + 0.5)) / 4),
        ("sbert_sim", {"sentence_model": "minilm"}, 0.75),
        ("fense", {"sentence_model": "minilm", "fluency_model": "detector"}, (0.5 + 0.1) / 2),
    ],
)
def test_metrics_of_other_programs(load, stand_ins, name, options, expected):
    references = [[caption.lower().strip(".")] for caption in PREDICTIONS]
    metric = stand_ins(load(name))
    scores = metric.compute(predictions=PREDICTIONS, references=references, tokenizer="python", **options)
    assert scores[name] == pytest.approx(expected, rel=1e-9)


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
