"""Batches: labels cover exactly the answer, audio and image belong to the same clip, and audio is augmented."""

import copy
import io

import pytest
import torch
from PIL import Image

from dali_llava.processing.media import load_audio
from dali_llava.train.avworld.token_views import TokenViewCollator
from dali_llava.train.avworld.tower import SoundCollator
from dali_llava.train.data.augmentation import UNCHANGED, Augmentation
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import (
    IGNORED,
    AlignmentCollator,
    CaptionCollator,
    SupervisedCollator,
    pixel_values,
)
from dali_llava.train.data.draws import Draws


GRID = 36  # number of image tokens: 48 pixels in patches of 8
HEARD = 64  # number of audio tokens of 2.56 s


def assert_labels_are_the_answers(batch, rows, processor) -> None:
    """The labels are exactly the answer's tokens and the end token."""
    tokenizer = processor.tokenizer
    for input_ids, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        learnt = labels != IGNORED
        start = int(learnt.int().argmax())
        assert learnt[start:].all() and not learnt[:start].any()
        assert torch.equal(labels[learnt], input_ids[learnt])
        assert labels[-1] == tokenizer.eos_token_id
        expected = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        assert labels[learnt].tolist() == [*expected, tokenizer.eos_token_id]
        assert tokenizer.decode(labels[learnt], skip_special_tokens=True) == row["answer"]
        before = tokenizer.decode(input_ids[:start], skip_special_tokens=True)
        assert before.endswith("assistant:") or before.endswith("assistant :")


@pytest.mark.parametrize(
    "media", [{"image": True, "prefix": True}, {"audio": True}, {"image": True, "audio": True, "prefix": True}, {}]
)
def test_labels_cover_answer_and_end_token(avworld_processor, rows, media):
    batch = CaptionCollator(avworld_processor, **media)(rows)
    assert_labels_are_the_answers(batch, rows, avworld_processor)
    tokenizer = avworld_processor.tokenizer
    expanded = {"<image>": GRID, "<audio>": HEARD, "<prefix>": 16}
    for token, count in expanded.items():
        placeholder = batch["input_ids"] == tokenizer.convert_tokens_to_ids(token)
        present = media.get(token.strip("<>"), False)
        assert placeholder.sum(-1).tolist() == [count * present] * len(rows)
        assert (batch["labels"][placeholder] == IGNORED).all()
    padding = batch["attention_mask"] == 0
    assert padding.any() and not padding[:, -1].any()  # answers differ in length and are padded on the left
    assert (batch["labels"][padding] == IGNORED).all()
    assert ("pixel_values" in batch) == media.get("image", False)
    assert ("input_features" in batch) == media.get("audio", False)


def test_caption_batches_hold_the_rows_own_media(avworld_processor, rows):
    batch = CaptionCollator(avworld_processor, image=True, audio=True, frame=2)(rows)
    for index, row in enumerate(rows):
        alone = avworld_processor(
            text="<image><audio>",
            images=Image.open(io.BytesIO(row["frames"][2]["bytes"])).convert("RGB"),
            audio=load_audio(row["audio"]["bytes"]),
            return_tensors="pt",
        )
        assert torch.equal(batch["pixel_values"][index], alone["pixel_values"][0])
        assert torch.equal(batch["input_features"][index], alone["input_features"][0])


@pytest.mark.parametrize("kind", ["caption", "supervised"])
def test_batches_of_several_frames_show_the_whole_clip(avworld_processor, rows, kind):
    """Three of the four stored frames of each row, in the order of the rows."""
    processor = copy.copy(avworld_processor)
    processor.num_frames = 3
    if kind == "caption":
        collator = CaptionCollator(processor, image=True, audio=True)
    else:
        collator = SupervisedCollator(processor, "what ?", ("audiovisual",))
    batch = collator(rows)
    shown = [Image.open(io.BytesIO(row["frames"][index]["bytes"])) for row in rows for index in (0, 2, 3)]
    assert torch.equal(batch["pixel_values"], pixel_values(shown, avworld_processor))
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [3 * GRID] * len(rows)
    assert (batch["labels"][batch["input_ids"] == processor.image_token_id] == IGNORED).all()
    if kind == "caption":
        assert_labels_are_the_answers(batch, rows, processor)
    sample, _ = collator.sample(rows[1])
    assert torch.equal(pixel_values(sample.image(), avworld_processor), batch["pixel_values"][3:6])
    collator.frame = 1  # one frame that is asked for
    second = [Image.open(io.BytesIO(row["frames"][1]["bytes"])) for row in rows]
    assert torch.equal(collator(rows)["pixel_values"], pixel_values(second, avworld_processor))


