"""Tests of the functions shared by the benchmarks, with a simulated clock."""

import json
import operator
from functools import partial

import pytest


@pytest.fixture
def measure(benchmarks):
    import measure

    return measure


class Clock:
    """A clock that only the timed callables advance."""

    def __init__(self):
        self.now = 100.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, durations):
        durations = iter(durations)

        def run():
            self.calls.append(name)
            self.now += next(durations)

        return run


def test_works_take_turns_and_warm_ups_do_not_count(measure):
    clock, ticks = Clock(), []
    works = {"loop": clock.work("loop", [9, 4, 6]), "ours": clock.work("ours", [9, 2, 1])}
    seconds = measure.alternate(works, repeats=2, warm_ups=1, clock=clock, tick=lambda: ticks.append(1))
    assert clock.calls == ["loop", "ours"] * 3
    assert seconds == {"loop": [4, 6], "ours": [2, 1]}
    assert len(ticks) == 6


def test_what_stands_between_two_works_is_not_timed(measure):
    clock = Clock()

    def tick():
        clock.now += 50

    assert measure.alternate({"only": clock.work("only", [1, 2, 3])}, 2, clock=clock, tick=tick) == {"only": [2, 3]}


def test_ratios_are_taken_round_by_round(measure):
    figures = measure.compare({"loop": [4.0, 6.0, 8.0], "ours": [2.0, 1.0, 8.0]}, "loop")
    assert figures["ours"] == {
        "rounds": 3,
        "seconds": {"min": 1, "median": 2, "max": 8},
        "times_faster": {"min": 1, "median": 2, "max": 6},
    }
    assert figures["loop"]["times_faster"] == {"min": 1, "median": 1, "max": 1}


def test_median_of_an_even_number(measure):
    assert measure.spread([4.0, 1.0, 3.0, 2.0]) == {"min": 1, "median": 2.5, "max": 4}


def test_bad_arguments(measure):
    with pytest.raises(ValueError, match="repeats"):
        measure.alternate({}, 0)
    with pytest.raises(ValueError, match="'loop'"):
        measure.compare({"ours": [1.0]}, "loop")


def test_a_requirement_is_met_at_its_bound_and_by_no_nan(measure):
    assert measure.must("speed", 2.0, at_least=2.0) == {"what": "speed", "figure": 2.0, "at_least": 2.0, "met": True}
    assert not measure.must("speed", 1.99, at_least=2.0)["met"]
    assert measure.must("memory", 0.5, at_most=0.5)["met"]
    assert not measure.must("memory", 0.51, at_most=0.5)["met"]
    assert not measure.must("memory", float("nan"), at_most=0.5)["met"]


def test_peak_memory_leaves_the_inputs_out(measure):
    """The 64 MiB that the work allocates are counted; its inputs and the memory of the process are not."""
    work = partial(operator.mul, b"x")
    found = measure.peak_memory(work, partial(int, 64 * 2**20), partial(int, 1))
    assert found == pytest.approx(64 * 2**20, rel=0.25)
    inputs = partial(operator.mul, b"x", 64 * 2**20)
    assert abs(measure.peak_memory(len, inputs, partial(bytes, 1))) < 16 * 2**20


def test_the_record_names_machine_versions_and_load(measure, tmp_path):
    cases, musts = [{"batch": 8}], [measure.must("speed", 2.0, at_least=1.0)]
    path = measure.save(tmp_path / "new" / "record.json", "mmd", {"repeats": 3}, cases, musts, load_before=0.25)
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    record = json.loads(path.read_text())
    assert list(record) == ["benchmark", "settings", "machine", "load_average", "versions", "cases", "musts"]
    assert (record["benchmark"], record["settings"]) == ("mmd", {"repeats": 3})
    assert (record["cases"], record["musts"]) == (cases, musts)
    assert record["load_average"]["before"] == 0.25 and record["load_average"]["after"] >= 0
    assert {"cpu", "cores", "ram_gib", "torch_threads"} <= set(record["machine"])
    assert {"python", "torch", "numpy", "POT"} <= set(record["versions"])


def test_a_record_with_nan_is_not_written(measure, tmp_path):
    with pytest.raises(ValueError):
        measure.save(tmp_path / "record.json", "mmd", {}, [{"figure": float("nan")}], [], load_before=0.0)
    assert list(tmp_path.iterdir()) == []


def test_benchmarks_share_their_arguments(measure):
    parser = measure.benchmark_parser("about", "mmd")
    measure.add_batch_sizes(parser)
    arguments = measure.parse_benchmark(parser, ["--batch-sizes", "2", "--repeats", "3"])
    assert (arguments.batch_sizes, arguments.shape, arguments.repeats) == ([2], [512, 576, 1024], 3)
    assert (arguments.device, arguments.output) == ("cpu", measure.RESULTS / "mmd.json")


@pytest.mark.parametrize(
    "words", [["--repeats", "0"], ["--repeats", "two"], ["--batch-sizes", "8", "0"], ["--shape", "8", "-8", "8"]]
)
def test_numbers_below_one_are_a_usage_error(measure, capsys, words):
    parser = measure.benchmark_parser("about", "mmd")
    measure.add_batch_sizes(parser)
    with pytest.raises(SystemExit) as ended:
        measure.parse_benchmark(parser, words)
    assert ended.value.code == 2 and f"argument {words[0]}: " in capsys.readouterr().err


def test_time_in_turns_names_its_works_and_warms_up(measure):
    calls = []
    seconds = measure.time_in_turns(
        {name: partial(calls.append, name) for name in ("loop", "ours")}, repeats=2, device="cpu", title="test"
    )
    assert calls == ["loop", "ours"] * 3
    assert {name: len(own) for name, own in seconds.items()} == {"loop": 2, "ours": 2}


def test_a_gpu_that_is_not_there_ends_the_benchmark(measure, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        measure.parse_benchmark(measure.benchmark_parser("about", "mmd"), ["--device", "cuda"])
    assert ended.value.code == 2 and "--device cuda: torch finds no GPU" in capsys.readouterr().err
