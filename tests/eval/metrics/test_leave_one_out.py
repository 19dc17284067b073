"""Metrics of people on AudioCaps, one annotator against the others, equal those of independent implementations."""

import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from dali_llava.eval.metrics.corpus_scores import bleu, cider_d, rouge_l, vocabulary
from dali_llava.eval.metrics.tokenization import tokenize_pairs


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=range(5))
def annotator(request, audiocaps):
    """Tokenized captions of one annotator and of the other four, for all 975 clips."""
    clips = [audiocaps[clip] for clip in sorted(audiocaps)]
    k = request.param
    predictions, references, _ = tokenize_pairs(
        [clip[k] for clip in clips], [clip[:k] + clip[k + 1 :] for clip in clips]
    )
    return predictions, references


def coco(annotator):
    """The captions in the form of pycocoevalcap."""
    predictions, references = annotator
    return dict(enumerate(references)), {i: [prediction] for i, prediction in enumerate(predictions)}


def test_bleu(annotator):
    corpus, clips = Bleu(4).compute_score(*coco(annotator), verbose=0)
    for n, scores in enumerate(bleu(*annotator).values()):
        assert scores.corpus == pytest.approx(corpus[n], rel=1e-9)
        assert scores.clips == pytest.approx(np.array(clips[n]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(rouge_l, Rouge()), (cider_d, Cider())], ids=["rouge_l", "cider_d"])
def test_means(annotator, ours, theirs):
    corpus, clips = theirs.compute_score(*coco(annotator))
    scores = ours(*annotator)
    assert scores.corpus == pytest.approx(corpus, rel=1e-9) and scores.clips == pytest.approx(clips, rel=1e-9)


@pytest.fixture(scope="module")
def pycocoevalcap_meteor():
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java on the PATH")
    return Meteor()


def test_meteor(annotator, meteor, pycocoevalcap_meteor):
    corpus, clips = pycocoevalcap_meteor.compute_score(*coco(annotator))
    scores = meteor.score(*annotator)
    assert scores.corpus == pytest.approx(corpus, rel=1e-12)
    assert scores.clips == pytest.approx(np.array(clips), rel=1e-12, abs=1e-15)


def test_aac_metrics(annotator):
    pytest.importorskip("aac_metrics", reason="aac-metrics (the extra metrics) is not installed")
    from aac_metrics.functional.bleu import bleu as aac_bleu
    from aac_metrics.functional.cider_d import cider_d as aac_cider_d
    from aac_metrics.functional.rouge_l import rouge_l as aac_rouge_l
    from aac_metrics.functional.vocab import vocab

    found = bleu(*annotator) | {"rouge_l": rouge_l(*annotator), "cider_d": cider_d(*annotator)}
    theirs = [aac_bleu(*annotator, n=n, option="closest") for n in range(1, 5)]
    for corpus, clips in [*theirs, aac_rouge_l(*annotator), aac_cider_d(*annotator)]:
        (name,) = (name for name in corpus if name in found)
        assert found[name].corpus == pytest.approx(corpus[name].item(), abs=1e-6)
        assert found[name].clips == pytest.approx(clips[name].numpy(), abs=1e-6)
    assert vocabulary(annotator[0]) == vocab(annotator[0], None)[0]["vocab.cands"].item()
