"""Recall of sources by clip id."""

import pytest

from dali_llava.eval.avworld.source_metrics import majority_source, score_sources, visual_bias


CANDIDATES = {"x": "a dog barks in the rain", "y": "an engine hums"}
SOUNDING = {"y": [["generator"], ["engine"]], "x": [["dog", "puppy"], ["rain"]]}


def test_score_sources():
    metrics, reasons = score_sources(CANDIDATES, SOUNDING, {"x": [["dog"]], "y": []})
    assert metrics == {"sound_recall": 3 / 4, "seen_recall": 1.0} and reasons == {}


def test_unknown_sources_have_a_reason():
    metrics, reasons = score_sources(CANDIDATES, SOUNDING)
    assert metrics == {"sound_recall": 3 / 4, "seen_recall": None} and set(reasons) == {"seen_recall"}
    metrics, reasons = score_sources(CANDIDATES, SOUNDING, {"x": [], "y": []})
    assert metrics["seen_recall"] is None and reasons == {"seen_recall": "no clip has such a source"}


def test_missing_clip():
    with pytest.raises(ValueError, match="1 clips have no list of sources for sound_recall, the first is y"):
        score_sources(CANDIDATES, {"x": [["dog"]]})


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
