"""
Corpora: one loader over dataset builders, whose rows share their first columns.

    id: str, unique in its split
    audio: {path, bytes}, the sound or video file that holds the clip's sound, or its bytes; None without
    frames: list of {path, bytes}: pictures, the first of each second, in order; or one video, which stands for the
        first frame of each of its seconds in [start, end)
    captions: list of str, every reference
    labels: list of str
    start, end: float, the clip's place in the file of `audio`, in seconds; `end` is None where the clip goes on to the
        file's own end
    source: str, the corpus

Of files on disk `bytes` is None; bytes hold the clip alone. `rows.open_audio` and `rows.open_frames` open both.
"""

import dataclasses
import importlib

import datasets


# name -> (module, builder class); a builder is imported when first asked for. Its configuration has a field `splits`.
_BUILDERS: dict[str, tuple[str, str]] = {
    "avworld": (".avworld.avworld", "AVWorld"),
    "audioset": (".audioset", "AudioSet"),
    "audiocaps": (".audiocaps", "AudioCaps"),
    "clotho": (".clotho", "Clotho"),
    "cav_mae_json": (".cav_mae_json", "CAVMAE"),
    "folder": (".folder", "Folder"),
    "shards": (".shards", "Shards"),
}


def load_corpus(
    name: str,
    split: str | None = None,
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    **options,
) -> datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict:
    """Load a corpus, preparing it first where the cache does not hold it.

    Each split is prepared and cached on its own, so that asking for one never makes the others.

    Args:
        name: a registered corpus.
        split: one split; None for all of them.
        streaming: give the rows as they are asked for; nothing is prepared or cached. `split_dataset_by_node` and the
            workers of a `DataLoader` share them out.
        cache_dir: in place of the cache of `datasets`.
        num_proc: processes that prepare it; the rows do not depend on their number.
        options: fields of the builder's configuration (for AVWorld: seed, sizes, recordings; elsewhere `data_dir`, the
            folder of the media, and more).

    Returns:
        the split, or a `DatasetDict` of all splits; an `IterableDataset` or `IterableDatasetDict` when streaming.

    Raises:
        ValueError: on an unknown corpus, split or option; it lists the known ones. On a list that is not as published;
            it names file and line.
        FileNotFoundError: on an option that names a folder that is not there, and on media that are not.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(_BUILDERS)}")
    module, class_name = _BUILDERS[name]
    builder_class = getattr(importlib.import_module(module, __package__), class_name)
    config_class = builder_class.BUILDER_CONFIG_CLASS
    # A field that a builder declares anew, as `data_dir`, is another object than the one it would inherit.
    own_fields = set(dataclasses.fields(config_class)) - set(dataclasses.fields(datasets.BuilderConfig))
    known = sorted({field.name for field in own_fields} - {"name", "splits"})
    for option in options:
        if option not in known:
            raise ValueError(f"corpus {name!r} has no option {option!r}; known: {', '.join(known)}")
    all_splits = config_class().splits
    if split is not None and split not in all_splits:
        raise ValueError(f"corpus {name!r} has no split {split!r}; known: {', '.join(all_splits)}")

    loaded = {}
    for wanted in config_class(**options).splits if split is None else (split,):
        builder = builder_class(cache_dir=cache_dir, splits=(wanted,), **options)
        if streaming:
            loaded[wanted] = builder.as_streaming_dataset(split=wanted)
        else:
            builder.download_and_prepare(num_proc=num_proc)
            loaded[wanted] = builder.as_dataset(split=wanted)
    if split is not None:
        return loaded[split]
    return datasets.IterableDatasetDict(loaded) if streaming else datasets.DatasetDict(loaded)
