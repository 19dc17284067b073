"""All caption metrics: values, work shared between systems, reasons, and clips that do not match."""

import math
import os
import random
import shutil

import pytest

from dali_llava.eval import caption_metrics
from dali_llava.eval.caption_metrics import CAPTION_METRICS, CaptionScorer, check_ids, score_captions
from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import bleu, cider_d, rouge_l
from dali_llava.eval.metrics.tokenization import ptb_tokenize, tokenize_pairs


REFERENCES = {"x": ["A dog barks at night.", "At night, a dog barks."], "y": ["Rain falls on tin roofs."]}
PERFECT = {"y": "rain falls on tin roofs", "x": "a dog barks at night"}


@pytest.fixture
def no_corenlp(monkeypatch):
    monkeypatch.setattr(caption_metrics, "find_corenlp", lambda folder: None)


@pytest.fixture
def scorer(meteor, monkeypatch, no_corenlp):
    """A scorer that uses the METEOR process of the session."""
    monkeypatch.setattr(caption_metrics, "MeteorScorer", lambda java: meteor)
    return CaptionScorer()


def test_perfect_captions(scorer):
    scored = scorer.score(PERFECT, REFERENCES)
    metrics, reasons = scored.metrics, scored.reasons
    assert tuple(metrics) == CAPTION_METRICS
    assert [metrics[name] for name in ("bleu_1", "bleu_4", "meteor", "rouge_l")] == pytest.approx([1.0] * 4, abs=1e-8)
    # The first caption shares with its second reference 5 of 5 words, 3 of 4 pairs and 1 of 3 triples, all of one idf.
    second = (1 + 3 / 4 + 1 / 3 + 0) / 4
    assert metrics["cider_d"] == pytest.approx(10 * ((1 + second) / 2 + 1) / 2, rel=1e-9)
    assert scorer.tokenizer == "ptb"
    assert set(reasons) == {"spice", "spider"} and "CoreNLP" in reasons["spice"] and "spice" in reasons["spider"]
    assert metrics["spice"] is None and metrics["spider"] is None


def test_systems_share_one_run(scorer, audiocaps, monkeypatch):
    rng = random.Random(1)
    clips = rng.sample(sorted(audiocaps), 30)
    references = {clip: audiocaps[clip][1:] for clip in clips}
    systems = {
        "human": {clip: audiocaps[clip][0] for clip in clips},
        "shuffled": dict(zip(clips, [audiocaps[clip][0] for clip in reversed(clips)], strict=True)),
        "silent": dict.fromkeys(clips, ""),
    }
    runs = []

    def counted(captions, java):
        runs.append(len(captions))
        return ptb_tokenize(captions, java)

    monkeypatch.setattr("dali_llava.eval.metrics.tokenization.ptb_tokenize", counted)
    together = scorer.score_many(systems, references)
    assert len(runs) == 1
    for name, candidates in systems.items():
        predictions, tokenized, _ = tokenize_pairs([candidates[c] for c in clips], [references[c] for c in clips])
        metrics = together[name].metrics
        assert metrics["bleu_4"] == bleu(predictions, tokenized)["bleu_4"].corpus
        assert metrics["rouge_l"] == rouge_l(predictions, tokenized).corpus
        assert metrics["cider_d"] == cider_d(predictions, tokenized).corpus
        assert metrics["meteor"] == scorer.meteor.score(predictions, tokenized).corpus
    for name in ("bleu_1", "bleu_4", "meteor", "rouge_l", "cider_d"):
        human, shuffled, silent = (together[system].metrics[name] for system in systems)
        assert human > shuffled > silent - 1e-12
    assert together["silent"].metrics["meteor"] == together["silent"].metrics["cider_d"] == 0.0


