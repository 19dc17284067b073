"""Unlikelihood of repetition: its value, its gradient, and its part in the captioner's loss."""

import math

import pytest
import torch

from dali_llava.processing.corpora.avworld.avworld import make_row
from dali_llava.processing.corpora.avworld.classes import SILENT_OBJECTS, SOUNDING_CLASSES
from dali_llava.train.avworld.unlikelihood import repetition_unlikelihood, seldom_repeated


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Equation 4 of the paper, one word at a time."""
    total, count = 0.0, 0
    for row, answer in zip(logits.tolist(), labels.tolist(), strict=True):
        used = set()
        for position, word in enumerate(answer):
            if word == -100:
                continue
            count += 1
            exponents = [math.exp(score) for score in row[position - 1]]
            total -= sum(math.log(1 - exponents[other] / sum(exponents)) for other in used - {word})
            used.add(word)
    return total / count


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LABELS = torch.tensor(
    [
        [-100, -100, -100, 4, 1, 5, 4, 2, 3],  # 4 occurs twice
        [-100, -100, -100, -100, -100, -100, -100, 0, 3],
        [-100, 0, 1, 2, 3, -100, -100, -100, -100],  # padded on the right
    ]
)


def test_loss_is_of_the_words_used_before(logits):
    assert repetition_unlikelihood(logits, LABELS).item() == pytest.approx(by_hand(logits, LABELS), abs=1e-5)


def test_loss_of_a_batch_in_parts_is_that_of_the_batch(logits):
    count = (LABELS != -100).sum()
    parts = [repetition_unlikelihood(logits[i : i + 1], LABELS[i : i + 1], num_items=count) for i in range(3)]
    torch.testing.assert_close(sum(parts), repetition_unlikelihood(logits, LABELS))


def test_nothing_is_repeated_in_an_answer_of_one_word(logits):
    labels = torch.full((3, 9), -100)
    labels[:, 5] = 2
    assert repetition_unlikelihood(logits, labels).item() == 0.0


def test_only_the_given_words_are_candidates():
    logits = torch.zeros(1, 4, 4)  # each word has a probability of 1/4
    labels = torch.tensor([[-100, 1, 2, 3]])  # candidates: none, {1}, {1, 2}
    words = torch.tensor([True, False, True, True])
    assert repetition_unlikelihood(logits, labels, words).item() == pytest.approx(-math.log(0.75) / 3)
    assert repetition_unlikelihood(logits, labels).item() == pytest.approx(-math.log(0.75))


def test_words_that_a_quarter_of_their_answers_repeat_may_be_repeated():
    answers = [[1, 2, 1, 3], [1, 3], [1, 3], [1, 3], [3, 4, 3, 4, 3], [3]]
    assert seldom_repeated(answers, 6).tolist() == [True, False, True, True, False, True]  # 1 of 4, 0 of 1, 1 of 6


def test_avworlds_nouns_and_verbs_are_not_repeated(avworld_processor):
    tokenizer = avworld_processor.tokenizer
    turns = [turn for index in range(400) for turn in make_row("captioner", index)["dialogues"]]
    answers = tokenizer([turn["answer"] for turn in turns], add_special_tokens=False)["input_ids"]
    once = seldom_repeated(answers, len(tokenizer))
    words = {word for sounding in SOUNDING_CLASSES for noun in sounding.nouns for word in noun.split()}
    words |= {form for sounding in SOUNDING_CLASSES for verb in sounding.verbs for form in verb} | set(SILENT_OBJECTS)
    assert once[tokenizer.convert_tokens_to_ids(sorted(words))].all()
    assert not once[tokenizer.convert_tokens_to_ids(["a", ","])].any()


def test_gradient_lowers_the_used_words_and_spares_the_right_one():
    logits = torch.zeros(1, 4, 5, requires_grad=True)
    repetition_unlikelihood(logits, torch.tensor([[-100, 1, 2, 1]])).backward()
    assert not logits.grad[0, 0].any() and not logits.grad[0, 3].any()  # nothing is used before, and no label follows
    assert logits.grad[0, 1, 1] > 0 and (logits.grad[0, 1, [0, 2, 3, 4]] < 0).all()
    assert logits.grad[0, 2, 2] > 0 and (logits.grad[0, 2, [0, 1, 3, 4]] < 0).all()  # 1 is correct here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_stay_finite_where_a_used_word_is_certain(dtype):
    logits = torch.zeros(1, 3, 4, dtype=dtype)
    logits[0, 1, 1] = 1000.0
    logits.requires_grad_(True)
    loss = repetition_unlikelihood(logits, torch.tensor([[-100, 1, 2]]))
    loss.backward()
    assert loss.dtype == torch.float32 and 3 < loss.item() < 20 and torch.isfinite(logits.grad).all()
