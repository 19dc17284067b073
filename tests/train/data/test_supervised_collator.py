"""Batches of captioned rows: the caption and the modality of each row are drawn, and media stay with their rows."""

import pytest
import torch

from dali_llava.processing import SOUND_PROMPT
from dali_llava.train.data.collators import IGNORED, CaptionCollator, SupervisedCollator, row_modalities
from dali_llava.train.data.draws import Draws


@pytest.fixture
def supervised(avworld_processor):
    """`supervised(*modalities)`: a collator of captioned rows."""
    return lambda *modalities: SupervisedCollator(avworld_processor, SOUND_PROMPT, modalities, draws=Draws(3))


def answers(batch, processor) -> list[str]:
    """The answers that the labels of a batch cover."""
    return [processor.decode(row[row != IGNORED], skip_special_tokens=True).strip() for row in batch["labels"]]


@pytest.mark.parametrize(
    ("modality", "media"),
    [("audio", {"audio": True}), ("image", {"image": True}), ("audiovisual", {"audio": True, "image": True})],
)
def test_turn_has_the_media_of_its_modality(supervised, avworld_processor, rows, monkeypatch, modality, media):
    """The batch is that of `CaptionCollator` with the drawn captions, with the prefix where it is the rule."""
    monkeypatch.setattr(avworld_processor, "prefix_modalities", ("audio",))
    collator = supervised(modality)
    collator.frame = 1
    batch = collator(rows)
    answered = [row | {"answer": answer} for row, answer in zip(rows, answers(batch, avworld_processor), strict=True)]
    assert all(row["answer"] in row["captions"] for row in answered)
    expected = CaptionCollator(avworld_processor, **media, prefix=modality == "audio", frame=1)(answered)
    assert batch.keys() == expected.keys() and batch["id"] == expected["id"]
    assert all(torch.equal(batch[name], expected[name]) for name in batch if name != "id")


def test_every_caption_is_drawn_in_some_epoch_and_the_same_one_again(supervised, avworld_processor, rows):
    collator, seen = supervised("audio"), set()
    for epoch in range(24):
        collator.draws.epoch = epoch
        seen.update(answers(collator(rows[:1]), avworld_processor))
    assert seen == set(rows[0]["captions"])
    first = collator(rows)
    assert torch.equal(first["labels"], collator(rows)["labels"])


def test_modalities_are_mixed_in_a_batch_and_tokens_stay_with_their_rows(
    supervised, captioner, avworld_processor, rows
):
    """The loss of a mixed batch is the mean of the losses of its rows, weighted by the number of answer tokens."""
    collator = supervised("audio", "image", "audiovisual")
    batches = []
    for epoch in range(8):
        collator.draws.epoch = epoch
        batches.append(collator(rows))
    batch = next(each for each in batches if len({tuple(row) for row in kinds(each, avworld_processor)}) == 3)
    collator.draws.epoch = batches.index(batch)
    alone = [collator([row]) for row in rows]
    captioner.eval()
    losses = torch.stack([captioner(**without_id(each)).loss for each in alone])
    lengths = torch.tensor([(each["labels"] != IGNORED).sum() for each in alone])
    together = captioner(**without_id(batch)).loss
    torch.testing.assert_close(together, (losses * lengths).sum() / lengths.sum(), rtol=0, atol=1e-5)


def kinds(batch, processor) -> list[list[bool]]:
    """Whether each row of a batch has an image and a sound."""
    tokens = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<audio>")]
    return [[bool((row == token).any()) for token in tokens] for row in batch["input_ids"]]


def without_id(batch) -> dict:
    return {name: value for name, value in batch.items() if name != "id"}


def test_row_is_asked_about_the_media_that_it_has(supervised, avworld_processor, rows):
    collator = supervised("audio", "image", "audiovisual")
    for epoch in range(6):
        collator.draws.epoch = epoch
        batch = collator([rows[0] | {"audio": None}, rows[1] | {"frames": []}])
        assert kinds(batch, avworld_processor) == [[True, False], [False, True]]
    assert row_modalities(rows[0] | {"audio": None}, ["audio", "audiovisual"]) == []
