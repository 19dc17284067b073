"""The vision tower before the captioner: pictures and the nouns of what they show, as CLIP stands before LLaVA."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import pixel_values
from dali_llava.train.trainers.stage import StageTrainer


WORD_PRIOR = 4.0  # log-odds against a word; few of the vocabulary describe a picture
GLOBAL_SHARE = 0.08  # of the loss that every token bears, not only a word's best


class WordTrainer(StageTrainer):
    """Every noun that a picture shows is to be read off its image tokens; see `word_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        loss = word_loss(tokens, inputs["words"], model.lm_head)
        return (loss, {"loss": loss}) if return_outputs else loss


def word_loss(
    tokens: torch.Tensor, words: torch.Tensor, lm_head: nn.Module, global_share: float = GLOBAL_SHARE
) -> torch.Tensor:
    """
    Binary cross-entropy of words, read off image tokens through the language model's head.

    Mostly multiple-instance, an image token the instance: in a picture of three things the gradient of "dog" reaches
    the dog's patches at once, and the projected tokens come to lie near the embeddings of their words, where a
    language model can pick them up. For the rest every token is to name all that the picture shows: CLIP's patch
    tokens carry their picture's content too, and what they share between pictures says nothing about a sound.

    Args:
        tokens: projected image tokens, (B, N, width).
        words: (B, vocabulary), 1 for the nouns that the picture shows.
        lm_head: (..., width) -> (..., vocabulary).
        global_share: weight of the second part, in [0, 1].

    Returns:
        scalar, summed over the vocabulary, averaged over the pictures (and over the tokens, in the second part).
    """
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    logits = lm_head(nn.functional.rms_norm(tokens, tokens.shape[-1:])) - WORD_PRIOR
    best = cross_entropy(logits.amax(dim=1), words, reduction="sum")
    every = cross_entropy(logits, words[:, None].expand_as(logits), reduction="sum") / tokens.shape[1]
    return torch.lerp(best, every, global_share) / len(words)


@dataclass
class WordCollator:
    """Rows with `frames` and `visible` into `pixel_values` and `words` (B, vocabulary), 1 for the nouns that show."""

    processor: LlavaAudioProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        words = torch.zeros(len(rows), len(tokenizer))
        nouns = [" ".join(row["visible"]) for row in rows]
        for index, ids in enumerate(tokenizer(nouns, add_special_tokens=False)["input_ids"]):
            words[index, ids] = 1.0
        return {"pixel_values": pixel_values([open_frame(row) for row in rows], self.processor), "words": words}
