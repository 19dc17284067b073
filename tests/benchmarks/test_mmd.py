"""Tests of the MMD benchmark: its requirements, and the agreement of its loop with MMDLoss."""

import pytest


@pytest.fixture
def mmd(benchmarks):
    import mmd

    return mmd


def case(times_faster, memory_share):
    return {
        "batch": 8,
        "figures": {"MMDLoss": {"times_faster": {"median": times_faster}}},
        "memory_share": memory_share,
    }


def test_requirements_of_the_cpu_and_of_the_caller(mmd):
    cases = [case(4.0, 0.2)]
    assert [entry["met"] for entry in mmd.requirements(cases)] == [True, True]
    assert [entry["met"] for entry in mmd.requirements(cases, 5.0, 0.1)] == [False, False]
    assert [entry["met"] for entry in mmd.requirements([case(5.0, 0.1)], 5.0, 0.1)] == [True, True]


def test_loss_and_loops_agree(mmd):
    errors = mmd.agreement(mmd.make_tokens(2, (8, 9, 4), "cpu"))
    assert set(errors) == {"loop", "MMDLoss"}
    for own in errors.values():
        assert own["value_relative_error"] < 1e-5 and own["gradient_relative_error"] < 1e-5


def test_a_row_has_all_columns(mmd):
    spread = {"min": 1.0, "median": 2.0, "max": 3.0}
    own = {"seconds": spread, "times_faster": spread, "peak_bytes": 3 * 2**20}
    own |= {"value_relative_error": 1e-7, "gradient_relative_error": 2e-7}
    row = ["8", "loop", "1 / 2 / 3", "1 / 2 / 3", "3", "1.0e-07", "2.0e-07"]
    assert mmd.table_rows([{"batch": 8, "figures": {"loop": own}}]) == [row]
    assert len(row) == len(mmd.COLUMNS)
