"""Opening of all kinds of rows; broken clips are replaced and counted, also in workers."""

import itertools
import logging

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from dali_llava.processing.corpora.builder import FEATURES
from dali_llava.processing.media import MediaError
from dali_llava.train.data.clips import MOST_IN_A_ROW, ClipOpener, open_frame


RATE = 16_000
BROKEN = (1, 4, 5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Dataset:
    """Eight clips of one second on disk. Clip n has audio and picture of level 0.1 n; three have unreadable audio."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number in range(8):
        sound, picture = folder / f"{number}.wav", folder / f"{number}.png"
        soundfile.write(sound, np.full(RATE, number / 10), RATE)
        if number in BROKEN:
            sound.write_bytes(b"RIFF and no more")
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(picture)
        row = {"id": f"clip {number}", "captions": [str(number)], "labels": [], "start": 0.0, "end": None}
        row |= {"audio": {"path": str(sound), "bytes": None}, "frames": [{"path": str(picture), "bytes": None}]}
        rows.append(row | {"source": "made"})
    return Dataset.from_list(rows, features=FEATURES)


def number_of(clip) -> int:
    """Returns the number of the clip by its audio, and checks that its picture and row agree."""
    number = round(float(clip.audio.mean()) * 10)
    assert clip.image.getpixel((0, 0)) == (20 * number,) * 3 and clip.row["captions"] == [str(number)]
    return number


def test_what_was_asked_for_is_opened(corpus, generators):
    (clip,) = ClipOpener()([corpus[3]], generators(1), image=True, audio=True, sampling_rate=8_000)
    assert clip.audio.shape == (8_000,) and clip.audio.dtype == np.float32 and number_of(clip) == 3
    (clip,) = ClipOpener()([corpus[1]], generators(1), image=True)
    assert clip.audio is None and clip.image.size == (8, 8)
    (clip,) = ClipOpener()([corpus[1]], generators(1))
    assert clip.row == corpus[1] and clip.image is None


def test_without_spares_a_broken_clip_is_an_error(corpus, generators):
    with pytest.raises(MediaError, match="clip 'clip 1': .*1.wav"):
        ClipOpener()([corpus[0], corpus[1]], generators(2), audio=True)


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_another_clip_takes_the_place_of_a_broken_one(corpus, generators, kind, caplog):
    opener = ClipOpener(corpus if kind == "dataset" else corpus.to_iterable_dataset(4).repeat(None))
    drawn = set()
    with caplog.at_level(logging.WARNING):
        for seed in range(20):
            clips = opener([corpus[2], corpus[4], corpus[7]], generators(3, seed), image=True, audio=True)
            first, other, last = map(number_of, clips)
            assert (first, last) == (2, 7) and other not in BROKEN
            drawn.add(other)
    assert drawn == {0, 2, 3, 6, 7}
    assert opener.broken == len(caplog.records) >= 20
    told = caplog.records[0].getMessage()
    assert (
        told.startswith("clip 'clip 4': ")
        and "4.wav" in told
        and told.endswith("the clip is replaced with another one")
    )


def test_replacement_depends_on_the_generator_of_the_broken_row_alone(corpus, generators):
    opener, drawn = ClipOpener(corpus), []
    for seed in (0, 0, 1):
        clips = opener([corpus[1]] * 8, generators(8, seed), image=True, audio=True)
        drawn.append([number_of(clip) for clip in clips])
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1
    others = generators(8)[3:]
    assert [number_of(clip) for clip in opener([corpus[1]] * 5, others, image=True, audio=True)] == drawn[0][3:]


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_workers_share_the_count(corpus, generators, kind):
    opener = ClipOpener(corpus if kind == "dataset" else corpus.to_iterable_dataset(4).repeat(None))
    served = corpus if kind == "dataset" else corpus.to_iterable_dataset(4)
    loader = DataLoader(
        served,
        batch_size=2,
        num_workers=2,
        collate_fn=lambda rows: [number_of(clip) for clip in opener(rows, generators(2), image=True, audio=True)],
        multiprocessing_context="fork",
    )
    found = list(itertools.chain(*loader))
    assert len(found) == 8 and not set(found) & set(BROKEN)
    assert set(found) >= {0, 2, 3, 6, 7} and opener.broken >= 3


def test_a_corpus_of_broken_clips_ends(corpus, generators):
    opener = ClipOpener(corpus.select(BROKEN))
    with pytest.raises(
        MediaError, match=f"{MOST_IN_A_ROW} consecutive clips cannot be opened; last error: clip 'clip "
    ):
        opener([corpus[1]], generators(1), audio=True)
    assert opener.broken == MOST_IN_A_ROW


def test_a_second_that_the_clip_does_not_have(corpus):
    with pytest.raises(MediaError, match="clip 'clip 0': has no second 1; it has 1, counted from 0"):
        open_frame(corpus[0], 1)
