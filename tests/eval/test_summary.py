"""The table over seeds: means, intervals, counts of claims, and errors for runs that do not match."""

import math

import pytest

from dali_llava.eval.results import Claim, Results, Row
from dali_llava.eval.summary import interval, summary_markdown


def make_run(seed: int, cider: float, verdict: str = "holds", method: str = "mmd") -> Results:
    row = Row(method, "aligned", "audio", "test", seed, 400, {"cider_d": cider, "spice": None}, {"spice": "no Java"})
    return Results("avworld", 90.0, {}, [row], [Claim("it hears", verdict, f"{cider}")])


def test_interval_is_students():
    """The values 1, 2, 3 have mean 2 and deviation 1; t(0.975, 2) = 4.3027, divided by the square root of 3."""
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert math.isnan(interval([1.0])[1])


def test_the_page_holds_means_intervals_and_verdicts():
    page = summary_markdown([make_run(0, 1.0), make_run(1, 2.0), make_run(2, 3.0, "fails")])
    assert "## test\n\n| method | stage | modality | cider_d |\n" in page
    assert "| mmd | aligned | audio | 2.000 ± 2.484 |" in page
    assert "spice" not in page and "Seeds 0, 1, 2" in page and "1.5, 1.5, 1.5 minutes" in page
    assert "| it hears | 2 of 3 | 1.0; 2.0; 3.0 |" in page


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no runs"),
        ([make_run(0, 1.0), make_run(0, 1.0)], "same seed"),
        (
            [make_run(0, 1.0), make_run(1, 1.0, method="ot")],
            "run 2 has different systems from the first",
        ),
    ],
)
def test_runs_that_make_no_sample_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        summary_markdown(runs)
