"""Tests of the transport benchmark on tiny problems: its measurements and its requirements on the solvers."""

import argparse
import json

import pytest


@pytest.fixture
def transport(benchmarks):
    import transport

    return transport


def case(family="uniform", **figures):
    """A case that meets all requirements, except for the given figures, such as exact={"cost_difference": 1.0}."""
    good = {
        "times_faster": {"median": 2.0},
        "cost_difference": 1e-12,
        "gradient_difference": 1e-7,
        "gap_over_cost": 0.0,
    }
    return {"family": family, "batch": 8, "figures": {name: good | own for name, own in figures.items()}}


def missed(musts):
    return [entry["what"] for entry in musts if not entry["met"]]


def test_every_exact_solver_is_held_to_its_proof(transport):
    for solver in ("exact", "certified", "auto"):
        assert missed(transport.requirements([case(**{solver: {}})])) == []
        for family in ("uniform", "duplicate"):
            bad = {"gap_over_cost": 2e-9, "cost_difference": 2e-9}
            where = f"{solver}, {family}, B = 8"
            expected = [f"{where}, gap over cost", f"{where}, cost difference"]
            assert missed(transport.requirements([case(family, **{solver: bad})])) == expected


def test_only_named_solvers_are_held_to_a_speed(transport):
    slow = {"times_faster": {"median": 1.7}}
    cases = [case(exact=slow, certified=slow, auto=slow)]
    assert missed(transport.requirements(cases)) == [
        f"{name}, uniform, B = 8, times faster" for name in ("exact", "auto")
    ]
    on_a_gpu = transport.requirements(cases, {"certified": 20.0})
    assert missed(on_a_gpu) == ["certified, uniform, B = 8, times faster"]
    assert [entry["at_least"] for entry in on_a_gpu if "at_least" in entry] == [20.0]


def test_where_plans_tie_gradients_may_differ(transport):
    bad = {"gradient_difference": 0.5}
    assert missed(transport.requirements([case("lowrank", exact=bad)])) == [
        "exact, lowrank, B = 8, gradient difference"
    ]
    assert missed(transport.requirements([case("duplicate", exact=bad)])) == []


def test_loop_and_sinkhorn_are_held_to_nothing(transport):
    bad = {"times_faster": {"median": 0.1}, "cost_difference": 1.0, "gap_over_cost": 1.0}
    assert transport.requirements([case(**{transport.LOOP: bad, "sinkhorn": bad})]) == []


def test_solvers_on_offer(transport, capsys):
    words = ["exact", "certified", "sinkhorn", "auto"]
    assert transport.parse_arguments(["--solvers", *words]).solvers == words
    with pytest.raises(SystemExit) as ended:
        transport.parse_arguments(["--solvers", "partial"])
    assert ended.value.code == 2 and "partial" in capsys.readouterr().err


def test_auto_says_what_it_picked(transport):
    arguments = argparse.Namespace(shape=[8, 9, 4], repeats=1, device="cpu")
    found = transport.measure_case("uniform", 2, ["auto", "certified"], arguments)
    assert found["figures"]["auto"]["solver"] == "exact"
    assert [row[2] for row in transport.table_rows([found])] == ["POT loop", "auto (exact)", "certified"]
    assert {len(row) for row in transport.table_rows([found])} == {len(transport.COLUMNS)}
    slow = [name for name in missed(transport.requirements([found])) if not name.endswith("times faster")]
    assert slow == []
    json.dumps(found, allow_nan=False)
