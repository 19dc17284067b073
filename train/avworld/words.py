"""Training of the vision tower before the captioner, on pictures and their nouns, as CLIP is trained before LLaVA."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.data.clips import Row, open_frame
from dali_llava.train.data.collators import pixel_values
from dali_llava.train.data.draws import Draws
from dali_llava.train.trainers.stage import StageTrainer


WORD_PRIOR = 4.0  # log-odds against a word, because few words of the vocabulary describe a picture
GLOBAL_SHARE = 0.08  # share of the loss that applies to every token, not only to the best one for a word


class WordTrainer(StageTrainer):
    """Trains the image tokens of a picture to predict its nouns; see `word_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        loss = word_loss(tokens, inputs["words"], model.lm_head)
        return (loss, {"loss": loss}) if return_outputs else loss


def word_loss(
    tokens: torch.Tensor, words: torch.Tensor, lm_head: nn.Module, global_share: float = GLOBAL_SHARE
) -> torch.Tensor:
    """
    Binary cross-entropy of words, predicted from image tokens by the language model's head.

    The first part is multiple-instance learning with image tokens as instances. In a picture of three things, the
    gradient of "dog" reaches the patches of the dog directly, and the projected tokens move close to the embeddings of
    their words, which a language model can read. In the second part, every token predicts all nouns of the picture,
    because CLIP's patch tokens also carry the content of the whole picture. What tokens have in common between
    pictures says nothing about a sound.

    Args:
        tokens: (B, N, width), projected image tokens.
        words: (B, vocabulary), 1 for the nouns that the picture shows.
        lm_head: maps (..., width) to (..., vocabulary).
        global_share: weight of the second part, in [0, 1].

    Returns:
        a scalar, summed over the vocabulary and averaged over the pictures (and over the tokens in the second part).
    """
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    logits = lm_head(nn.functional.rms_norm(tokens, tokens.shape[-1:])) - WORD_PRIOR
    best = cross_entropy(logits.amax(dim=1), words, reduction="sum")
    every = cross_entropy(logits, words[:, None].expand_as(logits), reduction="sum") / tokens.shape[1]
    return torch.lerp(best, every, global_share) / len(words)


@dataclass
class WordCollator:
    """
    Collates rows with `id`, `frames` and `visible` into `id`, `pixel_values` of a random frame and `words` (B,
    vocabulary), 1 for nouns shown.

    Args:
        processor: processor of the model to train.
        draws: random generators of the rows.
    """

    processor: LlavaAudioProcessor
    draws: Draws = field(default_factory=Draws)

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        words = torch.zeros(len(rows), len(tokenizer))
        nouns = [" ".join(row["visible"]) for row in rows]
        for index, ids in enumerate(tokenizer(nouns, add_special_tokens=False)["input_ids"]):
            words[index, ids] = 1.0
        frames = [open_frame(row, generator) for row, generator in zip(rows, self.draws(rows), strict=True)]
        names = [row["id"] for row in rows]
        return {"id": names, "pixel_values": pixel_values(frames, self.processor), "words": words}
