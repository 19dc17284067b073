"""Tokenizers for caption metrics: Stanford's PTB tokenizer under Java, and a Python stand-in where Java is missing.

The published numbers of audio captioning are computed on PTB tokens, lower case, punctuation removed, as in the COCO
caption evaluation. A metric module copies this file beside itself when ``evaluate.load`` loads it, so it imports no
sibling.
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

# Options of every Java process: decimal points and English rules whatever the user's locale, and messages of the
# virtual machine on stderr, since the answers are on stdout.
JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-XX:+DisplayVMOutputToStderr")

# Tokens of the Python tokenizer, most special first: letters with periods (a.m.), numbers (10,000 and 3.5), words with
# inner hyphens, apostrophes, slashes or underscores, and any other sign by itself.
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
    """Path of the Java launcher: the one on the PATH for "auto", else ``java`` itself; None when there is none."""
    if java is None:
        return None
    return shutil.which("java" if java == "auto" else java)


def java_message(errors: bytes) -> str | None:
    """The first line that a Java process wrote to stderr about itself, None where there is none.

    Skips the lines in which the virtual machine repeats JAVA_TOOL_OPTIONS and the like.
    """
    lines = errors.decode(errors="replace").strip().splitlines()
    return next((line for line in lines if not line.startswith("Picked up ")), None)


def single_line(caption: str) -> str:
    """The caption with every run of white space and line breaks made one blank, and lone surrogates replaced."""
    return " ".join(caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


def ptb_tokenize(captions: Sequence[str], java: str | None = "auto") -> list[str]:
    """Tokenizes all captions in one run of Stanford's PTBTokenizer (CoreNLP 3.4.1).

    The command, the options and the removed punctuation are those of pycocoevalcap. The text goes through a pipe, as
    pycocoevalcap's own wrapper writes it into its installation folder, which may be read-only.

    Args:
        captions: any number of sentences.
        java: path of the Java launcher, or "auto".

    Returns:
        One string a caption: its tokens in lower case, joined by single blanks.

    Raises:
        RuntimeError: if Java is missing or the tokenizer fails.
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
    """A regular-expression approximation of :func:`ptb_tokenize` for machines without Java.

    Lower case; clitics apart ("it's" -> "it 's", "don't" -> "do n't"); hyphenated words whole; numbers and dotted
    abbreviations whole; brackets as -lrb- and -rrb-; punctuation removed. Scores on these tokens are close to, and
    not the same as, published ones.
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
    """Tokenizes captions and says with what.

    Args:
        captions: any number of sentences; equal ones are tokenized once.
        tokenizer: "ptb", "python", "none" (the captions are tokens joined by blanks already), or "auto": PTB where
            Java runs, else Python.
        java: path of the Java launcher, "auto" (PATH), or None to go without.

    Returns:
        The tokenized captions, and the name of the tokenizer that was used.

    Raises:
        ValueError: for an unknown tokenizer.
        RuntimeError: if "ptb" is asked for and cannot run.
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
            # A launcher may be on the PATH and still not run, as on a Mac without a Java runtime.
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
        Tokenized predictions, tokenized references (all of them, in order), and the tokenizer's name.

    Raises:
        ValueError: if the two lengths differ, there is nothing to score, or a prediction has no reference.
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
