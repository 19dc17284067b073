"""Common behaviour of the real corpora: schema, loader, cache and streaming."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from dali_llava.processing import corpora
from dali_llava.processing.corpora import (
    audiocaps,
    audioset,
    builder,
    cav_mae_json,
    clotho,
    folder,
    listing,
    load_corpus,
)
from dali_llava.processing.corpora.avworld.avworld import FEATURES


BUILDERS = {
    "audioset": audioset,
    "audiocaps": audiocaps,
    "clotho": clotho,
    "cav_mae_json": cav_mae_json,
    "folder": folder,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, dict]:
    """Three clips of each corpus. Returns its split and the options that load it."""
    root = tmp_path_factory.mktemp("corpora")
    media = root / "media"
    media.mkdir()
    for name in "abc":
        (media / f"{name}.wav").touch()
    segments = "".join(f'{name}, 0.000, 10.000, "/m/1"\n' for name in "abc")
    captions = "".join(f"{number},{name},0,Rain\n" for number, name in enumerate("abc"))
    entries = [{"video_id": name, "wav": f"/x/{name}.wav", "video_path": "/x", "labels": "Rain"} for name in "abc"]
    for name, text in {
        "eval_segments.csv": segments,
        "class_labels_indices.csv": "index,mid,display_name\n0,/m/1,Rain\n",
        "test.csv": "audiocap_id,youtube_id,start_time,caption\n" + captions,
        "clotho_captions_evaluation.csv": f"file_name,{','.join(clotho.CAPTIONS)}\n"
        + "".join(f"{name}.wav,1,2,3,4,5\n" for name in "abc"),
        "list.json": json.dumps({"data": entries}),
    }.items():
        (root / name).write_text(text)
    return {
        "audioset": {"split": "eval", "csv": str(root), "data_dir": str(media)},
        "audiocaps": {"split": "test", "csv": str(root), "data_dir": str(media)},
        "clotho": {"split": "evaluation", "csv": str(root), "data_dir": str(media)},
        "cav_mae_json": {"split": "train", "json": str(root / "list.json"), "data_dir": str(media)},
        "folder": {"split": "train", "data_dir": str(media)},
    }


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A folder of 1000 clips."""
    root = tmp_path_factory.mktemp("many")
    for number in range(1000):
        (root / f"{number:03d}.wav").touch()
    return root


@pytest.mark.parametrize("name", BUILDERS)
def test_every_corpus_has_the_first_columns_of_avworld(name, places, tmp_path):
    corpus = load_corpus(name, cache_dir=tmp_path, **places[name])
    assert corpus.features == datasets.Features(dict(itertools.islice(FEATURES.items(), 8)))
    assert len(corpus) == 3 and set(corpus["source"]) == {name}
    stream = load_corpus(name, cache_dir=tmp_path, streaming=True, **places[name])
    assert isinstance(stream, datasets.IterableDataset) and stream.features == corpus.features
    assert list(stream) == corpus.to_list()


