"""BLEU, ROUGE-L and CIDEr-D: analytic values, and comparison with independent implementations in float64."""

import math
import random
from collections import Counter

import pytest

from dali_llava.eval.metrics.corpus_scores import bleu, cider_d, rouge_l
from dali_llava.eval.metrics.tokenization import python_tokenize


@pytest.fixture(scope="module")
def corpus(audiocaps) -> tuple[list[str], list[list[str]]]:
    """50 clips: a caption of the same clip or of another clip, and four references of the clip."""
    rng = random.Random(0)
    clips = rng.sample(sorted(audiocaps), 50)
    predictions = [audiocaps[clip if rng.random() < 0.6 else rng.choice(clips)][0] for clip in clips]
    return python_tokenize(predictions), [python_tokenize(audiocaps[clip][1:]) for clip in clips]


def bleus(predictions, references) -> list[float]:
    return [scores.corpus for scores in bleu(predictions, references).values()]


def ngrams(text: str, n: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_by_definition(predictions, references, order):
    log_precision, length, closest = 0.0, 0, 0
    for n in range(1, order + 1):
        matched = total = 0
        for prediction, captions in zip(predictions, references, strict=True):
            counts = ngrams(prediction, n)
            for gram, count in counts.items():
                matched += min(count, max(ngrams(caption, n)[gram] for caption in captions))
            total += sum(counts.values())
        log_precision += math.log(matched / total) / order
    for prediction, captions in zip(predictions, references, strict=True):
        words = len(prediction.split())
        length += words
        closest += min((len(caption.split()) for caption in captions), key=lambda m: (abs(m - words), m))
    return min(1.0, math.exp(1 - closest / length)) * math.exp(log_precision)


def common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        last = row
        row = [0]
        for j, other in enumerate(b):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
    return row[-1]


def rouge_by_definition(predictions, references, beta=1.2):
    scores = []
    for prediction, captions in zip(predictions, references, strict=True):
        words = prediction.split()
        lengths = [(common_subsequence(words, caption.split()), len(caption.split())) for caption in captions]
        precision = max(common / len(words) for common, _ in lengths)
        recall = max(common / length for common, length in lengths)
        mean = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / mean if mean else 0.0)
    return sum(scores) / len(scores)


def cider_d_by_definition(predictions, references, sigma=6.0):
    scores = []
    for n in range(1, 5):
        frequency = Counter(gram for captions in references for gram in {g for c in captions for g in ngrams(c, n)})

        def weights(text, n=n, frequency=frequency):
            return {g: c * math.log(len(references) / max(1, frequency[g])) for g, c in ngrams(text, n).items()}

        for prediction, captions in zip(predictions, references, strict=True):
            mine = weights(prediction)
            for caption in captions:
                theirs = weights(caption)
                product = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
                norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                penalty = math.exp(-((len(prediction.split()) - len(caption.split())) ** 2) / (2 * sigma**2))
                scores.append(penalty * product / norm / len(captions) if norm else 0.0)
    return 10 * sum(scores) / (4 * len(predictions))


def test_bleu_equals_its_definition(corpus):
    predictions, references = corpus
    scores = bleus(predictions, references)
    # The scorer adds 1e-9 to the counts of n-grams.
    assert scores == pytest.approx([bleu_by_definition(predictions, references, n) for n in range(1, 5)], rel=1e-8)
    assert 0.1 < scores[3] < scores[2] < scores[1] < scores[0] < 0.9


def test_rouge_l_equals_its_definition(corpus):
    assert rouge_l(*corpus).corpus == pytest.approx(rouge_by_definition(*corpus), rel=1e-12)


def test_cider_d_equals_its_definition(corpus):
    assert cider_d(*corpus).corpus == pytest.approx(cider_d_by_definition(*corpus), rel=1e-12)


def test_bleu_by_hand():
    # Clipped: "the" counts twice of seven, as in Papineni et al., section 2.1.
    scores = bleus(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert scores[0] == pytest.approx(2 / 7, rel=1e-8)
    # Counts of the corpus: 1-grams 3 of 4, 2-grams 1 of 2; 4 words where 5 are closest, so exp(1 - 5/4).
    scores = bleus(["a dog", "rain pours"], [["a dog barks"], ["rain falls"]])
    assert scores[0] == pytest.approx(3 / 4 * math.exp(-1 / 4), rel=1e-8)
    assert scores[1] == pytest.approx(math.sqrt(3 / 4 * 1 / 2) * math.exp(-1 / 4), rel=1e-8)


def test_bleu_uses_every_reference():
    few = bleus(["a dog barks loudly"], [["a cat meows"]])
    more = bleus(["a dog barks loudly"], [["a cat meows", "the dog barks loudly"]])
    assert more[0] == pytest.approx(1.0, abs=1e-8) and few[0] == pytest.approx(1 / 4, abs=1e-8)


def test_rouge_l_by_hand():
    # The subsequence "police the gunman" has 3 of 4 words on both sides.
    assert rouge_l(["police kill the gunman"], [["police ended the gunman"]]).corpus == pytest.approx(0.75, rel=1e-12)
    # Precision 1 from the first reference; recall 2/3 from either.
    expected = (1 + 1.44) * 1 * (2 / 3) / (2 / 3 + 1.44)
    assert rouge_l(["a dog"], [["a dog barks", "a big dog"]]).corpus == pytest.approx(expected, rel=1e-12)


def test_cider_d_of_identical_captions_is_10():
    captions = ["a dog barks at night", "rain falls on tin roofs", "two men talk and laugh"]
    assert cider_d(captions, [[caption, caption] for caption in captions]).corpus == pytest.approx(10.0, rel=1e-12)


def test_cider_d_by_hand():
    # Every idf is log 2. One of two 1-grams is shared, cosine 1/2, and nothing longer; the other clip shares nothing:
    # 10 times the mean over four orders and two clips.
    scores = cider_d(["dog barks", "x y"], [["dog growls"], ["rain falls"]])
    assert scores.clips.tolist() == pytest.approx([10 / 8, 0.0], rel=1e-12)
    assert scores.corpus == pytest.approx(10 / 8 / 2, rel=1e-12)
    # Words that occur in all clips have weight 0.
    assert cider_d(["the", "the"], [["the dog"], ["the rain"]]).corpus == 0.0


def test_cider_d_needs_a_corpus():
    with pytest.raises(ValueError, match="at least two clips"):
        cider_d(["a dog"], [["a dog"]])


def test_blank_caption_scores_zero():
    predictions, references = ["", "rain falls"], [["a dog barks"], ["wind blows"]]
    assert bleus(predictions, references)[0] < 1e-12
    assert rouge_l(predictions, references).corpus == 0.0
    assert cider_d(predictions, references).corpus == 0.0
