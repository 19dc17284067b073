"""Reading shards: each row is returned once, for any number of readers."""

import io
import json
import os
import shutil

import datasets
import fsspec
import numpy as np
import pytest
import soundfile
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.rows import count_frames, open_audio, open_frames
from dali_llava.processing.media import MediaError
from dali_llava.processing.shards import ClipSettings, prepare_shards
from dali_llava.processing.shards.clip import prepare_clip


def stream_shards(folder) -> datasets.IterableDataset:
    return load_corpus("shards", "train", streaming=True, data_dir=folder)


def test_rows_come_back_as_they_went_in(corpus, unbroken):
    rows = list(stream_shards(unbroken))
    assert len(rows) == len(corpus)
    for row, source in zip(rows, corpus, strict=True):
        for name in ("id", "captions", "labels", "start", "end", "source"):
            assert row[name] == source[name]
        np.testing.assert_array_equal(open_audio(row), open_audio(source))
        assert row["audio"]["path"] == f"{row['id']}.flac" and len(row["frames"]) == 2
        for frame, pixels in zip(open_frames(row), open_frames(source), strict=True):
            assert frame.size == pixels.size
            assert np.abs(np.asarray(frame, float) - np.asarray(pixels, float)).mean() < 12  # JPEG of random colours


def test_clips_are_opened_where_they_lie_in_any_order(corpus, unbroken, tmp_path):
    streamed = list(stream_shards(unbroken))
    rows = load_corpus("shards", "train", data_dir=unbroken, cache_dir=tmp_path, num_proc=2)
    assert rows.num_rows == 20 and rows.data.nbytes < 20_000  # positions, not bytes
    assert rows["id"] == corpus["id"] and rows["captions"] == corpus["captions"]
    for number in (13, 0, 19, 13):
        row = rows[number]
        assert row["audio"]["bytes"] is None and len(row["frames"]) == 2
        np.testing.assert_array_equal(open_audio(row), open_audio(streamed[number]))
        assert open_frames(row) == open_frames(streamed[number]) and count_frames(row) == 2
        assert open_frames(row, [1]) == open_frames(row)[1:]
    again = prepare_clip(rows[2], ClipSettings())
    assert again.files["flac"] == streamed[2]["audio"]["bytes"] and set(again.files) == {
        "flac",
        "0.jpg",
        "1.jpg",
        "json",
    }


def test_an_archive_that_went_or_ends_early_is_named(unbroken, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder)
    rows = load_corpus("shards", "train", data_dir=folder, cache_dir=tmp_path)
    os.truncate(folder / "shard-000001.tar", 3000)
    with pytest.raises(MediaError, match=r"clip 'clip-003': .*shard-000001.tar: is damaged \(it ends within clip-003"):
        open_audio(rows[3])
    os.remove(folder / "shard-000000.tar")
    with pytest.raises(MediaError, match=r"clip 'clip-000': .*shard-000000.tar: cannot be read \(No such file"):
        open_frames(rows[0])
    for size, name in ((0, "000000"), (3000, "000001")):
        with pytest.raises(ValueError, match=rf"shard-{name}.tar: is damaged \({size} bytes of \d+\); copy it again"):
            load_corpus("shards", "train", data_dir=folder, cache_dir=tmp_path / "new")
        shutil.copy(unbroken / f"shard-{name}.tar", folder)
    with pytest.raises(ValueError, match=r"memory://x: is not a local folder; pass streaming=True"):
        fsspec.filesystem("memory").pipe("/x/index.json", (unbroken / "index.json").read_bytes())
        load_corpus("shards", "train", data_dir="memory://x", cache_dir=tmp_path)


def test_a_file_url_is_a_folder(unbroken, tmp_path):
    rows = load_corpus("shards", "train", data_dir=f"file://{unbroken}", cache_dir=tmp_path)
    assert len(rows) == len(list(stream_shards(f"file://{unbroken}"))) == 20


def test_a_cut_clip_is_not_cut_again(made, tmp_path):
    soundfile.write(tmp_path / "a.wav", made["noise"](9.0), 16_000)
    rows = made["as_corpus"]([made["make_row"]("a/b.c", tmp_path / "a.wav", start=4.0, end=6.5)])
    prepare_shards(rows, tmp_path / "out", ClipSettings(require=("audio",)), num_proc=1)
    (row,) = stream_shards(tmp_path / "out")
    assert (row["id"], row["start"], row["end"], row["frames"]) == ("a/b.c", 4.0, 6.5, [])
    np.testing.assert_allclose(open_audio(row), made["noise"](9.0)[64_000:104_000], rtol=0, atol=2**-15)


def test_a_folder_behind_fsspec(unbroken, corpus):
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(unbroken), "memory://clips", recursive=True)
        assert list(stream_shards("memory://clips")) == list(stream_shards(unbroken))
        assert stream_shards("memory://clips").num_shards == 7
    finally:
        memory.rm("/clips", recursive=True)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_shards_without_overlap(unbroken, corpus, world_size):
    parts = [
        [row["id"] for row in split_dataset_by_node(stream_shards(unbroken), rank, world_size)]
        for rank in range(world_size)
    ]
    assert sorted(name for part in parts for name in part) == corpus["id"]
    assert all(parts)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_of_a_loader_share_the_shards(unbroken, corpus, num_workers):
    rank = split_dataset_by_node(stream_shards(unbroken).select_columns("id"), 0, 1)
    loader = DataLoader(rank, num_workers=num_workers, batch_size=None, multiprocessing_context="fork")
    assert sorted(row["id"] for row in loader) == corpus["id"]


def test_shards_are_shuffled_and_resumed(unbroken, corpus):
    shuffled = stream_shards(unbroken).shuffle(seed=1, buffer_size=4)
    names = [row["id"] for row in shuffled]
    assert names != corpus["id"] and sorted(names) == corpus["id"]
    plain = stream_shards(unbroken)
    iterator = iter(plain)
    first = [next(iterator)["id"] for _ in range(7)]
    state = plain.state_dict()
    again = stream_shards(unbroken)
    again.load_state_dict(state)
    assert first + [row["id"] for row in again] == corpus["id"]


def test_a_folder_that_is_not_finished_or_not_there(unbroken, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", "memory://nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"index.json: no such file, or not reachable; `dali-llava prepare`"
        ):
            stream_shards(folder)
    (tmp_path / "index.json").write_text(json.dumps({"shards": []}))
    with pytest.raises(ValueError, match="lists no shards"):
        stream_shards(tmp_path)


@pytest.mark.parametrize("size", [700, 3000, 12_000])
def test_a_damaged_shard_is_named(unbroken, tmp_path, size):
    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder)
    os.truncate(folder / "shard-000002.tar", size)
    with pytest.raises(ValueError, match=r"shard-000002.tar: is damaged \(.*\); copy it again"):
        list(stream_shards(folder))


def test_a_shard_that_is_no_archive(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "copy")
    (tmp_path / "copy" / "shard-000000.tar").write_bytes(io.BytesIO(b"no tar" * 1000).getvalue())
    with pytest.raises(ValueError, match=r"shard-000000.tar: is damaged"):
        next(iter(stream_shards(tmp_path / "copy")))


def test_shards_answer_to_the_split_that_they_were_made_of(unbroken, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder)
    index = json.loads((folder / "index.json").read_text())
    for name, splits in (("audioset/unbalanced_train", "unbalanced_train, train"), ("mine", "train"), (None, "train")):
        index["settings"]["corpus"] = name
        (folder / "index.json").write_text(json.dumps(index))
        for split in splits.split(", "):
            rows = load_corpus("shards", split, data_dir=folder, cache_dir=tmp_path / "cache")
            assert len(rows) == len(list(load_corpus("shards", split, data_dir=folder, streaming=True))) == 20
        with pytest.raises(ValueError, match=f"corpus 'shards' has no split 'test'; known: {splits}$"):
            load_corpus("shards", "test", data_dir=folder)
