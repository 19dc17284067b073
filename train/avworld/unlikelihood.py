"""Unlikelihood loss for words that an answer has already used."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from dali_llava.train.data.collators import IGNORED


REPEATED = 0.25  # words repeated by at least this share of the answers that contain them are excluded


def seldom_repeated(answers: Iterable[Sequence[int]], vocabulary_size: int) -> torch.Tensor:
    """
    Find the words that answers seldom repeat, such as nouns and verbs, but not articles and commas.

    Args:
        answers: token ids of each answer.
        vocabulary_size: number of token ids.

    Returns:
        (vocabulary_size,) bool, False for words that at least `REPEATED` of the answers with the word repeat.
    """
    holding, repeating = Counter(), Counter()
    for answer in answers:
        counts = Counter(answer)
        holding.update(counts.keys())
        repeating.update(word for word, count in counts.items() if count > 1)
    return torch.tensor([repeating[word] < REPEATED * max(holding[word], 1) for word in range(vocabulary_size)])


def repetition_unlikelihood(
    logits: torch.Tensor,
    labels: torch.Tensor,
    words: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Token-level unlikelihood of repetition [1, equations 4 and 5].

    At each position of an answer, the negative candidates are the earlier tokens of the answer, except the correct
    token of this position. The loss of a candidate is -log(1 - p). As in cross-entropy, the context is the prompt and
    the correct answer so far, so a word that the answer does repeat is not penalised where it is repeated.

    Words that answers often repeat are poor candidates: a comma would be penalised at the "and" that ends its list.

    Args:
        logits: (B, L, vocabulary), predictions of the token after each position, as a causal language model returns.
        labels: (B, L), token ids of the answers, and -100 elsewhere.
        words: (vocabulary,) bool, the words that may be candidates; all by default. See `seldom_repeated`.
        num_items: divisor of the sum; the number of labels in the batch by default.

    Returns:
        a float32 scalar.

    References:
        [1] S. Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020.

    Example:
        >>> logits = torch.zeros(1, 4, 4)  # each of four words has a probability of 1/4
        >>> labels = torch.tensor([[-100, 1, 2, 3]])  # candidates: none, {1}, {1, 2}
        >>> loss = repetition_unlikelihood(logits, labels)
        >>> torch.isclose(loss, -3 * torch.tensor(0.75).log() / 3)
        tensor(True)
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    answer = labels != IGNORED
    right = labels.where(answer, 0)[..., None]
    used = torch.zeros_like(logits).scatter(-1, right, answer[..., None].float())
    candidates = ((used.cumsum(dim=1) - used) > 0).scatter(-1, right, False) & answer[..., None]
    if words is not None:
        candidates &= words.to(candidates.device)
    probabilities = logits.softmax(dim=-1).clamp(max=1 - torch.finfo(torch.float32).eps)
    loss = -torch.log1p(-probabilities).where(candidates, 0).sum()
    return loss / (answer.sum() if num_items is None else num_items)
