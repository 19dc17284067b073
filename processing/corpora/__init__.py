"""
Corpora: one loader over dataset builders. The rows of every corpus begin with the same columns.

    id: str, unique within the split
    audio: {path, bytes}, the sound or video file with the clip's sound, or its content; None for a clip without sound
    frames: list of {path, bytes}: the first frame of each second as pictures, in order; or a single video, which
        stands for the first frame of each of its seconds in [start, end)
    captions: list of str, all reference captions
    labels: list of str
    start, end: float, the clip's position in the `audio` file in seconds; `end` is None for a clip that extends to
        the end of the file
    source: str, name of the corpus

`bytes` is None for files on disk; otherwise it contains the clip alone. `rows.open_audio` and `rows.open_frames` read
both forms.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets

ENTRY_POINTS = "dali_llava.corpora"

# name -> "module:class" or the class: a `ListedCorpus`, or a `datasets` builder with a configuration that has options
# and a field `splits`. A module is imported when its corpus is first used.
_CORPORA: dict[str, str | type] = {
    "avworld": "dali_llava.processing.corpora.avworld.avworld:AVWorld",
    "audioset": "dali_llava.processing.corpora.audioset:AudioSet",
    "audiocaps": "dali_llava.processing.corpora.audiocaps:AudioCaps",
    "clotho": "dali_llava.processing.corpora.clotho:Clotho",
    "cav_mae_json": "dali_llava.processing.corpora.cav_mae_json:CAVMAE",
    "folder": "dali_llava.processing.corpora.folder:Folder",
    "shards": "dali_llava.processing.corpora.shards:Shards",
}


def register_corpus(name: str, corpus: str | type) -> None:
    """
    Register a corpus for `load_corpus`, the stages and the commands in this process.

    An installed package registers its corpora for every process with an entry point instead:

        [project.entry-points."dali_llava.corpora"]
        toy = "my_package.toy:Toy"

    Args:
        name: name of the corpus in `load_corpus` and the commands.
        corpus: a class, or "module:class" to import it on first use. The class is a `listing.ListedCorpus`, or a
            `datasets` builder with a `BUILDER_CONFIG_CLASS` that declares `splits`, and options with
            `options.option`.
    """
    _CORPORA[name] = corpus


def known_corpora() -> dict[str, str | type]:
    """All corpora, name -> class or "module:class": built-in corpora, entry points and registered corpora."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)} | _CORPORA


def corpus_class(name: str) -> type:
    """
    The class of a corpus.

    Raises:
        ValueError: the name is unknown; the message lists the known names.
    """
    known = known_corpora()
    if name not in known:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(known)}")
    if isinstance(known[name], str):
        module, _, attribute = known[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    return known[name]


def configuration_of(name: str) -> type:
    """The dataclass that declares the options and `splits` of a corpus. Raises the errors of `corpus_class`."""
    found = corpus_class(name)
    return getattr(found, "BUILDER_CONFIG_CLASS", found)


def load_corpus(
    name: str,
    split: str | None = None,
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    **options: Any,
) -> "datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict":
    """Load a corpus. Prepare it first if it is not in the cache.

    Each split is prepared and cached separately, so loading one split does not prepare the others.

    Args:
        name: name of a registered corpus.
        split: name of the split to load; all splits by default.
        streaming: whether to yield the rows one by one, without preparing or caching them. `split_dataset_by_node` and
            the workers of a `DataLoader` can divide the stream.
        cache_dir: cache folder; the cache of `datasets` by default.
        num_proc: number of processes that prepare the corpus. The rows do not depend on it.
        options: options of the corpus: seed, sizes and recordings for AVWorld; `data_dir`, the folder of the media,
            and more for the others.

    Returns:
        The split, or a `DatasetDict` of all splits. With `streaming`, an `IterableDataset` or `IterableDatasetDict`.

    Raises:
        ValueError: the corpus, split or option is unknown (the message lists the known ones), or a list of clips
            differs from the published format (the message names file and line).
        FileNotFoundError: a file or folder in the options does not exist, or the media are missing.
    """
    import datasets

    from .options import options_of

    configuration = configuration_of(name)
    known = sorted(option.name for option in options_of(configuration))
    for option in options:
        if option not in known:
            raise ValueError(f"corpus {name!r} has no option {option!r}; known: {', '.join(known)}")
    splits = _splits(configuration, options)
    if split is not None and split not in splits:
        raise ValueError(f"corpus {name!r} has no split {split!r}; known: {', '.join(splits)}")

    loaded = {}
    for wanted in configuration(**options).splits if split is None else (split,):
        builder = _builder(corpus_class(name), cache_dir, splits=(wanted,), **options)
        if streaming:
            loaded[wanted] = builder.as_streaming_dataset(split=wanted)
        else:
            builder.download_and_prepare(num_proc=num_proc)
            loaded[wanted] = builder.as_dataset(split=wanted)
    if split is not None:
        return loaded[split]
    return datasets.IterableDatasetDict(loaded) if streaming else datasets.DatasetDict(loaded)


def _splits(configuration: type, options: dict[str, Any]) -> tuple[str, ...]:
    """All splits of a corpus. A configuration has `find_splits(**options)` if its splits depend on the options."""
    find_splits = getattr(configuration, "find_splits", None)
    return tuple(configuration.splits if find_splits is None else find_splits(**options))


def _builder(corpus: type, cache_dir: str | None, **options: Any) -> "datasets.DatasetBuilder":
    from .builder import ListingBuilder
    from .listing import ListedCorpus

    if inspect.isclass(corpus) and issubclass(corpus, ListedCorpus):
        return ListingBuilder(cache_dir=cache_dir, corpus=corpus(**options))
    return corpus(cache_dir=cache_dir, **options)
