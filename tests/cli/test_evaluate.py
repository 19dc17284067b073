"""`dali-llava evaluate` on corpora on disk: scores, and early errors for clips that cannot be scored."""

import json
from pathlib import Path

import pytest

from dali_llava.cli import main
from dali_llava.eval.score_files import compare_systems, read_scores
from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.rows import open_frames
from dali_llava.processing.shards import prepare_shards


CLIPS = 4


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four clips of AVWorld as files, with a table of captions."""
    media = tmp_path / "clips"
    media.mkdir()
    lines = []
    for row in load_corpus("avworld", "test", sizes={"test": CLIPS}):
        (media / f"{row['id']}.flac").write_bytes(row["audio"]["bytes"])
        open_frames(row, [0])[0].save(media / f"{row['id']}.png")
        lines.append(json.dumps({"id": row["id"], "captions": row["captions"]}))
    (media / "metadata.jsonl").write_text("\n".join(lines))
    return media


@pytest.fixture
def evaluate(tiny_model_dir, tmp_path, capsys):
    """Run `evaluate(*words)`; return the exit code, the rows of the results by modality, and stderr."""

    def run(*words: str | Path) -> tuple[int, dict, str]:
        out = tmp_path / "out" / "results.json"
        words = ["evaluate", str(tiny_model_dir), "--out", str(out), "--dataset", *map(str, words)]
        code = main([*words, "--max-new-tokens", "6", "--device", "cpu"])
        rows = json.loads(out.read_text())["rows"] if out.is_file() else []
        return code, {row["modality"]: row for row in rows}, capsys.readouterr().err

    return run


def test_a_folder_and_its_shards_are_captioned_and_scored(evaluate, folder, tmp_path):
    code, rows, _ = evaluate("folder", "--data-dir", folder, "--modality", "audio", "image", "audiovisual")
    assert code == 0 and set(rows) == {"audio", "image", "audiovisual"}
    for row in rows.values():
        assert (row["n"], row["split"]) == (CLIPS, "train")
        assert 0 <= row["metrics"]["bleu_1"] <= 1 and row["metrics"].get("sound_recall") is None
    captions = sorted((tmp_path / "out" / "results.captions").iterdir())
    assert [path.name for path in captions] == [
        f"train-model-aligned-{name}.{suffix}"
        for name in ("audio", "audiovisual", "image")
        for suffix in ("jsonl", "scores.json")
    ]
    systems = [read_scores(captions[index]) for index in (1, 3)]
    assert systems[0].clips["bleu_1"].corpus == rows["audio"]["metrics"]["bleu_1"]
    assert compare_systems(*systems)["bleu_1"].a == rows["audio"]["metrics"]["bleu_1"]
    assert len(captions[0].read_text().splitlines()) == CLIPS

    prepare_shards(load_corpus("folder", "train", data_dir=str(folder)), tmp_path / "shards", num_proc=1)
    code, found, _ = evaluate(tmp_path / "shards", "--modality", "audio")
    assert code == 0 and found["audio"]["metrics"] == rows["audio"]["metrics"]


def test_options_reach_the_corpus(evaluate):
    code, rows, _ = evaluate("avworld", "--sizes", '{"test": 3}', "--modality", "audio")
    assert code == 0 and rows["audio"]["n"] == 3 and rows["audio"]["split"] == "test"
    row = rows["audio"]
    assert 0 <= row["metrics"]["sound_recall"] <= 1
    low, high = row["intervals"]["sound_recall"]
    assert low <= row["metrics"]["sound_recall"] <= high and "sound_f1" in row["intervals"]


def test_a_broken_clip_is_told_and_the_others_are_scored(evaluate, folder):
    broken = folder / "test-000002.flac"
    broken.write_bytes(broken.read_bytes()[:100])
    code, rows, error = evaluate("folder", "--data-dir", folder, "--modality", "audio")
    assert code == 1 and rows["audio"]["n"] == CLIPS - 1
    assert "test-000002: clip 'test-000002': " in error


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (
            lambda folder: (folder / "metadata.jsonl").unlink(),
            [],
            "4 of 4 clips have no captions to score with, the first 'test-000000'; use a split with captions",
        ),
        (
            lambda folder: (folder / "test-000001.png").unlink(),
            [],
            "folder: 1 of 4 clips have no pictures, the first 'test-000001'; use --modality audio",
        ),
        (lambda folder: None, ["--split", "dev"], "corpus 'folder' has no split 'dev'"),
    ],
)
def test_what_cannot_be_scored_is_told_before_a_model_is_loaded(evaluate, folder, change, words, message, monkeypatch):
    monkeypatch.setattr("dali_llava.cli.evaluate.load_captioner", None)
    change(folder)
    code, rows, error = evaluate("folder", "--data-dir", folder, *words)
    assert code == 1 and rows == {} and message in error


def test_a_folder_without_shards(evaluate, tmp_path):
    code, _, error = evaluate(f"{tmp_path}/nowhere")
    assert (
        code == 1 and f"{tmp_path}/nowhere/index.json: no such file, so {tmp_path}/nowhere contains no shards" in error
    )
