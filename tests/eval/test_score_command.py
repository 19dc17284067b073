"""`dali-llava score`: output on stdout and in files, and one-line errors."""

import json

import pytest

from dali_llava.cli import main
from dali_llava.eval import caption_metrics


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Candidates, references and the path of the output, on a machine without Java."""
    monkeypatch.setattr(caption_metrics, "find_java", lambda java: None)
    monkeypatch.setattr(caption_metrics, "find_corenlp", lambda folder: None)
    monkeypatch.setattr(
        caption_metrics, "tokenize", lambda captions, java, real=caption_metrics.tokenize: real(captions, "python")
    )
    candidates, references = tmp_path / "candidates.csv", tmp_path / "references.jsonl"
    candidates.write_text("id,caption\nx,A dog barks at night.\ny,Rain falls on tin roofs.\n")
    references.write_text(
        '{"id": "x", "captions": ["a dog barks at night"]}\n{"id": "y", "caption": "rain falls on tin roofs"}\n'
    )
    return candidates, references, tmp_path / "new" / "scores.json"


def run(files, *options: str) -> int:
    candidates, references, out = map(str, files)
    return main(["score", "--candidates", candidates, "--references", references, "--out", out, *options])


def test_score(files, capsys):
    assert run(files) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(files[2].read_text())
    assert printed == {name: value for name, value in written.items() if name in printed}
    assert set(written) - set(printed) == {"references_digest", "clips", "statistics"}
    assert written["clips"]["id"] == ["x", "y"] and written["clips"]["rouge_l"] == [1.0, 1.0]
    assert printed["intervals"]["rouge_l"] == [1.0, 1.0]
    assert printed["metrics"]["rouge_l"] == 1.0 and printed["metrics"]["cider_d"] == pytest.approx(10.0)
    assert printed["metrics"]["meteor"] is None and "Java" in printed["reason"]["meteor"]
    assert (printed["n"], printed["missing"], printed["tokenizer"]) == (2, 0, "python")


def test_missing_candidate(files, capsys):
    files[1].write_text(files[1].read_text() + '{"id": "z", "caption": "wind"}\n')
    assert run(files) == 1
    error = capsys.readouterr().err
    assert "1 references without a candidate: z" in error and "--allow-missing" in error and error.count("\n") == 1
    assert str(files[0]) in error and not files[2].exists()
    assert run(files, "--allow-missing") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["missing"] == 1 and "1 of 3 clips" in captured.err


@pytest.mark.parametrize(
    ("index", "content", "message"),
    [(0, "id,text\nx,a\n", "line 1: no column caption"), (1, '{"id": "x"}', "line 1: no field caption")],
)
def test_bad_file(files, capsys, index, content, message):
    files[index].write_text(content)
    assert run(files) == 1
    error = capsys.readouterr().err
    assert str(files[index]) in error and message in error and error.count("\n") == 1


def test_audiocaps_own_list_is_scored(files, capsys):
    candidates, references = files[0], files[1].with_suffix(".csv")
    references.write_text("audiocap_id,youtube_id,start_time,caption\n1,x,30,a dog\n2,y,0,rain falls\n3,y,0,rain\n")
    files = (candidates, references, files[2])
    assert run(files) == 1
    error = capsys.readouterr().err
    assert "no id is in both, such as 'x' and 'x_30'" in error and "--id-column" in error and error.count("\n") == 1
    assert run(files, "--id-column", "youtube_id") == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2
    candidates.write_text("id,caption\nx_30,A dog barks at night.\ny_0,Rain falls on tin roofs.\n")
    assert run(files) == 0


def test_chosen_metrics(files, capsys):
    assert run(files, "--metrics", "vocabulary,cider_d") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == {"cider_d": pytest.approx(10.0), "vocabulary": 10}
    assert set(printed["intervals"]) == {"cider_d"}
    assert run(files, "--metrics", "spider,cider") == 1
    error = capsys.readouterr().err
    assert "unknown metric 'cider': choose from bleu_1, " in error and error.count("\n") == 1


def test_unusual_captions(files, capsys):
    """An empty caption, one of 10,000 words and one in another script have defined scores, each in its place."""
    captions = {"x": "", "y": "rain " * 10_000, "z": "犬が吠える — café 🐶"}
    files[0].write_text("\n".join(json.dumps({"id": i, "caption": text}) for i, text in captions.items()))
    references = {"z": "犬が吠える café 🐶", "y": "rain falls", "x": "a dog"}
    files[1].write_text("\n".join(json.dumps({"id": i, "caption": text}) for i, text in references.items()))
    assert run(files) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(files[2].read_text())
    scores = dict(zip(written["clips"]["id"], written["clips"]["rouge_l"], strict=True))
    assert scores["z"] == 1.0 and scores["x"] == 0.0
    # Precision 1 / 10000, recall 1 / 2.
    assert scores["y"] == pytest.approx(2.44 * 1e-4 * 0.5 / (0.5 + 1.44e-4), rel=1e-9)
    assert all(0 <= printed["metrics"][name] <= 10 for name in ("bleu_1", "bleu_4", "rouge_l", "cider_d"))


def test_one_clip(files, capsys):
    files[0].write_text("id,caption\nx,a dog barks\n")
    files[1].write_text("id,caption\nx,a dog barks\n")
    assert run(files) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["rouge_l"] == 1.0 and printed["intervals"] == {}
    assert printed["metrics"]["cider_d"] is None and "two clips" in printed["reason"]["cider_d"]


@pytest.mark.parametrize(
    ("index", "line", "message"),
    [
        (0, "x,again\n", "line 4: id 'x' appears twice; remove one"),
        (0, "z,wind\n", "1 candidates without a reference: z; remove them"),
    ],
)
def test_pairs_are_not_shifted(files, capsys, index, line, message):
    files[index].write_text(files[index].read_text() + line)
    assert run(files) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not files[2].exists()


def test_out_is_a_folder(files, capsys):
    files[2].mkdir(parents=True)
    assert run(files) == 1
    assert f"{files[2]}: is a folder" in capsys.readouterr().err


def test_help_and_usage(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["score", "--help"])
    assert leave.value.code == 0 and "dali-llava score --candidates captions.csv" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leave:
        main(["score"])
    assert leave.value.code == 2
