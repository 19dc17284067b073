"""results.json and results.md: the schema, and errors for wrong or incomplete content."""

import io
import json
import os

import pytest
from rich.console import Console

from dali_llava.eval.results import METRICS, Claim, Results, Row, load_results, print_results, versions, write_results


def make_results() -> Results:
    row = Row(
        method="mmd",
        stage="aligned",
        modality="audio",
        split="test",
        seed=0,
        n=400,
        metrics={"bleu_1": 0.5, "cider_d": 1.25, "spice": None, "sound_recall": 0.75},
        reason={"spice": "needs CoreNLP"},
    )
    claim = Claim("image captions unchanged", "holds", "400/400 identical | all")
    return Results("avworld", 212.44, {"python": "3.12.1", "cpus": 2}, [row], [claim])


def test_schema(tmp_path):
    path, page = write_results(make_results(), tmp_path / "run")
    content = json.loads(path.read_text())
    assert (path.name, page.name) == ("results.json", "results.md")
    assert list(content) == ["dataset", "seconds", "versions", "rows", "claims"]
    row = content["rows"][0]
    assert list(row) == ["method", "stage", "modality", "split", "seed", "n", "metrics", "reason", "intervals"]
    assert list(row["metrics"]) == [
        "bleu_1", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider", "spider_fl", "fense", "sbert_sim",
        "vocabulary", "sound_recall", "sound_precision", "sound_f1", "seen_recall", "visual_bias",
    ]  # fmt: skip
    assert {name for name, value in row["metrics"].items() if value is None} == set(row["reason"])
    assert row["reason"]["spice"] == "needs CoreNLP" and "not measured" in row["reason"]["meteor"]
    assert content["seconds"] == 212.4 and content["claims"][0]["verdict"] == "holds"


def test_round_trip(tmp_path):
    write_results(make_results(), tmp_path)
    loaded = load_results(tmp_path)
    assert loaded == load_results(tmp_path / "results.json")
    assert (loaded.rows, loaded.claims) == (make_results().rows, make_results().claims)


def test_markdown(tmp_path):
    _, page = write_results(make_results(), tmp_path)
    lines = page.read_text().splitlines()
    assert "| method | stage | modality | split | seed | n | bleu_1 | cider_d | sound_recall |" in lines
    assert "| mmd | aligned | audio | test | 0 | 400 | 0.500 | 1.250 | 0.750 |" in lines
    assert "- spice: needs CoreNLP" in lines
    assert r"| image captions unchanged | holds | 400/400 identical \| all |" in lines


def test_printed_table():
    stream = io.StringIO()
    print_results(make_results(), Console(file=stream, width=140))
    text = stream.getvalue()
    assert all(
        part in text for part in ("mmd", "1.250", "0.750", "needs CoreNLP", "image captions unchanged", "holds")
    )


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, _ = write_results(make_results(), tmp_path)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(Results("other", 1.0, {}), tmp_path)
    assert path.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "results.md"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "trained"}, "unknown stage 'trained': choose from prompt"),
        ({"modality": "video"}, "unknown modality 'video'"),
        ({"metrics": {"cider": 1.0}}, "unknown metric 'cider'"),
        ({"metrics": {"cider_d": float("nan")}}, "cider_d of mmd is nan"),
        ({"metrics": {"meteor": None}}, "meteor of mmd is None without a reason"),
    ],
)
def test_bad_rows(change, message):
    fields = dict(method="mmd", stage="aligned", modality="audio", split="test", seed=0, n=1, metrics={})
    with pytest.raises(ValueError, match=message):
        Row(**fields | change)


def test_bad_verdict():
    with pytest.raises(ValueError, match="unknown verdict 'yes'"):
        Claim("c", "yes", "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a results file"), ("[]", "not a results file"), ('{"dataset": "x"}', "'rows' is missing")],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match="no such results file"):
        load_results(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_results(tmp_path)
    assert str(path) in str(error.value)


def test_versions():
    found = versions()
    assert {"python", "torch", "transformers", "datasets", "torchaudio", "platform", "cpus"} <= set(found)
    assert found["cpus"] >= 1
    assert len(METRICS) == 16
