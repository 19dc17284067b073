"""The leaderboard: the page, its figures, and wrong files."""

import json
import re
from pathlib import Path

import pytest

from dali_llava.eval.avworld.ablation import ablation_tables
from dali_llava.eval.leaderboard import PUBLISHED, leaderboard_markdown, main, read_rows
from dali_llava.eval.results import Row


ROOT = Path(__file__).parents[2]
DATA = sorted((ROOT / "docs" / "data").glob("*.json"))


def table_rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", page, re.M)]


def test_the_page_is_what_the_module_writes(tmp_path):
    """Write it again as the docstring of the module says if results or published figures have changed."""
    main([*map(str, DATA), "--out", str(tmp_path / "page.md")])
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert written == (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")


def test_our_figures_are_means_over_the_seeds_and_theirs_are_as_published():
    values = (1.0, 2.0, 3.0)  # Student's t: half of the interval is 4.303 / sqrt(3)
    rows = [Row("mmd", "aligned", "audio", "test", seed, 4, {"cider_d": one}) for seed, one in enumerate(values)]
    found = table_rows(leaderboard_markdown(rows))
    (row,) = (cells for cells in found if "2.000 ± 2.484" in cells)
    assert row == [
        *("[MMD](https://arxiv.org/abs/2410.05997)", "aligned", "audio", "-", "2.000 ± 2.484"),
        *("0.133", "0.3018", "0.1976", "0.0794", "0.1385"),
    ]
    assert sum(any("±" in cell for cell in cells) for cells in found) == 1


def test_every_published_row_has_a_source_and_every_row_of_ours_is_measured():
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    measured = {(row.method, row.stage, row.modality, row.split) for path in DATA for row in read_rows(path)}
    for table in published["tables"]:
        for row in table["rows"]:
            assert published["sources"][row["source"]]["url"].startswith("https://arxiv.org/abs/")
            assert all(0 < value < 1 for value in row["metrics"].values())
            assert "ours" not in row or (*row["ours"], table["split"]) in measured


def test_spider_is_the_mean_of_cider_and_spice():
    """In all published rows, to the rounding of their digits."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    found = [row["metrics"] for table in published["tables"] for row in table["rows"]]
    whole = [each for each in found if {"cider", "spice", "spider"} <= each.keys()]
    assert len(whole) == 27
    for each in whole:
        assert each["spider"] == pytest.approx((each["cider"] + each["spice"]) / 2, abs=2e-3), each


def test_the_figures_of_lavcap_are_those_of_its_ablations():
    lines = {
        line.row: line.published for table in ablation_tables() for line in table.lines if table.name in ("II", "III")
    }
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"][-1]["rows"]
    ours = {row["ours"][0]: row["metrics"] for row in published if "ours" in row}
    assert ours == {
        name: {key.replace("cider_d", "cider"): value for key, value in each.items()} for name, each in lines.items()
    }


def test_a_file_without_rows_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [{"method": "x"}]}')
    with pytest.raises(ValueError, match="a.json: no rows of results"):
        main([str(tmp_path / "a.json"), "--out", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()
