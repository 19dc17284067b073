"""`dali-llava compare`, and the files of scores that it takes."""

import json

import numpy as np
import pytest

from dali_llava.cli import main
from dali_llava.eval.bootstrap import paired_test
from dali_llava.eval.caption_metrics import score_captions
from dali_llava.eval.score_files import read_scores, score_record, write_scores


REFERENCES = {
    "x": ["a dog barks at night", "a dog is barking"],
    "y": ["rain falls on tin roofs"],
    "z": ["two men talk and laugh", "men are talking"],
    "w": ["a siren wails", "a siren is wailing far away"],
}
GOOD = {"x": "a dog barks at night", "y": "rain falls on roofs", "z": "two men talk", "w": "a siren is wailing"}
BAD = {"x": "a cat", "y": "rain falls hard on roofs", "z": "two men sing", "w": "a bell wails"}


@pytest.fixture(scope="module")
def scored():
    metrics = ("bleu_4", "rouge_l", "cider_d", "vocabulary")
    return {
        name: score_captions(captions, REFERENCES, java=None, metrics=metrics)
        for name, captions in (("good", GOOD), ("bad", BAD))
    }


@pytest.fixture
def files(tmp_path, scored):
    """Files of scores of both systems, the second with its clips in another order."""
    good = score_record(scored["good"], REFERENCES, "python")
    write_scores(tmp_path / "good.json", good)
    turned = dict(reversed(REFERENCES.items()))
    captions = {i: BAD[i] for i in turned}
    bad = score_captions(captions, turned, java=None, metrics=("cider_d", "bleu_4", "rouge_l"))
    write_scores(tmp_path / "bad.json", score_record(bad, turned, "python"))
    return tmp_path / "good.json", tmp_path / "bad.json"


def test_scores_are_read_as_written(files, scored):
    read = read_scores(files[0])
    assert read.ids == list(REFERENCES) and read.tokenizer == "python"
    assert set(read.clips) == {"bleu_4", "rouge_l", "cider_d"}
    for name, scores in read.clips.items():
        assert scores.reduction == scored["good"].clips[name].reduction
        np.testing.assert_array_equal(scores.statistics, scored["good"].clips[name].statistics)
    content = json.loads(files[0].read_text())
    assert content["metrics"] == scored["good"].metrics and content["metrics"]["vocabulary"] == 15
    assert list(content["statistics"]) == ["bleu_4"] and len(content["clips"]["bleu_4"]) == 4


def test_clips_are_paired_by_id(files, scored, capsys):
    out = files[0].parent / "new" / "comparison.json"
    assert main(["compare", *map(str, files), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["n"] == 4 and set(written["metrics"]) == {"bleu_4", "rouge_l", "cider_d"}
    for name, found in written["metrics"].items():
        expected = paired_test(scored["good"].clips[name], scored["bad"].clips[name])
        assert found["difference"] == pytest.approx(expected.difference, rel=1e-12)
        assert found["effect_size"] == pytest.approx(expected.effect_size, rel=1e-9)
        assert found["p_value"] == expected.p_value
    printed = capsys.readouterr().out
    assert "4 clips" in printed and f"{written['metrics']['rouge_l']['difference']:+.4f}" in printed


def change(path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["clips"]["id"].__setitem__(0, "v"), "different clips: 1 only in {0}, such as 'w'; 1 only in {1}"),
        (lambda c: c["clips"]["id"].__setitem__(0, "x"), "{1}: not a file of scores (an id appears twice)"),
        (lambda c: c["clips"]["rouge_l"].pop(), "{1}: not a file of scores (3 scores of rouge_l for 4 clips)"),
        (lambda c: c["clips"]["rouge_l"].__setitem__(0, None), "{1}: not a file of scores (the score of caption 0"),
        (lambda c: c["statistics"]["bleu_4"].update(reduction="sum"), "{1}: not a file of scores (unknown reduction"),
        (lambda c: c.update(tokenizer="ptb"), "different tokenizers (python, ptb)"),
        (lambda c: c.update(references_digest="0"), "different references"),
        (lambda c: c.update(clips={"id": c["clips"]["id"]}), "no metric in common"),
        (lambda c: c.pop("clips"), "{1}: no scores of clips, 'clips' is missing; give a file of `dali-llava score`"),
    ],
)
def test_files_that_cannot_be_compared(files, capsys, edit, message):
    change(files[1], edit)
    assert main(["compare", *map(str, files)]) == 1
    error = capsys.readouterr().err
    assert message.format(*files) in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[1]", '{"clips": 3}', '{"rows": [], "claims": []}', "a,b\n1,2\n"])
def test_other_files(files, capsys, content):
    files[0].write_text(content)
    assert main(["compare", *map(str, files)]) == 1
    error = capsys.readouterr().err
    assert str(files[0]) in error and "dali-llava score" in error and error.count("\n") == 1


def test_missing_file_and_folder(files, capsys):
    assert main(["compare", str(files[0]), str(files[0].parent / "c.json")]) == 1
    assert "c.json: no such file" in capsys.readouterr().err
    assert main(["compare", *map(str, files), "--out", str(files[0].parent)]) == 1
    assert "is a folder; give --out a file name" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["compare", "--help"])
    assert leave.value.code == 0 and "dali-llava compare ours.json baseline.json" in capsys.readouterr().out
