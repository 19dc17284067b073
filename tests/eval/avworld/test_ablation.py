"""The ablations of LAVCap: their published figures, paired differences, and results that are kept."""

import json
import math

import pytest
from scipy.stats import t

from dali_llava.eval.avworld.ablation import (
    ablation_rows,
    ablation_tables,
    measure,
    read_row,
    tables_as_json,
    to_markdown,
    write_ablation,
    write_row,
)
from dali_llava.eval.results import Row


def make_row(name: str, seed: int, cider: float) -> Row:
    modality = "audio" if name == "audio" else "audiovisual"
    return Row(name, "supervised", modality, "test", seed, 400, {"cider_d": cider, "meteor": cider / 10})


@pytest.fixture
def results() -> list[Row]:
    """Two rows of table II whose seeds differ more than the rows do."""
    figures = {"concatenation": (1.0, 2.0, 3.0), "concatenation_loss": (1.1, 2.2, 3.3)}
    return [make_row(name, seed, value) for name, values in figures.items() for seed, value in enumerate(values)]


def test_published_figures_are_the_papers():
    tables = {table.name: [list(line.published.values()) for line in table.lines] for table in ablation_tables()}
    best = [0.262, 0.849, 0.185, 0.517]
    assert tables["II"] == [[0.246, 0.779, 0.174, 0.476], [0.254, 0.781, 0.188, 0.485], [0.263, 0.831, 0.189, 0.510]]
    assert tables["III"] == [
        [0.244, 0.770, 0.180, 0.475],
        [0.249, 0.767, 0.184, 0.475],
        [0.248, 0.801, 0.179, 0.490],
        best,
    ]
    assert tables["IV"] == [
        [0.253, 0.777, 0.173, 0.475],
        [0.244, 0.735, 0.173, 0.454],
        [0.255, 0.789, 0.181, 0.485],
        best,
    ]
    assert tables["VI"] == [best, [0.258, 0.825, 0.190, 0.508], [0.259, 0.818, 0.191, 0.505]]


def test_every_row_is_in_a_table_and_the_other_way_round():
    tables = ablation_tables()
    assert {line.row for table in tables for line in table.lines} == set(ablation_rows())
    assert all(table.baseline in [line.row for line in table.lines] for table in tables)


def test_differences_are_paired_by_seed(results):
    baseline, better = measure(ablation_tables()[0], results)
    assert (baseline.line.row, better.line.row) == ("concatenation", "concatenation_loss")
    assert baseline.differences == {} and better.seeds == [0, 1, 2]
    mean, half = better.differences["cider_d"]
    # of 0.1, 0.2 and 0.3, with a standard deviation of 0.1
    assert mean == pytest.approx(0.2) and half == pytest.approx(t.ppf(0.975, 2) * 0.1 / math.sqrt(3))
    mean, half = better.metrics["cider_d"]
    assert mean == pytest.approx(2.2) and half == pytest.approx(t.ppf(0.975, 2) * 1.1 / math.sqrt(3))


def test_seeds_of_one_row_alone_are_left_out_of_the_differences(results):
    _, better = measure(
        ablation_tables()[0], [row for row in results if (row.method, row.seed) != ("concatenation", 2)]
    )
    assert better.differences["cider_d"][0] == pytest.approx(0.15)
    assert better.metrics["cider_d"][0] == pytest.approx(2.2)


def test_tables_show_what_has_results(results):
    text = to_markdown(results, "test")
    assert "## Table II: visual modality and OT loss" in text and "Table III" not in text
    line = next(line for line in text.splitlines() if line.startswith("| audio, visual, OT loss"))
    assert "| 0.263 | 0.831 | 0.189 | 0.510 | 0.220 ± " in line and "| +0.200 ± 0.248 |" in line
    assert next(line for line in text.splitlines() if line.startswith("| audio, visual |")).endswith("| baseline |")
    assert "+0.100 |" in to_markdown([row for row in results if row.seed == 0], "test")  # no interval of one seed


def test_written_tables(results, tmp_path):
    data, page = write_ablation(tmp_path / "out", results, "test", 12.34)
    content = json.loads(data.read_text())
    assert (content["split"], content["seconds"], len(content["rows"])) == ("test", 12.3, 6)
    assert content["tables"] == json.loads(json.dumps(tables_as_json(results)))
    line = content["tables"][0]["lines"][1]
    assert line["row"] == "concatenation_loss" and line["published"]["spider"] == 0.51
    assert line["differences"]["cider_d"]["mean"] == pytest.approx(0.2)
    assert page.read_text() == to_markdown(results, "test")
    single = tables_as_json([make_row("audio", 0, 1.0)])[0]["lines"][0]
    assert single["measured"]["cider_d"] == {"mean": 1.0, "half_interval": None}


def test_a_finished_row_is_read_again(results, tmp_path):
    path = tmp_path / "seed0" / "concatenation-test.json"
    assert read_row(path, {"ot_weight": 0}) is None
    write_row(path, results[0], {"ot_weight": 0})
    assert read_row(path, {"ot_weight": 0}) == results[0]


def test_rows_of_other_arguments_and_damaged_rows(results, tmp_path):
    path = tmp_path / "row.json"
    write_row(path, results[0], {"ot_weight": 0})
    with pytest.raises(ValueError, match=r"row\.json: the row was trained with other arguments; delete it"):
        read_row(path, {"ot_weight": 1})
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"row\.json: not the result of a row"):
        read_row(path, {"ot_weight": 0})
