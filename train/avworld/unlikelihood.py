"""Unlikelihood of words that an answer has already used."""

import torch

from dali_llava.train.data.collators import IGNORED


def repetition_unlikelihood(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Token-level unlikelihood of repetition: Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR
    2020, equations 4 and 5.

    At each position of an answer, the negative candidates are the tokens that the answer holds before it, except the
    one that is right there. The loss is -log(1 - p) of each candidate. Its context is the prompt and the true answer
    so far, as in cross-entropy, so that a word the answer does say twice ("a", "and") is not punished where it stands.

    Args:
        logits: (B, L, vocabulary), of the token after each position, as a causal language model returns them.
        labels: (B, L), the answers' token ids, -100 elsewhere.
        num_items: what the sum is divided by; the number of labels in the batch by default.

    Returns:
        scalar, float32.

    Example:
        >>> logits = torch.zeros(1, 4, 4)  # each of four words has a probability of 1/4
        >>> labels = torch.tensor([[-100, 1, 2, 3]])  # candidates: none, {1}, {1, 2}
        >>> loss = repetition_unlikelihood(logits, labels)
        >>> torch.isclose(loss, -3 * torch.tensor(0.75).log() / 3)
        tensor(True)
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    answer = labels != IGNORED
    words = labels.where(answer, 0)[..., None]
    used = torch.zeros_like(logits).scatter(-1, words, answer[..., None].float())
    candidates = ((used.cumsum(dim=1) - used) > 0).scatter(-1, words, False) & answer[..., None]
    probabilities = logits.softmax(dim=-1).clamp(max=1 - torch.finfo(torch.float32).eps)
    loss = -torch.log1p(-probabilities).where(candidates, 0).sum()
    return loss / (answer.sum() if num_items is None else num_items)
