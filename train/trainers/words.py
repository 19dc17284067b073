"""The vision tower before the captioner: pictures and the nouns of what they show, as CLIP stands before LLaVA."""

import torch
from torch import nn

from .stage import StageTrainer


WORD_PRIOR = 4.0  # log-odds against a word; few of the vocabulary describe a picture


class WordTrainer(StageTrainer):
    """Every noun that a picture shows is to be read off one of its image tokens; see `word_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        loss = word_loss(tokens, inputs["words"], model.lm_head)
        return (loss, {"loss": loss}) if return_outputs else loss


def word_loss(tokens: torch.Tensor, words: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
    """
    Multiple-instance binary cross-entropy of words, an image token the instance, through the language model's head.

    In a picture of three things the gradient of "dog" reaches the dog's patches at once, and the projected tokens
    come to lie near the embeddings of their words, where a language model can pick them up.

    Args:
        tokens: projected image tokens, (B, N, width).
        words: (B, vocabulary), 1 for the nouns that the picture shows.
        lm_head: (..., width) -> (..., vocabulary).

    Returns:
        scalar, summed over the vocabulary, averaged over the pictures.
    """
    logits = lm_head(nn.functional.rms_norm(tokens, tokens.shape[-1:])).amax(dim=1) - WORD_PRIOR
    return nn.functional.binary_cross_entropy_with_logits(logits, words, reduction="sum") / len(words)
