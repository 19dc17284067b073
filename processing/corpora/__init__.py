"""
Corpora: one loader over dataset builders. The rows of every corpus begin with the same columns.

    id: str, unique in its split
    audio: {path, bytes}, the sound or video file that holds the clip's sound, or its bytes; None without
    frames: list of {path, bytes}: pictures, the first of each second, in order; or one video, which stands for the
        first frame of each of its seconds in [start, end)
    captions: list of str, every reference
    labels: list of str
    start, end: float, the clip's place in the file of `audio`, in seconds; `end` is None where the clip goes on to the
        end of the file
    source: str, the corpus

For files on disk `bytes` is None; bytes hold the clip alone. `rows.open_audio` and `rows.open_frames` open both.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets

ENTRY_POINTS = "dali_llava.corpora"

# name -> "module:class" or the class: a `ListedCorpus`, or a `datasets` builder whose configuration has options and a
# field `splits`. A module is imported when its corpus is first used.
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
    Make a corpus known to `load_corpus`, to the stages and to the commands of this process.

    An installed package registers its corpora for every process with an entry point instead:

        [project.entry-points."dali_llava.corpora"]
        toy = "my_package.toy:Toy"

    Args:
        name: the corpus's name, as given to `load_corpus` and to the commands.
        corpus: a class or "module:class", which is imported on first use: a `listing.ListedCorpus`, or a builder of
            `datasets` with a `BUILDER_CONFIG_CLASS` that declares its options by `options.option` and its `splits`.
    """
    _CORPORA[name] = corpus


def known_corpora() -> dict[str, str | type]:
    """Name -> class or "module:class" of every corpus: the package's own, entry points' and registered ones."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)} | _CORPORA


def corpus_class(name: str) -> type:
    """
    The class of a corpus.

    Raises:
        ValueError: unknown name; it lists the known ones.
    """
    known = known_corpora()
    if name not in known:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(known)}")
    if isinstance(known[name], str):
        module, _, attribute = known[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    return known[name]


def configuration_of(name: str) -> type:
    """The dataclass that declares the options of a corpus and its `splits`; raises as `corpus_class`."""
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
    """Load a corpus, preparing it first where the cache does not hold it.

    Each split is prepared and cached on its own, so that asking for one never makes the others.

    Args:
        name: a registered corpus.
        split: one split; None for all of them.
        streaming: yield the rows one by one; nothing is prepared or cached. `split_dataset_by_node` and the workers of
            a `DataLoader` share them out.
        cache_dir: in place of the cache of `datasets`.
        num_proc: processes that prepare it; the rows do not depend on their number.
        options: options of the corpus (for AVWorld: seed, sizes, recordings; elsewhere `data_dir`, the folder of the
            media, and more).

    Returns:
        the split, or a `DatasetDict` of all splits; an `IterableDataset` or `IterableDatasetDict` when streaming.

    Raises:
        ValueError: unknown corpus, split or option (it lists the known ones), or a list that differs from the
            published form (it names file and line).
        FileNotFoundError: an option names a missing file or folder, or the media are missing.
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
    """All splits of a corpus; a configuration whose splits depend on its options has `find_splits(**options)`."""
    find_splits = getattr(configuration, "find_splits", None)
    return tuple(configuration.splits if find_splits is None else find_splits(**options))


def _builder(corpus: type, cache_dir: str | None, **options: Any) -> "datasets.DatasetBuilder":
    from .builder import ListingBuilder
    from .listing import ListedCorpus

    if inspect.isclass(corpus) and issubclass(corpus, ListedCorpus):
        return ListingBuilder(cache_dir=cache_dir, corpus=corpus(**options))
    return corpus(cache_dir=cache_dir, **options)
