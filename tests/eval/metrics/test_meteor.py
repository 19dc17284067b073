"""METEOR 1.5: analytic values, and Java processes that fail."""

import os
import stat

import pytest

from dali_llava.eval.metrics.meteor_process import MeteorScorer


needs_sh = pytest.mark.skipif(os.name != "posix", reason="the replacement for Java is a shell script")


# A process that reads requests but does not answer.
READ_ON = "while read -r line; do :; done"


@pytest.fixture
def fake_java(tmp_path):
    """Create an executable that replaces Java."""

    def make(script: str) -> str:
        path = tmp_path / "java"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_identical_captions(meteor):
    captions = ["a dog barks loudly", "rain falls on a tin roof", "café music plays"]
    assert meteor.score(captions, [["something else", caption] for caption in captions]).corpus == 1.0


def test_formula(meteor):
    # One match of two content words: P = R = F = 1/2, one chunk per match, so penalty 0.6 * 1 ** 0.2.
    assert meteor.score(["violin truck"], [["violin rain"]]).corpus == pytest.approx(0.5 * 0.4, rel=1e-9)
    # All four words in two chunks: F = 1, penalty 0.6 * (2 / 4) ** 0.2.
    score = meteor.score(["rain thunder violin truck"], [["violin truck rain thunder"]]).corpus
    assert score == pytest.approx(1 - 0.6 * 0.5**0.2, rel=1e-9)


def test_nothing_shared(meteor):
    assert meteor.score(["violin"], [["truck", "rain"]]).corpus == 0.0
    assert meteor.score([""], [["truck"]]).corpus == 0.0


def test_synonyms_count(meteor):
    assert 0.0 < meteor.score(["an automobile passes"], [["a car passes"]]).corpus < 1.0


def test_corpus_score_is_not_the_mean(meteor):
    predictions = ["violin truck", "a dog barks at the man"]
    references = [["rain thunder"], ["a dog barks at the man"]]
    alone = [meteor.score([p], [r]).corpus for p, r in zip(predictions, references, strict=True)]
    assert alone == [0.0, 1.0]
    assert meteor.score(predictions, references).corpus != pytest.approx(0.5, abs=0.01)


def test_separators_in_captions(meteor):
    assert meteor.score(["a dog ||| barks\nloudly"], [["a dog barks\r\nloudly", "x ||| y"]]).corpus == 1.0


@needs_sh
def test_failing_java_is_reported(fake_java):
    with MeteorScorer(fake_java("echo no runtime here >&2; exit 1")) as scorer:
        with pytest.raises(RuntimeError, match="the METEOR process exited: no runtime here"):
            scorer.score(["a dog"], [["a dog"]])


@needs_sh
@pytest.mark.parametrize("output", ["exec >&2", "exec >&-"])
def test_silent_java_is_ended(fake_java, output):
    with MeteorScorer(fake_java(f"{output}; {READ_ON}"), timeout=0.1) as scorer:
        with pytest.raises(RuntimeError, match="longer than 0.1 s"):
            scorer.score(["a dog"], [["a dog"]])


@needs_sh
def test_closed_scorer(fake_java):
    scorer = MeteorScorer(fake_java(READ_ON))
    scorer.close()
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.score(["a dog"], [["a dog"]])


def test_no_java():
    with pytest.raises(RuntimeError, match="needs Java"):
        MeteorScorer(java="no-such-launcher")
