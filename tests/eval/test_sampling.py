"""Sampling with random numbers that belong to a sample."""

import numpy as np
import pytest
import torch

from dali_llava.eval.sampling import IndependentSampling, uniform_numbers


def sampled(logits: torch.Tensor, ids: list[str], temperature: float, step: int = 0) -> torch.Tensor:
    """The sampled token of each row of `logits` (B, vocabulary)."""
    sampling = IndependentSampling(ids, prompt_length=3, max_new_tokens=4, temperature=temperature, seed=0)
    scores = sampling(torch.zeros(len(ids), 3 + step, dtype=torch.long), logits)
    assert torch.equal(scores.isfinite().sum(dim=-1), torch.ones(len(ids), dtype=torch.long))
    return scores.argmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("step", [0, 3])
def test_frequencies_are_those_of_the_softmax(temperature, step):
    logits = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.0])
    ids = [str(number) for number in range(20_000)]
    tokens = sampled(logits.expand(len(ids), -1), ids, temperature, step)
    expected = torch.softmax(logits / temperature, dim=-1)
    frequencies = tokens.bincount(minlength=5) / len(ids)
    # Five standard deviations of a frequency are 5 sqrt(0.25 / 20000) = 0.018 at most.
    torch.testing.assert_close(frequencies, expected, atol=0.018, rtol=0)
    assert frequencies[3] == 0


def test_tokens_are_the_inverse_of_the_cumulative_distribution():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    ids = [f"clip-{number}" for number in range(50)]
    for step in range(4):
        numbers = np.array([uniform_numbers(0, name, 4)[step] for name in ids])
        cumulative = np.cumsum(np.exp(logits.double().numpy()), axis=1)
        expected = (cumulative <= numbers[:, None] * cumulative[:, -1:]).sum(axis=1)
        assert sampled(logits, ids, 1.0, step).tolist() == expected.tolist()


def test_a_low_temperature_is_greedy():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampled(logits, [str(number) for number in range(50)], 1e-4), logits.argmax(dim=-1))


def test_numbers_depend_on_seed_and_name():
    numbers = {(seed, name): uniform_numbers(seed, name, 3).tobytes() for seed in (0, 1) for name in ("a", "b")}
    assert len(set(numbers.values())) == 4
    assert uniform_numbers(0, "a", 3).tobytes() == numbers[0, "a"]
    assert uniform_numbers(0, "a", 2).tobytes() == numbers[0, "a"][:8]
