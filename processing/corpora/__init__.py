"""Corpora: one loader over dataset builders, whose rows share a schema (id, audio, frames, captions, labels, ...)."""

import dataclasses
import importlib

import datasets


# name -> (module, builder class); a builder is imported when first asked for. Its configuration has a field `splits`.
_BUILDERS: dict[str, tuple[str, str]] = {
    "avworld": (".avworld.avworld", "AVWorld"),
}


def load_corpus(
    name: str, split: str | None = None, *, cache_dir: str | None = None, num_proc: int | None = None, **options
) -> datasets.Dataset | datasets.DatasetDict:
    """Load a corpus, preparing it first where the cache does not hold it.

    Each split is prepared and cached on its own, so that asking for one never makes the others.

    Args:
        name: a registered corpus.
        split: one split; None for all of them.
        cache_dir: in place of the cache of `datasets`.
        num_proc: processes that prepare it; the rows do not depend on their number.
        options: fields of the builder's configuration (for AVWorld: seed, sizes, recordings).

    Returns:
        the split, or a `DatasetDict` of all splits.

    Raises:
        ValueError: on an unknown corpus, split or option; it lists the known ones.
        FileNotFoundError: on an option that names a folder that is not there.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(_BUILDERS)}")
    module, class_name = _BUILDERS[name]
    builder_class = getattr(importlib.import_module(module, __package__), class_name)
    own_fields = {field.name for field in dataclasses.fields(builder_class.BUILDER_CONFIG_CLASS)}
    known = sorted(own_fields - {field.name for field in dataclasses.fields(datasets.BuilderConfig)} - {"splits"})
    for option in options:
        if option not in known:
            raise ValueError(f"corpus {name!r} has no option {option!r}; known: {', '.join(known)}")
    all_splits = builder_class.BUILDER_CONFIG_CLASS().splits
    if split is not None and split not in all_splits:
        raise ValueError(f"corpus {name!r} has no split {split!r}; known: {', '.join(all_splits)}")

    loaded = {}
    for wanted in all_splits if split is None else (split,):
        builder = builder_class(cache_dir=cache_dir, splits=(wanted,), **options)
        builder.download_and_prepare(num_proc=num_proc)
        loaded[wanted] = builder.as_dataset(split=wanted)
    return datasets.DatasetDict(loaded) if split is None else loaded[split]
