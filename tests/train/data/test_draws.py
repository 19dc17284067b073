"""Generators of rows: what they depend on, in batches, workers, epochs, resumed runs and evaluations."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from dali_llava.processing.media import MediaError
from dali_llava.train.avworld.tower import SoundCollator
from dali_llava.train.avworld.words import WordCollator
from dali_llava.train.data.augmentation import Augmentation
from dali_llava.train.data.clips import ClipOpener, open_frame
from dali_llava.train.data.collators import AlignmentCollator, CaptionCollator, for_evaluation, pixel_values
from dali_llava.train.data.draws import Draws, DrawsEpoch


ROWS = [{"id": f"clip {index}"} for index in range(12)]


class Numbers:
    """Collator of one uniform number per row."""

    def __init__(self, draws: Draws):
        self.draws = draws

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        numbers = np.stack([generator.random(1, dtype=np.float32) for generator in self.draws(rows)])
        return {"numbers": torch.from_numpy(numbers)}


def draw(draws: Draws, rows: list[dict] = ROWS) -> list[float]:
    return Numbers(draws)(rows)["numbers"].flatten().tolist()


def test_numbers_depend_on_the_row_and_not_on_its_batch():
    draws, whole = Draws(3), draw(Draws(3))
    assert draw(draws, ROWS[:6]) + draw(draws, ROWS[6:]) == whole
    assert draw(draws, ROWS[::-1]) == whole[::-1]
    torch.manual_seed(1)
    np.random.seed(1)
    assert draw(draws) == whole


def test_numbers_change_with_seed_epoch_and_row():
    draws = Draws(3)
    numbers = draw(draws) + draw(Draws(4))
    draws.epoch = 1
    assert len(set(numbers + draw(draws))) == 3 * len(ROWS)
    draws.epoch = 0
    assert draw(draws) == numbers[: len(ROWS)]


def test_numbers_are_uniform_and_those_of_neighbours_uncorrelated():
    draws, rows = Draws(0), [{"id": f"train-{index:06d}"} for index in range(4000)]
    first = np.array(draw(draws, rows))
    draws.epoch = 1
    second = np.array(draw(draws, rows))
    assert first.mean() == pytest.approx(0.5, abs=0.02) and first.var() == pytest.approx(1 / 12, abs=0.005)
    neighbours = [(first, second), (first[1:], first[:-1])]
    assert all(abs(np.corrcoef(*pair)[0, 1]) < 0.06 for pair in neighbours)  # standard error 0.016


def test_a_row_that_occurs_twice_draws_twice():
    numbers = draw(Draws(0), [ROWS[0], ROWS[1], ROWS[0]])
    assert numbers[:2] == draw(Draws(0), ROWS[:2]) and numbers[2] not in numbers[:2]


def test_a_row_needs_an_id():
    with pytest.raises(ValueError, match="rows need the column id to seed .*; columns: audio, frames"):
        Draws()([{"audio": None, "frames": []}])


def test_each_pass_over_a_stream_draws_other_numbers_and_a_second_run_the_same():
    runs = []
    for _ in range(2):
        draws = Draws(0, streaming=True)
        runs.append([draw(draws, ROWS[:4]) for _ in range(3)])
    assert runs[0] == runs[1] and len({number for one in runs[0] for number in one}) == 12


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_what_one_process_draws_in_each_epoch(persistent):
    draws, expected = Draws(0), []
    for epoch in range(3):
        draws.epoch = epoch
        expected.append(draw(draws))
    options = {"num_workers": 2, "persistent_workers": persistent, "multiprocessing_context": "fork"}
    loader = DataLoader(ROWS, batch_size=3, collate_fn=Numbers(draws), **options)
    for epoch in range(3):
        draws.epoch = epoch
        assert torch.cat([batch["numbers"] for batch in loader]).flatten().tolist() == expected[epoch]


class Recorder(nn.Module):
    """A model that records the batches that it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(numbers.flatten().tolist())
        return {"loss": self.weight * numbers.mean()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_resumed_run_collates_what_an_unbroken_run_collates(tmp_path, streaming, workers):
    """Two and a half epochs of 4 steps, resumed in the middle of an epoch and at its end."""

    def train(resume: int | None = None) -> list[list[float]]:
        draws = Draws(0, streaming)
        corpus = Dataset.from_list(ROWS)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=10,
            per_device_train_batch_size=3,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="steps" if resume is None else "no",
            save_steps=2,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_pin_memory=False,
        )
        rows = corpus.to_iterable_dataset(2).repeat(None) if streaming else corpus
        trainer = Trainer(Recorder(), args, Numbers(draws), rows, callbacks=[DrawsEpoch(draws)])
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / f"checkpoint-{resume}"))
        return trainer.model.seen

    unbroken = train()
    assert len(unbroken) == 10 and len({number for batch in unbroken for number in batch}) == 30
    assert train(resume=6) == unbroken[6:]
    assert train(resume=8) == unbroken[8:]


def collators(processor):
    noisy = Augmentation(noise=0.3, equaliser=0.3)
    return {
        "captions": CaptionCollator(processor, image=True, audio=True),
        "pairs": AlignmentCollator(processor, noisy),
        "sounds": SoundCollator(processor, noisy),
        "words": WordCollator(processor),
    }


@pytest.mark.parametrize("name", ["captions", "pairs", "sounds", "words"])
def test_media_of_a_row_depend_on_the_epoch_and_not_on_the_batch(avworld_processor, rows, name):
    collator = collators(avworld_processor)[name]
    state = torch.get_rng_state()
    whole = collator(rows)
    halves = [collator(rows[:2]), collator(rows[2:])]
    collator.draws.epoch = 1
    later = collator(rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole["id"] == halves[0]["id"] + halves[1]["id"] == [row["id"] for row in rows]
    media = [key for key in ("pixel_values", "input_features") if key in whole]
    assert media
    for key in media:
        # the filter bank sums in a different order for another batch
        torch.testing.assert_close(torch.cat([half[key] for half in halves]), whole[key], rtol=0, atol=1e-5)
    assert any(not torch.equal(later[key], whole[key]) for key in media)


def test_batches_of_evaluations_are_the_same_and_not_augmented(avworld_processor, rows):
    collator = AlignmentCollator(avworld_processor, Augmentation(noise=0.3), draws=Draws(5, streaming=True))
    evaluation = for_evaluation(collator, rows)
    first = evaluation(rows)
    collator(rows)
    collator.draws.epoch = 4
    second = evaluation(rows)
    assert all(torch.equal(first[key], second[key]) for key in ("pixel_values", "input_features"))
    clean = avworld_processor.feature_extractor([clip.audio for clip in ClipOpener()(rows, Draws()(rows), audio=True)])
    assert torch.equal(first["input_features"], clean["input_features"])
    frames = [open_frame(row, generator) for row, generator in zip(rows, Draws(5)(rows), strict=True)]
    assert torch.equal(first["pixel_values"], pixel_values(frames, avworld_processor))


def test_rows_of_the_evaluation_replace_its_broken_clips(avworld_processor, rows):
    broken = rows[0] | {"audio": {"path": "lost.wav", "bytes": b"RIFF and no more"}}
    opener = ClipOpener(Dataset.from_list(rows[:2]))
    collator = for_evaluation(SoundCollator(avworld_processor, opener=opener), Dataset.from_list(rows[2:]))
    assert set(collator([broken] * 8)["id"]) == {row["id"] for row in rows[2:]}
    assert opener.broken == 8
    with pytest.raises(MediaError):
        for_evaluation(SoundCollator(avworld_processor), Dataset.from_list(rows))([broken])