@pytest.mark.skipif(shutil.which("java") is None, reason="the published figure is on PTB tokens, which need Java")
def test_people_score_as_published(audiocaps):
    """Published human CIDEr-D on AudioCaps test, one caption of a clip against the other four, is .909.

    It is the mean over the five choices of the caption (.9076 here). This test uses each choice for a fifth of the
    clips.
    """
    clips = [audiocaps[clip] for clip in sorted(audiocaps)]
    assert len(clips) == 975 and {len(clip) for clip in clips} == {5}
    candidates = [clip[k % 5] for k, clip in enumerate(clips)]
    others = [clip[: k % 5] + clip[k % 5 + 1 :] for k, clip in enumerate(clips)]
    predictions, references, _ = tokenize_pairs(candidates, others, "ptb")
    assert cider_d(predictions, references).corpus == pytest.approx(0.909, abs=0.02)


def test_without_java(no_corenlp):
    scored = score_captions(PERFECT, REFERENCES, java=None)
    metrics, reasons = scored.metrics, scored.reasons
    assert metrics["rouge_l"] == 1.0 and metrics["meteor"] is None
    assert set(reasons) == {"meteor", "spice", "spider", "tokenizer"}
    assert "Java" in reasons["meteor"] and "Java" in reasons["spice"] and "Python tokenizer" in reasons["tokenizer"]


@pytest.mark.skipif(os.name != "posix", reason="the replacement for Java is a shell script")
def test_java_that_does_not_run(tmp_path, no_corenlp):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho Unable to locate a Java Runtime >&2\nexit 1\n")
    java.chmod(0o755)
    scored = score_captions(PERFECT, REFERENCES, java=str(java))
    metrics, reasons = scored.metrics, scored.reasons
    assert metrics["rouge_l"] == 1.0 and metrics["meteor"] is None
    assert "Unable to locate a Java Runtime" in reasons["meteor"] and "tokenizer" in reasons


def test_one_clip_has_no_cider_d(no_corenlp):
    scored = score_captions({"x": "a dog"}, {"x": ["a dog"]}, java=None)
    metrics, reasons = scored.metrics, scored.reasons
    assert metrics["cider_d"] is None and "two clips" in reasons["cider_d"]
    assert metrics["rouge_l"] == 1.0 and math.isclose(metrics["bleu_1"], 1.0, abs_tol=1e-8)
    assert "cider_d and spice" in reasons["spider"]


def test_spider_is_the_mean(monkeypatch, tmp_path, scorer):
    monkeypatch.setattr(scorer, "corenlp", tmp_path)
    monkeypatch.setattr(caption_metrics, "spice", lambda *args: ClipScores.mean([0.5, 0.0]))
    scored = scorer.score(PERFECT, REFERENCES)
    assert scored.metrics["spice"] == 0.25 and scored.reasons == {}
    assert scored.metrics["spider"] == pytest.approx((scored.metrics["cider_d"] + 0.25) / 2, rel=1e-12)
    cider = scored.clips["cider_d"].clips
    assert scored.clips["spider"].clips.tolist() == [(cider[0] + 0.5) / 2, cider[1] / 2]


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "no references"),
        ({"a": "x"}, {i: ["x"] for i in "abcdef"}, r"5 references without a candidate: b, c, d, \.\.\.; caption"),
        ({"a": "x", "b": "x"}, {"a": ["x"]}, "1 candidates without a reference: b; remove"),
        ({"a": None}, {"a": ["x"]}, "1 candidates that are not text: a;"),
        ({"a": "x"}, {"a": []}, "1 references that are not a list of captions: a;"),
        ({"a": "x"}, {"a": "x"}, "1 references that are not a list of captions: a;"),
        ({"a": "x"}, {"a": ["x", " "]}, "1 references with a blank caption: a;"),
    ],
)
def test_clips_that_do_not_match(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        check_ids(candidates, references)


def test_error_names_the_system():
    with pytest.raises(ValueError, match="1 references without a candidate of mmd: b"):
        CaptionScorer(java=None).score_many({"ot": {"a": "x", "b": "x"}, "mmd": {"a": "x"}}, {"a": ["x"], "b": ["x"]})