def test_random_frame_reaches_every_frame(rows, generators):
    frames = [frame["bytes"] for frame in rows[0]["frames"]]
    pixels = [Image.open(io.BytesIO(frame)).convert("RGB").tobytes() for frame in frames]
    drawn = {open_frame(rows[0], generator).tobytes() for generator in generators(60)}
    assert drawn == set(pixels)
    assert open_frame(rows[0], 1).tobytes() == pixels[1]


@pytest.fixture
def image_tokens() -> torch.Tensor:
    """One picture per row: (4, 36, 32)."""
    return torch.randn(4, GRID, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("view", [(True, 0), (False, 50), (True, 41)])
def test_token_views_have_their_placeholders(avworld_processor, rows, view_rows, image_tokens, view, monkeypatch):
    collator = TokenViewCollator(avworld_processor, image_tokens, drawn=(36, 64))
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: view)
    mixed = view_rows([True, False, True, True])
    batch = collator(mixed)
    placeholders = (batch["input_ids"] == avworld_processor.image_token_id).sum(-1).tolist()
    tokens = GRID * view[0] + view[1]
    assert placeholders == [tokens, 0, tokens, tokens]
    assert [view.shape for view in batch["image_tokens"]] == [(tokens, 32)] * 3
    if view[0]:
        assert torch.equal(torch.stack(batch["image_tokens"])[:, :GRID], image_tokens[:3])
    assert_labels_are_the_answers(batch, rows, avworld_processor)
    assert batch["id"] == [f"{row['id']}/0" for row in rows]
    assert set(batch) == {"id", "input_ids", "attention_mask", "labels", "image_tokens"}


def test_pictures_follow_the_batchs_order(avworld_processor, view_rows, image_tokens, monkeypatch):
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: (True, 0))
    dialogues = view_rows([True, False, True, True])
    batch = TokenViewCollator(avworld_processor, image_tokens, drawn=(36, 64))([dialogues[i] for i in (3, 1, 0, 3)])
    assert torch.equal(torch.stack(batch["image_tokens"]), image_tokens[[2, 0, 2]])  # row 1 has none


def test_two_pictures_of_one_row_are_one_set_of_tokens(avworld_processor, view_rows, image_tokens, monkeypatch):
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: (True, 5))
    dialogues = view_rows([True] * 4)
    dialogues[1]["pictures"] = [1, 3]
    batch = TokenViewCollator(avworld_processor, image_tokens, drawn=(36, 64))(dialogues[:2])
    assert torch.equal(batch["image_tokens"][1][: 2 * GRID], torch.cat([image_tokens[1], image_tokens[3]]))
    placeholders = (batch["input_ids"] == avworld_processor.image_token_id).sum(-1).tolist()
    assert placeholders == [GRID + 5, 2 * GRID + 5]


def test_view_of_the_grid_is_what_the_processor_writes(avworld_processor, rows, view_rows, image_tokens, monkeypatch):
    """Ids, padding and labels equal those of plain captioning."""
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: (True, 0))
    batch = TokenViewCollator(avworld_processor, image_tokens, drawn=(36, 64))(view_rows([True] * 4))
    plain = CaptionCollator(avworld_processor, image=True)(rows)
    assert plain["attention_mask"].min() == 0
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], plain[name]), name


def test_rows_of_text_alone_have_no_view(avworld_processor, rows, view_rows, image_tokens):
    batch = TokenViewCollator(avworld_processor, image_tokens, drawn=(36, 64))(view_rows([False] * 4))
    assert set(batch) == {"id", "input_ids", "attention_mask", "labels"}
    assert_labels_are_the_answers(batch, rows, avworld_processor)


def test_a_quarter_of_the_views_are_the_grid_half_drawn_a_quarter_both(avworld_processor, image_tokens, generators):
    collator = TokenViewCollator(avworld_processor, image_tokens, drawn=(5, 8))
    views = [collator.draw_view(generator) for generator in generators(800)]
    kinds = [(grid, extra > 0) for grid, extra in views]
    counts = [kinds.count(kind) for kind in ((True, False), (False, True), (True, True))]
    assert sum(counts) == 800
    assert all(abs(count - mean) < 60 for count, mean in zip(counts, (200, 400, 200), strict=True))
    assert {extra for _, extra in views if extra} == {5, 6, 7, 8}


