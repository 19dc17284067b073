"""Whole-word search, and the shares that use it."""

import pytest

from dali_llava.eval.metrics.phrases import asserting_share, contains_phrase, named_share


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("A dog barks", "dog", True),
        ("Two DOGS bark.", "dog", True),
        ("a hotdog stand", "dog", False),
        ("dogged rain", "dog", False),
        ("church bells ring", "church bell", True),
        ("a bell in a church", "church bell", False),
        ("the dog's bowl", "dog", True),
        ("babies cry", "baby", True),
        ("buses pass", "bus", True),
        ("a train-horn blows", "train horn", True),
        ("a dog", "dogs", False),
        ("", "dog", False),
    ],
)
def test_contains_phrase(text, phrase, expected):
    assert contains_phrase(text, phrase) is expected


def test_named_share_is_a_micro_average():
    predictions = ["a dog barks in the rain", "silence", "a siren"]
    sources = [[["dog", "puppy"], ["rain", "shower"]], [["engine"]], [["siren", "alarm"]]]
    assert named_share(predictions, sources) == 3 / 4
    assert named_share(["a puppy"], [[["dog", "puppy"]]]) == 1.0


def test_clips_without_sources_do_not_count():
    assert named_share(["a dog", "rain"], [[], [["rain"]]]) == 1.0
    assert named_share(["a dog"], [[]]) is None


def test_asserting_share():
    answers = ["a red dog", "redness", "a dog on grass", "something"]
    assert asserting_share(answers, ["red", "grass"]) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: named_share(["a"], []), "1 predictions but 0"),
        (lambda: named_share(["a"], [[[]]]), "a source of clip 0"),
        (lambda: named_share(["a"], [["dog"]]), "'dog': give it a list"),
        (lambda: named_share(["a"], [[["!"]]]), "has no word"),
        (lambda: asserting_share([], ["red"]), "no predictions"),
        (lambda: asserting_share(["a"], []), "at least one word"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
