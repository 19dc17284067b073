"""Arguments and loading of a corpus, shared by the commands that read one."""

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any


PREFIX = "corpus_"  # prefix of the attributes for options of a corpus


def is_known(name: str | None) -> bool:
    """Whether `name` is the name of a corpus."""
    from dali_llava.processing.corpora import known_corpora

    return name in known_corpora()


def add_corpus_options(
    parser: argparse.ArgumentParser, name: str | None, may_be_shards: bool = True, without: Collection[str] = ()
) -> None:
    """
    Add an argument for each option of a corpus.

    Args:
        parser: parser of the command.
        name: name of the corpus. Anything else, such as a folder of shards, has no options.
        may_be_shards: whether a folder of shards takes precedence over a corpus of the same name, as in `open_corpus`.
        without: options that the command sets.
    """
    from dali_llava.processing.corpora import configuration_of
    from dali_llava.processing.corpora.options import options_of

    parser.set_defaults(corpus_options=())
    if not is_known(name) or (may_be_shards and is_shards(name)):
        return
    configuration = configuration_of(name)
    group = parser.add_argument_group(f"options of {name}")
    options = [option for option in options_of(configuration) if option.name not in without]
    for option in options:
        group.add_argument(_flag(parser, name, option.name), dest=PREFIX + option.name, **_argument(option))
    parser.set_defaults(corpus_options=[option.name for option in options])


def _flag(parser: argparse.ArgumentParser, corpus: str, option: str) -> str:
    """Return --OPTION, or --CORPUS-OPTION if the command already has an option of that name."""
    flag = f"--{option.replace('_', '-')}"
    return f"--{corpus}-{flag[2:]}" if flag in parser._option_string_actions else flag


def first_positional(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """Return the first word that is not an option of `parser` or the value of one; None if there is none."""
    options, words = parser._option_string_actions, iter(words)
    for word in words:
        if not word.startswith("-"):
            return word
        if word in options and options[word].nargs is None:
            next(words, None)
    return None


def _argument(option) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for an option of a corpus."""
    settings = {"help": option.metadata["help"], "required": option.metadata["required"]}
    if option.type is bool:
        action = argparse.BooleanOptionalAction if option.default else "store_true"
        return settings | {"action": action, "default": option.default}
    settings |= {"default": argparse.SUPPRESS, "metavar": option.metadata["metavar"]}
    settings["type"] = _json if option.type is dict else option.type
    if option.metadata["choices"]:
        settings |= {"choices": option.metadata["choices"]}
    return settings


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON such as '{{\"test\": 50}}', not {text!r}") from error


def corpus_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the corpus in `args`, as keyword arguments of `load_corpus`."""
    return {name: getattr(args, PREFIX + name) for name in args.corpus_options if hasattr(args, PREFIX + name)}


def example_options(name: str, split: str | None = None) -> str:
    """Return the options of a corpus for an example in the help: required options and those with an example value."""
    from dali_llava.processing.corpora import configuration_of
    from dali_llava.processing.corpora.options import options_of

    configuration, words = configuration_of(name), []
    for option in options_of(configuration):
        example = option.metadata["example"]
        if option.name == "data_dir" and not option.metadata["required"]:
            example = "media"
        if example is not None:
            words.append(f"--{option.name.replace('_', '-')} {example}")
    if len(configuration.splits) > 1:
        words.append(f"--split {split or configuration.splits[-1]}")
    return " ".join(words)


def is_shards(corpus: str) -> bool:
    """Whether CORPUS is the folder or URL of shards instead of the name of a corpus."""
    return "/" in corpus or Path(corpus, "index.json").is_file()


def open_corpus(corpus: str, split: str | None, args: argparse.Namespace, streaming: bool = False):
    """
    Load the rows of a corpus or of a folder of shards.

    Args:
        corpus: name for `load_corpus`, or a folder of shards, which has no options.
        split: name of the split; None for the only one.
        args: arguments, including those of `add_corpus_options`.
        streaming: as in `load_corpus`.

    Returns:
        The rows, and the name of the split.

    Raises:
        ValueError, FileNotFoundError: as in `load_corpus`, or if `split` is None and the corpus has several splits.
    """
    from dali_llava.processing.corpora import load_corpus

    if is_shards(corpus):
        index = Path(corpus, "index.json")
        if "://" not in corpus and not index.is_file():
            remedy = "`dali-llava prepare` writes it; for a folder of clips, use the corpus `folder` with --data-dir"
            raise FileNotFoundError(f"{index}: no such file, so {corpus} contains no shards; {remedy}")
        from dali_llava.processing.corpora.shards import ShardsConfig

        split = split or ShardsConfig.find_splits(data_dir=corpus)[0]
        return load_corpus("shards", split, streaming=streaming, data_dir=corpus), split
    return open_named_corpus(corpus, split, args, streaming)


def open_named_corpus(corpus: str, split: str | None, args: argparse.Namespace, streaming: bool = False, **fixed: Any):
    """Load a corpus by name, as in `open_corpus`. `fixed` are options that the command sets."""
    from dali_llava.processing.corpora import configuration_of, load_corpus

    splits = tuple(configuration_of(corpus).splits)
    if split is None and len(splits) > 1:
        raise ValueError(f"corpus {corpus!r} has several splits; choose --split from {', '.join(splits)}")
    split = split or splits[0]
    return load_corpus(corpus, split, streaming=streaming, **corpus_options(args), **fixed), split
