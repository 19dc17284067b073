"""Tests of the loading benchmark: its arithmetic, and a complete small run."""

import json

import pytest
import torch


@pytest.fixture
def loading(benchmarks, monkeypatch):
    import loading
    import prepare

    monkeypatch.setattr(prepare, "SECONDS", 2)
    monkeypatch.setattr(loading.os, "sched_setaffinity", lambda *_: None)
    threads = torch.get_num_threads()
    yield loading
    torch.set_num_threads(threads)


def test_operations_of_a_step(loading):
    # One layer, 2 tokens, width 3, inner width 5: 2 x 2 x (4 x 9 + 2 x 15) for matrices, 4 x 4 x 3 for attention.
    assert loading.forward_flops(2, 3, 5, 1) == 264 + 48
    assert loading.step_flops() == pytest.approx(6.5e11, rel=0.05)  # 86M weights, 512 tokens; 304M weights, 577 tokens


def test_the_whole_runs(loading, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["--clips", "2", "--batch", "2", "--repeats", "1", "--streamed", "5"]
    loading.main([*words, "--output", str(tmp_path / "loading.json")])
    record = json.loads((tmp_path / "loading.json").read_text())
    (case,) = record["cases"]
    assert set(case["figures"]) == {"videos", "shards, any order", "shards, streamed"}
    for name, own in case["figures"].items():
        assert own["pairs_a_second"]["median"] == pytest.approx(2 / own["seconds"]["median"])
        product = case["workers_for_that"][name] * own["pairs_a_second"]["median"]
        assert product == pytest.approx(case["h200_pairs_a_second_at_most"])
    assert case["memory_mb"]["pairs"] == 6 and case["memory_mb"]["highest"] >= case["memory_mb"]["after_warm_up"] > 100
    assert "memory growth over 6 streamed pairs, MB" in capsys.readouterr().out
