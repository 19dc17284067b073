"""Pretraining of the vision tower: prediction of the nouns of a picture from its tokens."""

import pytest
import torch
from torch import nn

from dali_llava.train.avworld.words import WORD_PRIOR, WordCollator, word_loss
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import pixel_values


@pytest.mark.parametrize("global_share", [0.0, 0.3, 1.0])
def test_loss_is_cross_entropy_of_each_words_best_token_and_of_every_token(global_share):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    head = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    words = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    expected = 0.0
    for picture in range(2):
        for word in range(4):
            scores = [token @ head.weight[word] / token.square().mean().sqrt() for token in tokens[picture]]
            weights = [(1 - global_share, max(scores)), *((global_share / 5, score) for score in scores)]
            for weight, score in weights:
                probability = torch.sigmoid(score - WORD_PRIOR)
                probability = probability if words[picture, word] else 1 - probability
                expected = expected - weight * torch.log(probability) / 2
    torch.testing.assert_close(word_loss(tokens, words, head, global_share), expected)


def test_words_are_the_nouns_of_what_each_picture_shows(avworld_processor, rows):
    rows = [row | {"frames": row["frames"][:1]} for row in rows]
    batch = WordCollator(avworld_processor)(rows)
    tokenizer = avworld_processor.tokenizer
    assert set(batch) == {"id", "pixel_values", "words"} and batch["id"] == [row["id"] for row in rows]
    assert batch["words"].shape == (4, len(tokenizer)) and set(batch["words"].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(batch["pixel_values"], pixel_values([open_frame(row, 0) for row in rows], avworld_processor))
    for present, row in zip(batch["words"], rows, strict=True):
        found = tokenizer.convert_ids_to_tokens(present.nonzero().flatten())
        assert row["visible"] and set(found) == {word for noun in row["visible"] for word in noun.split()}
