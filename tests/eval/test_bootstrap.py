"""Bootstrap intervals and paired tests: analytic cases, scipy, and enumeration of all swaps."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dali_llava.eval.bootstrap import intervals, paired_test
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import bleu


def sample(clips: int, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two systems; their differences have mean `shift`."""
    rng = np.random.default_rng(seed)
    shared = rng.gamma(2.0, 0.2, clips)
    return shared + rng.normal(shift, 0.1, clips), shared


def test_interval_of_a_mean():
    scores, _ = sample(400)
    low, high = intervals({"x": ClipScores.mean(scores)})["x"]
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert (low + high) / 2 == pytest.approx(scores.mean(), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.07)
    reference = stats.bootstrap(
        (scores,), np.mean, n_resamples=2000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(reference), abs=0.1 * half)


def test_interval_of_a_share_weighs_clips_by_their_trials():
    rng = np.random.default_rng(0)
    trials = rng.integers(0, 4, 300).astype(float)
    hits = rng.binomial(trials.astype(int), 0.7).astype(float)
    low, high = intervals({"x": ClipScores(np.stack([hits, trials], -1))})["x"]
    share = hits.sum() / trials.sum()
    error = math.sqrt(((hits - share * trials) ** 2).sum()) / trials.sum()  # of a ratio estimator
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.07) and low < share < high


def test_intervals_are_reproducible_and_need_two_clips():
    scores = {"x": ClipScores.mean(sample(50)[0])}
    assert intervals(scores) == intervals(scores) != intervals(scores, seed=1)
    assert intervals({"x": ClipScores.mean([0.5])}) == {} == intervals({})
    assert intervals({"x": ClipScores.mean([0.5, 0.5])}) == {"x": (0.5, 0.5)}


def test_a_known_p_value():
    # Of 2 ** 10 assignments of signs, only the observed one and its opposite are as extreme.
    b = np.linspace(0.1, 0.5, 10)
    test = paired_test(ClipScores.mean(b + np.linspace(0.01, 0.1, 10)), ClipScores.mean(b))
    assert test.p_value == 2 / 2**10
    assert test.difference == pytest.approx(0.055, rel=1e-12) and 0 < test.interval[0] < 0.055 < test.interval[1]


@pytest.mark.parametrize("seed", range(3))
def test_all_permutations_agree_with_scipy(seed):
    a, b = sample(10, 0.05, seed)
    reference = stats.permutation_test((a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples")
    assert paired_test(ClipScores.mean(a), ClipScores.mean(b)).p_value == pytest.approx(reference.pvalue, rel=1e-12)


def test_many_clips_agree_with_the_normal_distribution_and_scipy():
    a, b = sample(300, 0.012, seed=3)
    test = paired_test(ClipScores.mean(a), ClipScores.mean(b))
    differences = a - b
    # Under random signs, the sum of the differences has variance sum(d ** 2).
    z = differences.sum() / math.sqrt((differences**2).sum())
    assert test.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01) and 0.005 < test.p_value < 0.5
    assert test.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1), rel=1e-9)
    reference = stats.bootstrap(
        (differences,), np.mean, n_resamples=2000, method="percentile", random_state=np.random.default_rng(1)
    )
    half = 1.96 * differences.std() / math.sqrt(len(differences))
    assert test.interval == pytest.approx(tuple(reference.confidence_interval), abs=0.1 * half)


def test_exchanged_systems_and_equal_systems():
    a, b = (ClipScores.mean(scores) for scores in sample(40, 0.03))
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.difference == -other.difference and one.effect_size == pytest.approx(-other.effect_size)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), rel=1e-9)
    assert one.p_value == pytest.approx(other.p_value, abs=0.01)
    same = paired_test(a, a)
    assert (same.difference, same.interval, same.effect_size, same.p_value) == (0.0, (0.0, 0.0), None, 1.0)


def test_swapped_captions_are_scored_as_a_corpus():
    references = [["a dog barks loudly at night"], ["rain falls on tin roofs"], ["two men talk and laugh a lot"]]
    systems = (
        ["a dog barks loudly", "rain falls on roofs", "two men talk and sing"],
        ["a cat barks", "rain falls", "men talk and laugh a lot"],
    )
    a, b = (bleu(captions, references)["bleu_1"] for captions in systems)
    test = paired_test(a, b)
    differences = []
    for swaps in itertools.product((0, 1), repeat=3):
        first, second = ([systems[s ^ swap][i] for i, swap in enumerate(swaps)] for s in (0, 1))
        scores = (bleu(captions, references)["bleu_1"].corpus for captions in (first, second))
        differences.append(next(scores) - next(scores))
    extreme = np.abs(differences) >= abs(differences[0]) - 1e-12
    assert test.difference == pytest.approx(differences[0], rel=1e-9)
    assert test.p_value == extreme.mean() and 0 < extreme.sum() < 8


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([0.5, 0.5], [0.5], "cannot be paired"), ([0.5], [0.5], "at least two clips")],
)
def test_systems_that_cannot_be_paired(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_test(ClipScores.mean(a), ClipScores.mean(b))
