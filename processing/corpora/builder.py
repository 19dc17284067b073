"""The `datasets` builder of listed corpora."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from . import listing, names
from .listing import ListedCorpus


NUM_SHARDS = 128  # units of work for the processes of num_proc, nodes and data loader workers

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")},
        "frames": [{"path": datasets.Value("string"), "bytes": datasets.Value("binary")}],
        "captions": [datasets.Value("string")],
        "labels": [datasets.Value("string")],
        "start": datasets.Value("float64"),
        "end": datasets.Value("float64"),
        "source": datasets.Value("string"),
    }
)


@dataclass
class ListingConfig(datasets.BuilderConfig):
    """The configuration of `ListingBuilder`: the corpus to read."""

    name: str = "listing"
    corpus: ListedCorpus | None = None

    def __post_init__(self):
        super().__post_init__()
        self.name = self.corpus.name

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Read the rows into `rows` and return the cache key, which depends on the rows and the source code."""
        self.rows = {split: self.corpus.select_rows(split) for split in self.corpus.splits}
        digest = hashlib.sha256(str(custom_features or "").encode())
        for path in (__file__, names.__file__, listing.__file__, inspect.getfile(type(self.corpus))):
            digest.update(Path(path).read_bytes())
        for split, rows in self.rows.items():
            for row in rows:
                digest.update(json.dumps([split, row]).encode())
        return f"{self.name}-{digest.hexdigest()[:16]}"


class ListingBuilder(datasets.GeneratorBasedBuilder):
    """The rows of a `ListedCorpus` as a dataset."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ListingConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=inspect.getdoc(type(self.config.corpus)) or "", features=FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(split, gen_kwargs={"split": split, "ranges": shard(len(rows))})
            for split, rows in self.config.rows.items()
        ]

    def _generate_examples(self, split: str, ranges: list[tuple[int, int]]) -> Iterator[tuple[str, dict]]:
        for start, stop in ranges:
            for row in self.config.rows[split][start:stop]:
                yield row["id"], row


def shard(count: int) -> list[tuple[int, int]]:
    """The (first, last + 1) indices of up to `NUM_SHARDS` shards of `count` rows, in order."""
    shards = min(NUM_SHARDS, count)
    return [(count * number // shards, count * (number + 1) // shards) for number in range(shards)]
