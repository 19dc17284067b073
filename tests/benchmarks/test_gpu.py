"""Tests of the GPU benchmark on a CPU, with few tokens and a simulated clock."""

import itertools
import json
from functools import partial

import pytest
import torch

from dali_llava.train.transport import certified, solve


TINY = ["--device", "cpu", "--batch", "2", "--shape", "16", "9", "8", "--repeats", "1"]


@pytest.fixture
def gpu(benchmarks):
    import gpu

    return gpu


def test_the_default_is_the_full_size(gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = gpu.parse_arguments([])
    assert (arguments.batch, arguments.shape) == (256, [512, 576, 1024])
    assert (arguments.device, arguments.parts) == ("cuda", ["transport", "mmd"])
    assert arguments.output.name == "gpu.json" and gpu.at_full_size(arguments)
    assert not gpu.at_full_size(gpu.parse_arguments(["--batch", "255"]))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--device cuda: torch finds no GPU"),
        (["--device", "cpu", "--batch", "0"], "argument --batch: must be at least 1, not 0"),
        (["--device", "cpu", "--repeats", "0"], "argument --repeats: must be at least 1, not 0"),
        (["--device", "cpu", "--parts", "forward"], "argument --parts: invalid choice"),
    ],
)
def test_usage_errors(gpu, monkeypatch, capsys, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.parse_arguments(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_stages_are_timed_within_a_run(gpu):
    """The clock advances by 1 at each call: each stage takes 1, and the whole takes 7."""
    before = solve.expanded_costs, certified.likely_arcs, certified._solve_restricted
    problem = gpu.transport.make_problem("uniform", 2, (8, 9, 4), "cpu")
    work = partial(gpu.transport.run_ours, problem, "certified")
    stages = gpu.stage_seconds(work, "cpu", clock=partial(next, itertools.count()))
    assert stages == {"distances": 1, "arcs": 1, "simplex": 1, "rest": 4, "whole": 7}
    assert before == (solve.expanded_costs, certified.likely_arcs, certified._solve_restricted)


def test_stages_are_put_back_after_an_error(gpu):
    before = certified.likely_arcs
    with pytest.raises(ZeroDivisionError):
        gpu.stage_seconds(lambda: 1 / 0, "cpu")
    assert certified.likely_arcs is before


def test_a_stage_that_is_no_more_drops_out(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "STAGES", {"arcs": (certified, "likely_arcs"), "gone": (certified, "no_such_function")})
    problem = gpu.transport.make_problem("uniform", 1, (8, 9, 4), "cpu")
    stages = gpu.stage_seconds(partial(gpu.transport.run_ours, problem, "certified"), "cpu")
    assert list(stages) == ["arcs", "rest", "whole"]


def test_stage_rows_have_shares_and_floors(gpu):
    stages = {"arcs": gpu.spread([0.010, 0.020, 0.030]), "whole": gpu.spread([0.080, 0.080, 0.090])}
    assert gpu.stage_rows(stages, {"arcs": 7e-3}) == [
        ["arcs", "10 / 20 / 30", "25.0%", "7"],
        ["whole", "80 / 80 / 90", "100.0%", "-"],
    ]


def test_a_run_writes_each_part(gpu, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    gpu.main([*TINY, "--parts", "transport", "--output", str(path)])
    record = json.loads(path.read_text())
    assert record["benchmark"] == "gpu" and record["settings"]["batch"] == 2
    (transport,) = record["cases"]
    assert transport["part"] == "transport"
    assert list(transport["figures"]) == ["POT loop", "certified", "exact"]
    assert list(transport["stages"]) == ["distances", "arcs", "simplex", "rest", "whole"]
    assert transport["floors"] == {}  # they apply to the full size only
    whats = [entry["what"] for entry in record["musts"]]
    assert whats[0] == "certified, uniform, B = 2, times faster" and record["musts"][0]["at_least"] == 20
    assert not any(what.startswith("exact") and what.endswith("faster") for what in whats)
    printed = capsys.readouterr().out
    assert all(f"{entry['what']}: " in printed for entry in record["musts"])


def test_mmd_is_held_to_the_figures_of_a_gpu(gpu, monkeypatch, capsys):
    spread = {"min": 1.0, "median": 4.0, "max": 4.0}
    own = {"seconds": spread, "times_faster": spread, "peak_bytes": 2**20}
    own |= {"value_relative_error": 0.0, "gradient_relative_error": 0.0}
    measured = {"batch": 256, "figures": {"MMDLoss": own}, "memory_share": 0.1}
    monkeypatch.setattr(gpu.mmd, "measure_case", lambda *arguments: dict(measured))
    arguments = gpu.parse_arguments(["--device", "cpu"])
    case, musts = gpu.measure_mmd(arguments)
    assert [(entry["figure"], entry["met"]) for entry in musts] == [(4.0, False), (0.1, True)]
    assert case["floor"] == (1.6e-3, 2.4e-3)
    printed = capsys.readouterr().out
    assert "MISSED: MMD, B = 256, times faster than the loop: 4, at least 5" in printed
    assert "0.0016 to 0.0024" in printed


def test_out_of_memory_says_what_to_lower(gpu, monkeypatch, tmp_path):
    def fails(arguments):
        raise torch.OutOfMemoryError("tried to allocate 100 GiB")

    monkeypatch.setitem(gpu.PARTS, "mmd", fails)
    with pytest.raises(SystemExit, match="mmd: out of memory; lower --batch. tried to"):
        gpu.main([*TINY, "--parts", "mmd", "--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []
