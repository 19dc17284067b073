"""Features on disk equal computed ones, survive interruptions, and are checked when they are read."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset

from dali_llava.processing.media import MediaError, load_audio
from dali_llava.train.data import feature_cache
from dali_llava.train.data.augmentation import UNCHANGED
from dali_llava.train.data.clips import ClipOpener, open_frame
from dali_llava.train.data.collators import AlignmentCollator, pixel_values
from dali_llava.train.data.feature_cache import FeatureChoice, with_features
from dali_llava.train.data.feature_shards import FeatureShards
from dali_llava.train.losses import LOSSES
from dali_llava.train.trainers import AlignmentModel


ALL = FeatureChoice(frames=None, sounds=True, dtype=torch.float32)
Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def corpus(rows) -> Dataset:
    """Four clips. The last one has one frame, the others have four."""
    return Dataset.from_list([*rows[:-1], rows[-1] | {"frames": rows[-1]["frames"][:1]}])


@pytest.fixture
def one_per_shard(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_CLIPS", 1)


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The shards that are written, in order."""
    shards, write = [], FeatureShards.write

    def recorded(self, shard, clips):
        write(self, shard, clips)
        shards.append(shard)

    monkeypatch.setattr(FeatureShards, "write", recorded)
    return shards


@pytest.fixture
def stored(corpus, captioner, avworld_processor) -> Dataset:
    return with_features(corpus, captioner.model.train(), avworld_processor, ALL)


def expected_tokens(model, processor, row, frame) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().encode_image(pixel_values([open_frame(row, frame)], processor))[0]


def test_stored_spectrograms_are_the_extractors(stored, avworld_processor, rows):
    assert set(stored[0]) == {"id", "input_features", "image_tokens"}
    extractor = avworld_processor.feature_extractor
    for index, row in enumerate(rows):
        expected = extractor(load_audio(row["audio"]["bytes"]), return_tensors="np")["input_features"][0]
        found = np.asarray(stored[index]["input_features"])
        assert found.dtype == np.float32 and found.shape == (256, 64)
        # the filter bank sums in a different order for one clip and for a batch
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert stored[index]["id"] == row["id"]


def test_stored_image_tokens_are_every_frames(stored, captioner, avworld_processor, rows):
    for index, row in enumerate(rows):
        found = stored[index]["image_tokens"]
        assert found.shape == (1 if index == len(rows) - 1 else 4, 36, 32) and found.dtype == torch.float32
        for frame, tokens in enumerate(found):
            expected = expected_tokens(captioner.model, avworld_processor, row, frame)
            torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


def test_stored_features_give_the_same_pairs(stored, captioner, avworld_processor, rows):
    collator = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)
    expected, batch = collator(rows), collator([stored[index] for index in range(len(rows))])
    assert set(batch) == {"id", "input_features", "image_tokens"} and batch["id"] == expected["id"]
    assert torch.equal(batch["input_features"], expected["input_features"])
    with torch.no_grad():
        tokens = captioner.eval().model.encode_image(expected["pixel_values"])
    torch.testing.assert_close(batch["image_tokens"], tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("choice", [ALL, FeatureChoice(frames=4, dtype=torch.float32)])
def test_augmented_pairs_are_the_same_from_stored_features_and_from_media(
    corpus, captioner, avworld_processor, rows, choice
):
    stored = with_features(corpus, captioner.model, avworld_processor, choice)
    collator = AlignmentCollator(avworld_processor)
    expected, batch = collator(rows[:3]), collator([stored[index] for index in range(3)])
    torch.testing.assert_close(batch["input_features"], expected["input_features"])
    with torch.no_grad():
        tokens = captioner.eval().model.encode_image(expected["pixel_values"])
    torch.testing.assert_close(batch["image_tokens"], tokens, rtol=0, atol=1e-5)


def test_augmented_pairs_draw_a_stored_frame(stored, avworld_processor):
    drawn = AlignmentCollator(avworld_processor)([stored[0]] * 40)["image_tokens"]
    frames = stored[0]["image_tokens"]
    chosen = {index for tokens in drawn for index, frame in enumerate(frames) if torch.equal(tokens, frame)}
    assert chosen == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("choice", "count", "seconds"),
    [
        (FeatureChoice(), 10, [5]),  # the sixth of ten, as in the reference evaluation
        (FeatureChoice(frames=2), 10, [2, 7]),
        (FeatureChoice(frames=3), 4, [0, 2, 3]),
        (FeatureChoice(frames=9), 4, [0, 1, 2, 3]),
        (FeatureChoice(frames=None), 3, [0, 1, 2]),
        (FeatureChoice(frames=2, frame=4), 10, [4]),
    ],
)
def test_frames_are_evenly_spaced(choice, count, seconds):
    pictures = [{"path": f"{second}.png", "bytes": None} for second in range(count)]
    assert choice.seconds({"id": "a", "frames": pictures, "start": 0.0, "end": None}) == seconds


def test_rows_without_spectrograms_keep_their_sound(corpus, captioner, avworld_processor):
    stored = with_features(corpus, captioner.model, avworld_processor, FeatureChoice(frames=2))
    assert set(stored[0]) == {"id", "audio", "start", "end", "image_tokens"}
    for index, frames in enumerate([[1, 3], [1, 3], [1, 3], [0]]):
        found = stored[index]["image_tokens"]
        expected = [expected_tokens(captioner.model, avworld_processor, corpus[index], frame) for frame in frames]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), torch.stack(expected), rtol=2**-8, atol=1e-5)
    collator = AlignmentCollator(avworld_processor, UNCHANGED, opener=ClipOpener(stored))
    batch = collator([stored[0], stored[3]])
    assert batch["image_tokens"].shape == (2, 36, 32)
    expected = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)([corpus[0], corpus[3]])
    assert torch.equal(batch["input_features"], expected["input_features"])


def test_a_sound_that_cannot_be_opened_is_replaced_with_its_tokens(corpus, captioner, avworld_processor):
    rows = Dataset.from_list(
        [row | {"audio": {"bytes": b"", "path": None}} if i else row for i, row in enumerate(corpus)]
    )
    stored = with_features(rows, captioner.model, avworld_processor, FeatureChoice(frame=0))
    batch = AlignmentCollator(avworld_processor, UNCHANGED, opener=ClipOpener(stored))([stored[1], stored[2]])
    for name in ("image_tokens", "input_features"):
        assert torch.equal(batch[name][0], batch[name][1])
    assert torch.equal(batch["image_tokens"][0], stored[0]["image_tokens"][0])


def tower_gradient(objective, towers, batch) -> torch.Tensor:
    """The gradient of the audio tower, flattened."""
    torch.manual_seed(0)
    model = AlignmentModel(towers, LOSSES[objective].from_captioner(towers)).train()
    towers.zero_grad()
    model(**{name: value for name, value in batch.items() if name != "id"}).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in towers.audio_tower.parameters() if weight.grad is not None])


@pytest.mark.parametrize("objective", ["mmd", "contrastive", "ot"])
def test_gradients_equal_uncached_ones_within_bfloat16(corpus, towers, avworld_processor, objective):
    towers.eval()
    stored = with_features(corpus, towers, avworld_processor, FeatureChoice(frame=0))
    collate = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)
    cached, uncached = collate(list(stored)), collate(list(corpus))
    with torch.no_grad():
        tokens = towers.encode_image(uncached["pixel_values"])
    rounded = {"image_tokens": tokens.bfloat16(), "input_features": uncached["input_features"]}
    found = tower_gradient(objective, towers, cached)
    # Rounding the tokens is the only difference ...
    torch.testing.assert_close(found, tower_gradient(objective, towers, rounded), rtol=1e-4, atol=1e-7)
    # ... and it changes each token by at most 2**-9 of its size. The gradients differ in the same order of magnitude.
    expected = tower_gradient(objective, towers, uncached)
    assert 0 < (found - expected).norm() <= 2**-7 * expected.norm()


def test_computing_draws_no_numbers(corpus, towers, avworld_processor, written):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with_features(corpus, towers, avworld_processor, FeatureChoice(frames=3))
    assert written == [0] and torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_run_continues(
    corpus, towers, avworld_processor, one_per_shard, written, tmp_path, monkeypatch
):
    whole = with_features(corpus, towers, avworld_processor, folder=tmp_path / "whole")
    assert written == [0, 1, 2, 3]
    write = FeatureShards.write

    def killed(self, shard, clips):
        if shard == 2:
            raise KeyboardInterrupt
        write(self, shard, clips)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureShards, "write", killed)
        with_features(corpus, towers, avworld_processor, folder=tmp_path / "part")
    assert sorted(path.name for path in (tmp_path / "part").glob("*.safetensors")) == [
        "features-00000.safetensors",
        "features-00001.safetensors",
    ]
    written.clear()
    resumed = with_features(corpus, towers, avworld_processor, folder=tmp_path / "part")
    assert written == [2, 3]
    for index in range(4):
        assert torch.equal(resumed[index]["image_tokens"], whole[index]["image_tokens"])
    written.clear()
    with_features(corpus, towers, avworld_processor, folder=tmp_path / "part")
    assert not written


def test_a_truncated_shard_is_named_and_computed_again(
    corpus, towers, avworld_processor, one_per_shard, written, tmp_path
):
    before = [row["image_tokens"] for row in with_features(corpus, towers, avworld_processor, folder=tmp_path)]
    path = tmp_path / "features-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    remedy = rf"{path}: is damaged \(.*\); delete it, and the next run computes it again"
    with pytest.raises(ValueError, match=remedy):
        with_features(corpus, towers, avworld_processor, folder=tmp_path)
    path.unlink()
    written.clear()
    after = [row["image_tokens"] for row in with_features(corpus, towers, avworld_processor, folder=tmp_path)]
    assert written == [1] and all(map(torch.equal, before, after))


@pytest.mark.parametrize("choice", [FeatureChoice(), ALL])
def test_changed_bytes_are_found_when_they_are_read(corpus, towers, avworld_processor, tmp_path, choice):
    stored = with_features(corpus, towers, avworld_processor, choice, folder=tmp_path)
    path = tmp_path / "features-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last tensor of the file, the features of the last clip
    path.write_bytes(content)
    stored = with_features(corpus, towers, avworld_processor, choice, folder=tmp_path)
    assert len(stored[0]["image_tokens"])
    with pytest.raises(
        ValueError, match="features-00000.safetensors: is damaged .the checksum of clip 3 does not match"
    ):
        stored[3]


def test_features_of_another_tower_are_refused(corpus, towers, avworld_processor, written, tmp_path):
    with_features(corpus, towers, avworld_processor, folder=tmp_path)
    first = with_features(corpus, towers, avworld_processor)
    with torch.no_grad():
        next(towers.vision_tower.parameters()).mul_(1.5)
    written.clear()
    with pytest.raises(
        ValueError, match=r"other settings \(different: vision_tower\); give another folder, --feature"
    ):
        with_features(corpus, towers, avworld_processor, folder=tmp_path)
    assert not written
    # the default folder depends on the weights
    assert not torch.equal(
        with_features(corpus, towers, avworld_processor)[0]["image_tokens"], first[0]["image_tokens"]
    )
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="features-00000.safetensors: contains the features of other clips or models"):
        with_features(corpus, towers, avworld_processor, folder=tmp_path)


def test_other_clips_and_frames_are_named(corpus, towers, avworld_processor, tmp_path):
    with_features(corpus, towers, avworld_processor, folder=tmp_path)
    with pytest.raises(ValueError, match=r"\(different: clips\)"):
        with_features(corpus.select(range(3)), towers, avworld_processor, folder=tmp_path)
    with pytest.raises(ValueError, match=r"\(different: frames\)"):
        with_features(corpus, towers, avworld_processor, FeatureChoice(frames=2), folder=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}/manifest.json: is damaged .*; delete {tmp_path}"):
        with_features(corpus, towers, avworld_processor, folder=tmp_path)


def test_a_replaced_picture_is_another_clip(corpus, towers, avworld_processor, tmp_path):
    picture = tmp_path / "a.png"
    open_frame(corpus[0], 0).save(picture)
    others = [corpus[0], corpus[1] | {"frames": []}]
    rows = Dataset.from_list([*others, corpus[2] | {"frames": [{"path": str(picture), "bytes": None}]}])
    first = with_features(rows, towers, avworld_processor)[1]["image_tokens"]
    open_frame(corpus[1], 0).save(picture)
    second = with_features(rows, towers, avworld_processor)[1]["image_tokens"]
    assert not torch.equal(first, second)


def test_a_small_disk_is_refused(corpus, towers, avworld_processor, written, tmp_path, monkeypatch, capsys):
    # one frame of 36 tokens of width 32 in two bytes: 2304 bytes per clip
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**6, 0, 4 * 2304 - 1))
    with pytest.raises(
        ValueError,
        match=f"feature_cache {tmp_path}: the features of 4 clips need 9.22 kB, but 9.21 kB are free; give",
    ):
        with_features(corpus, towers, avworld_processor, folder=tmp_path)
    assert not written and not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**6, 0, 4 * 2304))
    with_features(corpus, towers, avworld_processor, folder=tmp_path)
    told = capsys.readouterr().err
    assert f"{tmp_path}: computing the features of 4 clips, 9.22 kB (9.22 kB free)" in told
    assert (tmp_path / "features-00000.safetensors").stat().st_size >= 4 * 2304


def test_the_size_of_all_frames_is_estimated(corpus, towers, avworld_processor, tmp_path, capsys):
    with_features(corpus, towers, avworld_processor, ALL, folder=tmp_path)
    # 13 frames of four clips in four bytes, and four spectrograms
    size = 4 * (13 * 36 * 32 + 4 * 256 * 64)
    assert f"{size / 1e6:.3g} MB (" in capsys.readouterr().err
    assert 0 <= (tmp_path / "features-00000.safetensors").stat().st_size - size < 1000


@pytest.mark.parametrize(
    ("count", "text"),
    [(589_824e6, "0.59 TB"), (50e9, "50 GB"), (123e6, "0.123 GB"), (9216, "9.22 kB"), (7e15, "7e+03 TB")],
)
def test_sizes_are_readable(count, text):
    assert feature_cache._size(count) == text


def test_clips_that_cannot_be_opened_are_not_tried_again(
    corpus, towers, avworld_processor, tmp_path, caplog, monkeypatch
):
    rows = Dataset.from_list([row | {"frames": row["frames"] if i != 1 else []} for i, row in enumerate(corpus)])
    first = with_features(rows, towers, avworld_processor, ALL, folder=tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"clip '{rows[1]['id']}': the row has no frames; add a video or pictures; the clip is skipped",
        f"{tmp_path}: 1 of 4 clips could not be opened and are left out",
    ]
    caplog.clear()
    monkeypatch.setattr(feature_cache, "open_frames", None)
    again = with_features(rows, towers, avworld_processor, ALL, folder=tmp_path)
    assert "1 of 4 clips" in caplog.text and "is skipped" not in caplog.text
    assert first["id"][:] == again["id"][:] == [rows[index]["id"] for index in (0, 2, 3)]
    kept = with_features(corpus, towers, avworld_processor, ALL)
    for index, other in enumerate((0, 2, 3)):
        assert torch.equal(again[index]["input_features"], kept[other]["input_features"])
        torch.testing.assert_close(again[index]["image_tokens"], kept[other]["image_tokens"], rtol=0, atol=1e-5)


def test_many_broken_clips_in_a_row_stop_the_run(corpus, towers, avworld_processor, tmp_path):
    clips = [dict(corpus[0], frames=[], id=f"{index}") for index in range(120)]
    rows = Dataset.from_list(clips, features=corpus.features)
    with pytest.raises(
        MediaError, match="100 consecutive clips cannot be opened; last error: clip '99': the row has no"
    ):
        with_features(rows, towers, avworld_processor, folder=tmp_path)
    with pytest.raises(ValueError, match="none of 20 clips can be opened"):
        with_features(rows.select(range(20)), towers, avworld_processor, folder=tmp_path / "few")
    assert not list((tmp_path / "few").glob("*.safetensors"))


def test_the_alignment_trains_from_stored_tokens(run_stage, run_dir, tmp_path):
    words = ["--augmentation_noise", "0", "--augmentation_roll", "0", "--frame", "2", "--cache_features"]
    plain = run_stage("aligned", run_dir / "prefix", tmp_path / "plain", *words, "none").pretrained
    folder = ["--feature_cache", str(tmp_path / "features"), "--dataloader_num_workers", "2"]
    stored = run_stage("aligned", run_dir / "prefix", tmp_path / "stored", *words, "disk", *folder).pretrained
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["train"]
    assert not list(stored.vision_tower.parameters())
    start = dict(type(plain).from_pretrained(run_dir / "prefix").audio_tower.named_parameters())
    expected = dict(plain.audio_tower.named_parameters())
    for name, weight in stored.audio_tower.named_parameters():
        moved = (expected[name] - start[name]).norm()
        # the key's bias has no gradient but rounding, which Adam scales to full steps
        assert name.endswith("k_proj.bias") or (weight - expected[name]).norm() <= 0.1 * moved, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache_features", "ram"], "cache_features: unknown value 'ram'; choose none, disk or all"),
        (["--cache_frames", "0"], "cache_frames: 0 frames per clip; give at least 1"),
    ],
)
def test_wrong_arguments(run_stage, run_dir, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run_stage("aligned", run_dir / "prefix", tmp_path, *words)


def test_the_tower_stage_has_no_image_tokens(run_stage, run_dir, tmp_path):
    with pytest.raises(ValueError, match="cache_features: this stage uses no image tokens, which disk stores"):
        run_stage("tower", run_dir / "prefix", tmp_path, "--cache_features", "disk")


def compute_as(rank: int, folder: Path, rows: Dataset, towers, processor) -> None:
    """Computes one clip per shard as one of two ranks, and writes the indices of the shards that it wrote."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    PartialState._reset_state()
    PartialState(cpu=True)
    write, written = FeatureShards.write, []
    FeatureShards.write = lambda self, shard, clips: (write(self, shard, clips), written.append(shard))
    with_features(rows, towers, processor, folder=folder / "shared")
    (folder / f"{rank}.json").write_text(json.dumps(written))


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_two_ranks_share_the_missing_shards(corpus, towers, avworld_processor, one_per_shard, tmp_path):
    alone = with_features(corpus, towers, avworld_processor, folder=tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "shared")
    for shard in (0, 2, 3):
        (tmp_path / "shared" / f"features-{shard:05d}.safetensors").unlink()
    context = torch.multiprocessing.get_context("fork")
    arguments = (tmp_path, corpus, towers, avworld_processor)
    ranks = [context.Process(target=compute_as, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[0, 3], [2]]
    shared = with_features(corpus, towers, avworld_processor, folder=tmp_path / "shared")
    for index in range(4):
        torch.testing.assert_close(shared[index]["image_tokens"], alone[index]["image_tokens"], rtol=2**-7, atol=1e-5)
