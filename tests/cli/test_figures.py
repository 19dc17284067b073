"""`dali-llava figures`: its errors, its figures, and the table of several runs."""

import pytest

from dali_llava.cli import figures, main
from dali_llava.eval.avworld.recordings import RECORDINGS_SPLIT
from dali_llava.eval.results import Results, Row, write_results


@pytest.fixture
def make_run(tmp_path):
    """`make_run(seed, method, split)` writes the folder of a finished run with one row and its checkpoint folders."""

    def make_run(seed: int, method: str = "ot_att", split: str = "test"):
        folder = tmp_path / f"run{seed}"
        for name in ("prefix", f"{method}-aligned"):
            (folder / name).mkdir(parents=True)
        row = Row(method, "aligned", "audio", split, seed, 400, {"cider_d": 1.0 + seed})
        write_results(Results("avworld", 60.0, {}, [row]), folder)
        return folder

    return make_run


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Record the figures instead of drawing them."""
    calls = []
    monkeypatch.setattr(figures, "draw_mean_tokens", lambda folder, methods: calls.append((folder, methods)))
    monkeypatch.setattr(figures, "draw_attention", lambda folder: calls.append((folder, "attention")))
    return calls


def test_runs_are_drawn_and_tabled(make_run, drawn, tmp_path, capsys):
    runs = [make_run(0), make_run(2)]
    assert main(["figures", *map(str, runs), "--out", str(tmp_path / "new" / "summary.md")]) == 0
    assert drawn == [call for run in runs for call in ((run, ["ot_att"]), (run, "attention"))]
    summary = (tmp_path / "new" / "summary.md").read_text()
    assert "| ot_att | aligned | audio | 2.000 ± 12.706 |" in summary and summary.strip() in capsys.readouterr().out


def test_one_run_without_attention_has_one_figure_and_no_table(make_run, drawn, capsys):
    run = make_run(0, method="mmd")
    assert main(["figures", str(run)]) == 0
    assert drawn == [(run, ["mmd"])] and "Results on" not in capsys.readouterr().out


def test_run_with_recordings_is_not_drawn_with_other_sounds(make_run, drawn, capsys):
    run = make_run(0, split=RECORDINGS_SPLIT)
    assert main(["figures", str(run)]) == 0
    assert drawn == [] and f"not drawn: {run}" in capsys.readouterr().out


def test_missing_run_checkpoint_or_seed_is_named_before_anything_is_drawn(make_run, drawn, tmp_path, capsys):
    run, other = make_run(0), make_run(1)
    (other / "prefix").rmdir()
    for words, message in (
        ([run, tmp_path / "nowhere"], "nowhere: no such results file"),
        ([run, other], f"{other / 'prefix'}: no such checkpoint"),
        ([run, run], "two runs have the same seed"),
    ):
        assert main(["figures", *map(str, words)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert drawn == []
