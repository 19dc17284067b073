"""Sampling of captions with random numbers that belong to a sample, not to its batch."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor


class IndependentSampling(LogitsProcessor):
    """
    Samples tokens at a temperature from the whole distribution. For `generate` with `do_sample=False`.

    The t-th token of a sample is the inverse of the cumulative distribution at the t-th of its uniform random numbers,
    which depend on the seed and the id of the sample only. The result therefore does not depend on the batch, its
    order, or the process, except where rounding differs between batches and a number is next to the border of a token.

    Args:
        ids: ids of the samples, in the order of the batch.
        prompt_length: number of tokens of the padded prompts.
        max_new_tokens: maximum number of new tokens.
        temperature: divides the logits; above 0.
        seed: seed of the random numbers.
    """

    def __init__(self, ids: Sequence[str], prompt_length: int, max_new_tokens: int, temperature: float, seed: int):
        drawn = [uniform_numbers(seed, name, max_new_tokens) for name in ids]
        self.numbers = torch.from_numpy(np.stack(drawn, axis=1))  # (max_new_tokens, B)
        self.prompt_length = prompt_length
        self.temperature = temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Keep only the logit of the sampled token: (B, L) token ids and (B, vocabulary) logits -> (B, vocabulary)."""
        cumulative = torch.softmax(scores.float() / self.temperature, dim=-1).cumsum(dim=-1)
        numbers = self.numbers[input_ids.shape[1] - self.prompt_length].to(scores.device)
        # Rounding makes the last value differ from 1.
        targets = (numbers * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, targets, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def uniform_numbers(seed: int, name: str, count: int) -> np.ndarray:
    """Return `count` float32 numbers in [0, 1) that depend on the seed and a name only."""
    entropy = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest())
    return np.random.default_rng(entropy).random(count, dtype=np.float32)
