"""Recall, precision and F1 of sources by clip id."""

import pytest

from dali_llava.eval.avworld.source_metrics import class_phrases, majority_source, score_sources, visual_bias
from dali_llava.processing.corpora import load_corpus


CLASSES = {"dog": ["dog", "puppy"], "rain": ["rain"], "engine": ["engine"], "generator": ["generator"]}
CANDIDATES = {"x": "a dog barks in the rain", "y": "an engine hums"}
SOUNDING = {"y": ["generator", "engine"], "x": ["dog", "rain"]}


def score(candidates, sounding=SOUNDING, seen=None, classes=CLASSES):
    return score_sources(candidates, sounding, seen or dict.fromkeys(sounding, []), classes)


def test_score_sources():
    scored = score(CANDIDATES, seen={"x": ["dog"], "y": []})
    assert scored.metrics == {
        "sound_recall": 3 / 4,
        "sound_precision": 1.0,
        "sound_f1": 2 * 3 / (3 + 4),
        "seen_recall": 1.0,
    }
    assert scored.reasons == {}
    assert scored.clips["sound_recall"].clips.tolist() == [1.0, 0.5]


def test_wrong_and_repeated_sources_cost_precision():
    said = {"x": "a dog barks, a puppy yaps and an engine hums", "y": "engines and engines"}
    scored = score(said)
    # Clip x names the dog twice, once too often, and an engine that is not there; clip y names one engine twice.
    assert scored.metrics["sound_recall"] == 2 / 4 and scored.metrics["sound_precision"] == 2 / 5
    assert scored.metrics["sound_f1"] == 2 * 2 / (4 + 5)


def test_a_list_of_all_classes_has_full_recall_and_little_precision():
    classes = class_phrases()
    sounding = {str(number): [name] for number, name in enumerate(classes)}
    everything = " and ".join(f"a {name}" for name in classes)
    scored = score(dict.fromkeys(sounding, everything), sounding, classes=classes)
    share = 1 / len(classes)
    assert scored.metrics["sound_recall"] == 1.0 and scored.metrics["sound_precision"] == share
    assert scored.metrics["sound_f1"] == pytest.approx(2 * share / (1 + share), rel=1e-12)


def test_reference_captions_have_full_recall_and_precision(tmp_path):
    rows = load_corpus("avworld", "test", sizes={"test": 60}, cache_dir=str(tmp_path))
    sounding = {row["id"]: row["labels"] for row in rows}
    for number in range(5):
        scored = score({row["id"]: row["captions"][number] for row in rows}, sounding, classes=class_phrases())
        assert [scored.metrics[name] for name in ("sound_recall", "sound_precision", "sound_f1")] == [1.0] * 3


def test_undefined_shares_have_a_reason():
    scored = score({"x": "silence"}, {"x": ["dog"]})
    assert scored.metrics == {"sound_recall": 0.0, "sound_precision": None, "sound_f1": 0.0, "seen_recall": None}
    assert scored.reasons == {
        "sound_precision": "no caption names a source",
        "seen_recall": "no clip has such a source",
    }
    assert set(scored.clips) == {"sound_recall", "sound_f1"}


@pytest.mark.parametrize(
    ("sounding", "message"),
    [
        ({"x": ["dog"]}, "1 clips have no list of sources for sound_recall, the first is y"),
        ({"x": ["dog"], "y": ["owl"]}, "no phrases for the class 'owl'; known: dog, rain"),
    ],
)
def test_missing_sources(sounding, message):
    with pytest.raises(ValueError, match=message):
        score(CANDIDATES, sounding)


def test_visual_bias():
    assert visual_bias(["a red dog", "a dog"], ["red", "blue"]) == 0.5


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["a dog barking", "a cat meowing", "puppy barks"], "dog"),  # a synonym counts
        (["a dog and a cat", "a cat", "a bell"], "cat"),  # one caption, two votes
        (["a bell", "a cat", "a dog"], "dog"),  # a tie goes to the first of the names
        (["silence", "", "wind"], None),
    ],
)
def test_majority_of_a_recordings_captions(captions, expected):
    assert majority_source(captions, {"dog": ["dog", "puppy"], "cat": ["cat"], "bell": ["bell"]}) == expected
