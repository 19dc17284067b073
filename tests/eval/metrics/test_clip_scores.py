"""Scores of a corpus from statistics of its clips."""

import numpy as np
import pytest

from dali_llava.eval.metrics.clip_scores import ClipScores
from dali_llava.eval.metrics.corpus_scores import bleu, cider_d, rouge_l, spider, vocabulary


PREDICTIONS = ["a dog barks at night", "rain falls", "", "two men talk and laugh"]
REFERENCES = [
    ["a dog barks", "a dog is barking at night"],
    ["rain falls on tin roofs"],
    ["a bell rings", "silence"],
    ["men talk and laugh", "two people are laughing"],
]


def test_a_mean():
    scores = ClipScores.mean([0.5, 0.25, 1.0])
    assert scores.corpus == pytest.approx(1.75 / 3, rel=1e-15) and scores.clips.tolist() == [0.5, 0.25, 1.0]


def test_a_share_of_nothing_is_nan():
    scores = ClipScores(np.array([[1.0, 2.0], [0.0, 0.0]]))
    assert scores.corpus == 0.5 and scores.clips[0] == 0.5 and np.isnan(scores.clips[1])
    assert np.isnan(ClipScores(np.zeros((2, 2))).corpus)


@pytest.mark.parametrize("name", ["bleu_1", "bleu_2", "bleu_3", "bleu_4"])
def test_the_score_of_a_clip_is_the_score_of_a_corpus_with_this_clip(name):
    scores = bleu(PREDICTIONS, REFERENCES)[name]
    alone = [bleu([p], [r])[name].corpus for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert scores.clips.tolist() == alone
    assert scores.corpus != pytest.approx(np.mean(alone), abs=0.01)


def test_weighted_sums_are_scores_of_resampled_corpora():
    drawn = [3, 0, 0, 1]
    weights = np.bincount(drawn, minlength=4).astype(float)
    again = [PREDICTIONS[i] for i in drawn], [REFERENCES[i] for i in drawn]
    for name, scores in bleu(PREDICTIONS, REFERENCES).items():
        assert scores.reduce(weights @ scores.statistics) == pytest.approx(bleu(*again)[name].corpus, rel=1e-12)
    scores = rouge_l(PREDICTIONS, REFERENCES)
    assert scores.reduce(weights @ scores.statistics) == pytest.approx(rouge_l(*again).corpus, rel=1e-12)


def test_meteor_of_a_resampled_corpus(meteor):
    scores = meteor.score(PREDICTIONS, REFERENCES)
    again = meteor.score([PREDICTIONS[0], PREDICTIONS[0], PREDICTIONS[3]], [REFERENCES[i] for i in (0, 0, 3)])
    assert scores.reduce(np.array([2.0, 0, 0, 1.0]) @ scores.statistics) == pytest.approx(again.corpus, rel=1e-12)
    assert scores.clips[0] == meteor.score(PREDICTIONS[:1], REFERENCES[:1]).corpus


def test_spider_and_vocabulary():
    cider, spice = cider_d(PREDICTIONS, REFERENCES), ClipScores.mean([0.5, 0.0, 0.0, 1.0])
    assert spider(cider, spice).clips.tolist() == ((cider.clips + spice.clips) / 2).tolist()
    assert spider(cider, spice).corpus == pytest.approx((cider.corpus + spice.corpus) / 2, rel=1e-12)
    assert vocabulary(["a dog barks", "a cat", ""]) == 4


@pytest.mark.parametrize(
    ("scores", "message"), [([], "no captions"), ([1.0, np.nan], "the score of caption 1 is not finite")]
)
def test_bad_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        ClipScores.mean(scores)
