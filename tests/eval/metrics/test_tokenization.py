"""The PTB tokenizer under Java, and its replacement in Python."""

import shutil

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from dali_llava.eval.metrics.tokenization import java_message, ptb_tokenize, python_tokenize, tokenize, tokenize_pairs


needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the PTB tokenizer needs Java on the PATH")

CASES = {
    "A dog barks, then a man speaks.": "a dog barks then a man speaks",
    "It's loud; the dog doesn't stop!": "it 's loud the dog does n't stop",
    "A walkie-talkie (old) at 10 a.m.": "a walkie-talkie -lrb- old -rrb- at 10 a.m.",
    "“Quoted” music – 1,000 volts…": "quoted music 1,000 volts",
    "Rain cannot stop\nhere": "rain can not stop here",
    "...": "",
    "": "",
}


def test_python_tokenizer():
    assert python_tokenize(list(CASES)) == list(CASES.values())


@needs_java
def test_ptb_tokenizer():
    assert ptb_tokenize(list(CASES)) == list(CASES.values())


@needs_java
def test_ptb_equals_pycocoevalcap_and_nearly_python(audiocaps):
    captions = [caption for clip in sorted(audiocaps)[:200] for caption in audiocaps[clip]]
    theirs = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    ours = ptb_tokenize(captions)
    assert ours == [theirs[i][0] for i in range(len(captions))]
    differing = sum(a != b for a, b in zip(ours, python_tokenize(captions), strict=True))
    assert differing / len(captions) < 0.01


def test_without_java():
    assert tokenize(["A dog."], java=None) == (["a dog"], "python")
    assert tokenize(["A dog."], java="no-such-launcher") == (["a dog"], "python")
    with pytest.raises(RuntimeError, match="needs Java"):
        tokenize(["A dog."], "ptb", java=None)


def test_pairs_keep_order_and_every_reference():
    pairs = tokenize_pairs(["A.", "B."], [["C!", "A."], ["D", "E", "C!"]], "python")
    assert pairs == (["a", "b"], [["c", "a"], ["d", "e", "c"]], "python")
    assert tokenize_pairs(["A."], [["B."]], "none") == (["A."], [["B."]], "none")


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [], "1 predictions but 0"),
        ([], [], "no predictions"),
        (["a", "b"], [["c"], []], "prediction 1 has no reference"),
    ],
)
def test_pairs_reject(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        tokenize_pairs(predictions, references, "python")


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match="unknown tokenizer 'word'"):
        tokenize(["a"], "word")


@needs_java
def test_the_locale_and_the_options_of_java_do_not_matter(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    captions = ["A dog barks 1.5 times, then 10,000 bells ring.", "cut \ud83d emoji"]
    assert ptb_tokenize(captions) == ["a dog barks 1.5 times then 10,000 bells ring", "cut emoji"]


def test_the_message_of_java_is_not_its_options():
    errors = b"Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nError: out of memory\n"
    assert java_message(errors) == "Error: out of memory"
    assert java_message(b"Picked up _JAVA_OPTIONS: -Xmx1g\n") is None


@pytest.mark.parametrize("tokenizer", [pytest.param("ptb", marks=needs_java), "python"])
def test_blanks_before_punctuation_make_no_difference(tokenizer):
    apart = ["a dog barking , a bell ringing and rain .", "what can you see ?", "an owl , a cat"]
    together = ["a dog barking, a bell ringing and rain.", "what can you see?", "an owl, a cat"]
    assert tokenize(apart, tokenizer)[0] == tokenize(together, tokenizer)[0]
