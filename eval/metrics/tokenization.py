"""Tokenizers for caption metrics: Stanford's PTB tokenizer under Java, and a Python replacement for it.

Published metrics of audio captioning are computed on PTB tokens in lower case without punctuation, as in the COCO
caption evaluation.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer


PTB = "ptb"
PYTHON = "python"
TOKENIZERS = ("auto", PTB, PYTHON, "none")
JAVA_MISSING = "needs Java (version 8 or newer) on the PATH"

# Options of all Java processes: decimal points and English rules in any locale of the user, and messages of the
# virtual machine on stderr, because the results are on stdout.
JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-XX:+DisplayVMOutputToStderr")

# Tokens of the Python tokenizer, most specific first: letters with periods (a.m.), numbers (10,000 and 3.5), words
# with inner hyphens, apostrophes, slashes or underscores, and any other single character.
_TOKEN = re.compile(
    r"""(?:[^\W\d_]\.){2,}
    | \d+(?:[.,:]\d+)+
    | [^\W_]+(?:[-'/_][^\W_]+)*
    | [^\w\s]""",
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=[^\W_])(n't|'(?:s|m|re|ve|d|ll))$")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS) | {'"'}


def find_java(java: str | None = "auto") -> str | None:
    """Path of the Java launcher: on the PATH for "auto", otherwise ``java``. Returns None if it is not found."""
    if java is None:
        return None
    return shutil.which("java" if java == "auto" else java)


def java_message(errors: bytes) -> str | None:
    """The first line that a Java process wrote to stderr, or None.

    Skips lines in which the virtual machine reports JAVA_TOOL_OPTIONS and similar variables.
    """
    lines = errors.decode(errors="replace").strip().splitlines()
    return next((line for line in lines if not line.startswith("Picked up ")), None)


def single_line(caption: str) -> str:
    """The caption with each sequence of white space replaced by a single blank, and lone surrogates replaced."""
    return " ".join(caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


def ptb_tokenize(captions: Sequence[str], java: str | None = "auto") -> list[str]:
    """Tokenizes all captions in one run of Stanford's PTBTokenizer (CoreNLP 3.4.1).

    The command, the options and the removed punctuation are the same as in pycocoevalcap. The text goes through a
    pipe, because pycocoevalcap's wrapper writes it to its installation folder, which may be read-only.

    Args:
        captions: any number of sentences.
        java: path of the Java launcher, or "auto".

    Returns:
        One string per caption: its tokens in lower case, joined by single blanks.

    Raises:
        RuntimeError: Java is missing or the tokenizer fails.
    """
    launcher = find_java(java)
    if launcher is None:
        raise RuntimeError(f"the PTB tokenizer {JAVA_MISSING}")
    if not captions:
        return []
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [launcher, *JAVA_OPTIONS, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    text = "\n".join(single_line(caption) for caption in captions) + "\n"
    process = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "utf-8"], input=text.encode(), capture_output=True
    )
    lines = process.stdout.decode().split("\n")[:-1]
    if process.returncode or len(lines) != len(captions):
        detail = java_message(process.stderr) or f"{len(lines)} lines for {len(captions)} captions"
        raise RuntimeError(f"the PTB tokenizer failed under {launcher}: {detail}")
    removed = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(token for token in line.split() if token not in removed) for line in lines]


def python_tokenize(captions: Sequence[str]) -> list[str]:
    """Approximates :func:`ptb_tokenize` with regular expressions, for machines without Java.

    Text is in lower case and clitics are separated ("it's" -> "it 's", "don't" -> "do n't"). Hyphenated words, numbers
    and dotted abbreviations are single tokens. Brackets become -lrb- and -rrb-, and punctuation is removed. Scores on
    these tokens are close to scores on PTB tokens, but not equal.
    """
    return [" ".join(_python_tokens(caption)) for caption in captions]


def _python_tokens(caption: str) -> list[str]:
    tokens = []
    for token in _TOKEN.findall(caption.translate(_QUOTES).lower()):
        if token in _PUNCTUATION:
            continue
        token = _BRACKETS.get(token, token)
        tokens.extend(("can", "not") if token == "cannot" else _CLITIC.sub(r" \1", token).split())
    return tokens


def tokenize(captions: Sequence[str], tokenizer: str = "auto", java: str | None = "auto") -> tuple[list[str], str]:
    """Tokenizes captions and returns the name of the tokenizer.

    Args:
        captions: any number of sentences. Equal sentences are tokenized once.
        tokenizer: "ptb", "python", "none" (the captions are already tokens joined by blanks), or "auto": PTB if Java
            runs, else Python.
        java: path of the Java launcher, "auto" (PATH), or None to run without Java.

    Returns:
        The tokenized captions, and the name of the tokenizer that was used.

    Raises:
        ValueError: the tokenizer is unknown.
        RuntimeError: ``tokenizer`` is "ptb" and PTB cannot run.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {tokenizer!r}: choose from {', '.join(TOKENIZERS)}")
    if tokenizer == "none":
        return list(captions), tokenizer
    distinct = list(dict.fromkeys(captions))
    used = PYTHON if tokenizer == PYTHON or (tokenizer == "auto" and find_java(java) is None) else PTB
    tokens = None
    if used == PTB:
        try:
            tokens = ptb_tokenize(distinct, java)
        except RuntimeError:
            # A launcher may be on the PATH but not run, as on a Mac without a Java runtime.
            if tokenizer == PTB:
                raise
            used = PYTHON
    if tokens is None:
        tokens = python_tokenize(distinct)
    table = dict(zip(distinct, tokens, strict=True))
    return [table[caption] for caption in captions], used


def tokenize_pairs(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "auto", java: str | None = "auto"
) -> tuple[list[str], list[list[str]], str]:
    """Tokenizes predictions and their references in one run; see :func:`tokenize`.

    Returns:
        The tokenized predictions, all tokenized references in order, and the name of the tokenizer.

    Raises:
        ValueError: the two lengths differ, there are no predictions, or a prediction has no reference.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} lists of references: give one each")
    if not predictions:
        raise ValueError("no predictions to score")
    empty = [index for index, captions in enumerate(references) if not captions]
    if empty:
        raise ValueError(f"prediction {empty[0]} has no reference: give every prediction at least one")
    flat = [*predictions, *(caption for captions in references for caption in captions)]
    tokens, used = tokenize(flat, tokenizer, java)
    rest = iter(tokens[len(predictions) :])
    return tokens[: len(predictions)], [[next(rest) for _ in captions] for captions in references], used