def test_pairs_without_augmentation_are_first_frame_and_clean_sound(avworld_processor, rows):
    batch = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)
    extractor = avworld_processor.feature_extractor
    expected = extractor([load_audio(row["audio"]["bytes"]) for row in rows])["input_features"]
    frames = [Image.open(io.BytesIO(row["frames"][0]["bytes"])).convert("RGB") for row in rows]
    assert torch.equal(batch["input_features"], expected) and expected.shape == (4, 256, 64)
    assert torch.equal(batch["pixel_values"], pixel_values(frames, avworld_processor))
    assert batch["id"] == [row["id"] for row in rows]
    assert set(batch) == {"id", "pixel_values", "input_features"}


@pytest.mark.parametrize("frame", [0, 2])
def test_pairs_show_the_frame_that_is_asked_for(avworld_processor, rows, frame):
    """For pictures and for stored image tokens, with any augmentation of the audio."""
    frames = [Image.open(io.BytesIO(row["frames"][frame]["bytes"])).convert("RGB") for row in rows]
    collator = AlignmentCollator(avworld_processor, frame=frame)
    assert torch.equal(collator(rows)["pixel_values"], pixel_values(frames, avworld_processor))
    tokens = torch.randn(4, 4, 36, 32, generator=torch.Generator().manual_seed(0))
    features = torch.zeros(256, 64)
    stored = [{"id": "a", "input_features": features, "image_tokens": each.numpy()} for each in tokens]
    assert torch.equal(collator(stored)["image_tokens"], tokens[:, frame])


def test_augmented_pairs_keep_frame_and_sound_of_one_clip(avworld_processor, rows):
    clean = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)["input_features"]
    batch = AlignmentCollator(avworld_processor, Augmentation(noise=0.0))(rows)
    for index, row in enumerate(rows):
        frames = [Image.open(io.BytesIO(frame["bytes"])).convert("RGB") for frame in row["frames"]]
        own = pixel_values(frames, avworld_processor)
        assert any(torch.equal(batch["pixel_values"][index], pixels) for pixels in own)
        # rolling preserves the multiset of frames
        torch.testing.assert_close(batch["input_features"][index].sum(0), clean[index].sum(0), rtol=1e-4, atol=1e-3)
    assert not torch.equal(batch["input_features"], clean)


def test_stored_pairs_draw_the_frame_first_and_then_for_the_sound(avworld_processor):
    """As pairs from media do, so that both train the same."""
    generator = torch.Generator().manual_seed(0)
    features, tokens = torch.randn(3, 256, 64, generator=generator), torch.randn(3, 4, 36, 32, generator=generator)
    stored = [
        {"id": str(index), "input_features": sound.numpy(), "image_tokens": frames.numpy()}
        for index, (sound, frames) in enumerate(zip(features, tokens, strict=True))
    ]
    batch = AlignmentCollator(avworld_processor, draws=Draws(1))(stored)
    own = Draws(1)(stored)
    shown = torch.stack([frames[each.integers(4)] for frames, each in zip(tokens, own, strict=True)])
    assert torch.equal(batch["image_tokens"], shown)
    assert torch.equal(batch["input_features"], Augmentation()(features, own))
    assert batch["id"] == ["0", "1", "2"]


def test_pairs_are_equalised(avworld_processor):
    row = {"id": "a", "input_features": torch.zeros(256, 64), "image_tokens": torch.zeros(4, 4, 8).numpy()}
    plain, equalised = (
        AlignmentCollator(avworld_processor, Augmentation(noise=0.0, roll=0, equaliser=strength), frame=0)([row] * 2)
        for strength in (0.0, 0.5)
    )
    assert torch.equal(plain["input_features"], torch.zeros(2, 256, 64))
    assert not torch.equal(*equalised["input_features"])


def test_sounds_alone_are_those_of_the_pairs_from_media_and_from_stored_features(avworld_processor, rows):
    pairs = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)(rows)
    sounds = SoundCollator(avworld_processor, UNCHANGED)(rows)
    assert set(sounds) == {"id", "input_features"} and sounds["id"] == pairs["id"]
    assert torch.equal(sounds["input_features"], pairs["input_features"])
    stored = [
        {"id": name, "input_features": features.numpy()}
        for name, features in zip(pairs["id"], pairs["input_features"], strict=True)
    ]
    assert torch.equal(SoundCollator(avworld_processor, UNCHANGED)(stored)["input_features"], pairs["input_features"])
    augmented = SoundCollator(avworld_processor, Augmentation(equaliser=0.5))(stored)["input_features"]
    assert torch.equal(augmented, Augmentation(equaliser=0.5)(pairs["input_features"], Draws()(rows)))