@pytest.mark.parametrize("name", BUILDERS)
def test_cache_key_depends_on_the_source(name, places, tmp_path, monkeypatch):
    def key() -> str:
        options = dict(places[name])
        corpus = corpora.corpus_class(name)(splits=options.pop("split"), **options)
        return builder.ListingConfig(corpus=corpus).create_config_id(options)

    keys = [key()]
    assert key() == keys[0] and keys[0].startswith(f"{name}-")
    for module in (BUILDERS[name], listing):
        changed = tmp_path / f"{module.__name__}.py"
        changed.write_bytes(Path(module.__file__).read_bytes() + b"\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            keys.append(key())
    assert len(set(keys)) == 3 and key() == keys[0]


def test_a_corpus_is_prepared_once(places, tmp_path, monkeypatch):
    first = load_corpus("folder", cache_dir=tmp_path, **places["folder"])
    monkeypatch.setattr(builder.ListingBuilder, "_generate_examples", None)
    assert load_corpus("folder", cache_dir=tmp_path, **places["folder"]).to_list() == first.to_list()


def test_without_a_split_all_are_loaded(places, tmp_path):
    options = {key: value for key, value in places["folder"].items() if key != "split"}
    assert list(load_corpus("folder", cache_dir=tmp_path, **options)) == ["train"]
    stream = load_corpus("folder", cache_dir=tmp_path, streaming=True, **options)
    assert isinstance(stream, datasets.IterableDatasetDict) and len(list(stream["train"])) == 3


def test_rows_do_not_depend_on_the_number_of_processes(many, tmp_path):
    one = load_corpus("folder", "train", data_dir=many, cache_dir=tmp_path / "one")
    two = load_corpus("folder", "train", data_dir=many, cache_dir=tmp_path / "two", num_proc=2)
    assert one["id"] == two["id"] == [f"{number:03d}" for number in range(1000)]


@pytest.mark.parametrize(("nodes", "workers"), [(1, 0), (1, 2), (2, 2), (3, 2), (4, 0), (5, 1)])
def test_nodes_and_workers_share_a_stream_out(nodes, workers, many, tmp_path):
    stream = load_corpus("folder", "train", data_dir=many, cache_dir=tmp_path, streaming=True)
    assert stream.num_shards == 128
    parts = []
    for rank in range(nodes):
        part = split_dataset_by_node(stream, rank=rank, world_size=nodes)
        parts.append([row["id"] for row in DataLoader(part, batch_size=None, num_workers=workers)])
    assert all(parts)
    assert sorted(itertools.chain(*parts)) == [f"{number:03d}" for number in range(1000)]


def test_a_stream_resumes_where_it_stopped(many, tmp_path):
    stream = load_corpus("folder", "train", data_dir=many, cache_dir=tmp_path, streaming=True)
    seen = [row["id"] for row in itertools.islice(stream, 500)]
    state = stream.state_dict()
    resumed = load_corpus("folder", "train", data_dir=many, cache_dir=tmp_path, streaming=True)
    resumed.load_state_dict(state)
    assert seen + [row["id"] for row in resumed] == [f"{number:03d}" for number in range(1000)]


def test_avworld_streams_too(tmp_path):
    options = {"sizes": {"val": 3}, "cache_dir": tmp_path}
    stream = load_corpus("avworld", "val", streaming=True, **options)
    assert list(stream) == load_corpus("avworld", "val", **options).to_list()


def test_options_are_those_of_the_corpus(tmp_path):
    with pytest.raises(ValueError, match="no option 'seed'; known: csv, data_dir, missing, whole_videos$"):
        load_corpus("audiocaps", "test", seed=1)
    with pytest.raises(ValueError, match="'avworld' has no option 'data_dir'; known: recordings, seed, sizes$"):
        load_corpus("avworld", "test", data_dir=tmp_path)
    with pytest.raises(ValueError, match="'clotho' has no split 'test'; known: development, validation, evaluation$"):
        load_corpus("clotho", "test")
    with pytest.raises(ValueError, match="audiocaps has no split 'dev'; known: train, val, test"):
        audiocaps.AudioCaps(splits=["dev"])
    with pytest.raises(
        ValueError, match="unknown corpus 'vggsound'; known: avworld, audioset, audiocaps, clotho, cav_"
    ):
        load_corpus("vggsound")


def test_options_and_splits_are_known_without_datasets_and_torch():
    """Importing the corpora and their options in a new process, as the help of the commands does."""
    code = f"""
import sys
from dali_llava.processing.corpora import configuration_of
from dali_llava.processing.corpora.options import options_of
for name in {list(BUILDERS)}:
    corpus = configuration_of(name)
    assert corpus.splits and "data_dir" in [option.name for option in options_of(corpus)]
sys.exit("datasets" in sys.modules or "torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


OUTSIDE = '''
from collections.abc import Sequence
from dataclasses import dataclass

from dali_llava.processing.corpora.listing import ListedCorpus, find_media, media_columns
from dali_llava.processing.corpora.options import option


@dataclass
class Toy(ListedCorpus):
    """Toy clips, all with the same label."""

    name = "toy"
    splits: Sequence[str] = ("train", "test")
    label: str = option("label of every clip", default="thing")

    def read_rows(self, split):
        row = {"captions": [], "labels": [self.label], "start": 0.0, "end": None, "source": self.name}
        return [row | {"id": name} | media_columns(files) for name, files in find_media(self).items()]
'''


def test_a_corpus_of_another_package_is_registered_or_an_entry_point(places, tmp_path, monkeypatch):
    (tmp_path / "toy_corpus.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(corpora, "_CORPORA", dict(corpora._CORPORA))
    options = {"data_dir": places["folder"]["data_dir"], "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match="unknown corpus 'toy'"):
        load_corpus("toy", "test", **options)
    corpora.register_corpus("toy", "toy_corpus:Toy")
    rows = load_corpus("toy", "test", label="rain", **options)
    assert rows["id"] == ["a", "b", "c"] and rows["labels"] == [["rain"]] * 3
    with pytest.raises(ValueError, match="'toy' has no split 'dev'; known: train, test"):
        load_corpus("toy", "dev", **options)

    package = tmp_path / "toy_corpus-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-corpus\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[dali_llava.corpora]\ninstalled_toy = toy_corpus:Toy\n")
    assert load_corpus("installed_toy", "train", **options)["labels"] == [["thing"]] * 3
