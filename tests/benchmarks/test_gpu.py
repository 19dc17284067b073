"""Tests of the GPU benchmark on a CPU, with a tiny tower, few tokens and a simulated clock."""

import itertools
import json
from functools import partial

import pytest
import torch

from dali_llava.modeling import CavMaeAudioConfig
from dali_llava.train.transport import certified, solve


TINY = ["--device", "cpu", "--batch", "2", "--step-batch", "2", "--shape", "16", "9", "8", "--repeats", "1"]


@pytest.fixture
def gpu(benchmarks):
    import gpu

    return gpu


@pytest.fixture
def tiny_tower(gpu, monkeypatch):
    """Replaces the full-size tower with two blocks of width 16 that return the same number of tokens."""
    full = gpu.tower_config

    def tiny(shape):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return CavMaeAudioConfig(**sizes, max_length=full(shape).max_length, output_size=shape[2])

    monkeypatch.setattr(gpu, "tower_config", tiny)


def test_the_default_is_the_full_size(gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = gpu.parse_arguments([])
    assert (arguments.batch, arguments.step_batch, arguments.shape) == (256, 64, [512, 576, 1024])
    assert (arguments.device, arguments.parts) == ("cuda", ["transport", "mmd", "step"])
    assert arguments.output.name == "gpu.json" and gpu.at_full_size(arguments)
    assert not gpu.at_full_size(gpu.parse_arguments(["--batch", "255"]))
    full, default = gpu.tower_config((512, 576, 1024)), CavMaeAudioConfig()
    assert full.to_dict() == default.to_dict()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--device cuda: torch finds no GPU"),
        (["--device", "cpu", "--batch", "0"], "argument --batch: must be at least 1, not 0"),
        (["--device", "cpu", "--step-batch", "-1"], "argument --step-batch: must be at least 1, not -1"),
        (["--device", "cpu", "--repeats", "0"], "argument --repeats: must be at least 1, not 0"),
        (["--device", "cpu", "--parts", "forward"], "argument --parts: invalid choice"),
        (["--device", "cpu", "--shape", "33", "36", "16"], "multiples of 8"),
        (["--device", "cpu", "--shape", "32", "36", "12"], "multiples of 8"),
    ],
)
def test_usage_errors(gpu, monkeypatch, capsys, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.parse_arguments(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_only_the_step_asks_for_multiples(gpu):
    arguments = gpu.parse_arguments(["--device", "cpu", "--shape", "33", "36", "12", "--parts", "mmd", "transport"])
    assert arguments.shape == [33, 36, 12]


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


def test_the_share_is_what_the_step_without_the_loss_does_not_take(gpu):
    figures = gpu.step_figures({gpu.TRIVIAL: [1.0, 1.0, 3.0], "OT^Att": [2.0, 4.0, 4.0]})
    assert figures["OT^Att"]["share"] == {"min": 0.25, "median": 0.5, "max": 0.75}
    assert figures[gpu.TRIVIAL]["share"] == {"min": 0.0, "median": 0.0, "max": 0.0}
    assert figures["OT^Att"] | {"share": None} == {
        "rounds": 3,
        "seconds": {"min": 2.0, "median": 4.0, "max": 4.0},
        "share": None,
    }


@pytest.mark.parametrize("solver", ["certified", "exact", None])
def test_a_step_moves_tower_and_attention(gpu, tiny_tower, solver):
    torch.manual_seed(0)
    config = gpu.tower_config((16, 9, 8))
    objective = gpu.MeanTokens() if solver is None else gpu.attentive_loss(8, solver)
    step = gpu.AlignmentStep(config, objective, torch.randn(2, config.max_length, 128), torch.randn(2, 9, 8))
    assert config.max_length == 32 and objective.training
    parameters = {**dict(step.tower.named_parameters()), **dict(objective.named_parameters())}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    step()
    still = [name for name, parameter in parameters.items() if torch.equal(parameter, before[name])]
    # A softmax is invariant to a bias that shifts all scores by the same amount.
    assert [name for name in still if not name.endswith("bias")] == []


def test_a_run_writes_each_part(gpu, tiny_tower, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    gpu.main([*TINY, "--parts", "transport", "step", "--output", str(path)])
    record = json.loads(path.read_text())
    assert record["benchmark"] == "gpu" and record["settings"]["step_batch"] == 2
    transport, step = record["cases"]
    assert (transport["part"], step["part"]) == ("transport", "step")
    assert list(transport["figures"]) == ["POT loop", "certified", "exact"]
    assert list(transport["stages"]) == ["distances", "arcs", "simplex", "rest", "whole"]
    assert transport["floors"] == {}  # they apply to the full size only
    assert list(step["figures"]) == ["mean tokens", "OT^Att, certified", "OT^Att, exact (selected by auto)"]
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

    monkeypatch.setitem(gpu.PARTS, "step", fails)
    with pytest.raises(SystemExit, match="step: out of memory; lower --step-batch. tried to"):
        gpu.main([*TINY, "--parts", "step", "--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []
