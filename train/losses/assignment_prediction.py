"""Predicting one modality's assignment to a language model's words from the other modality (after VLAP)."""

import math

import torch
import torch.nn.functional as F

from dali_llava.modeling.sinkhorn import log_assignment
from dali_llava.train.losses.base import AlignmentLoss, LossOutput


class AssignmentPredictionLoss(AlignmentLoss):
    """Each modality's prediction of the other's assignment to a language model's words (after VLAP).

    A sample's audio and image each become one vector, the mean of its tokens brought to unit length. With words of
    unit length too, `S = Z W^T` (B, V) holds a modality's cosines, and its assignment is
    `Q = argmax <Q, S> + eps H(Q)` over plans that give each sample 1/B and each word 1/V, without gradient, each row
    then rescaled to sum 1. The loss is the mean over samples of

        1/2 CE(softmax(S_audio / temperature), Q_image) + 1/2 CE(softmax(S_image / temperature), Q_audio)

    so that with frozen image tokens only the first half has a gradient.

    That both modalities are assigned to the language model's word embeddings by optimal transport, and that each
    predicts the other's assignment, is VLAP's ("Bridging Vision and Language Spaces with Assignment Prediction", Park
    et al., ICLR 2024), of which the abstract was at hand and no program. Ours are: sound in the place of text, the
    mean token, cosines, the formula above with its halves, and equal weights for words, where summaries of the paper
    speak of weights by how often a word occurs. The swapped cross-entropy, temperature and eps are SwAV's (Caron et
    al., 2020).

    Fixed marginals keep all samples from gathering at a few words, but they also bound the assignment: no word takes
    more than 1/V, so that where V > B no entry of a rescaled row exceeds B/V and the loss never falls below log(V/B).
    The batch's samples share all words out among themselves. With few samples give few words: those of the captions,
    say, in place of a whole vocabulary. One sample alone is assigned to every word alike, and its loss only flattens
    the predictions. Under `torch.distributed` each rank assigns its own samples.

    Args:
        word_embeddings: (V, D), as wide as the tokens. They are copied at unit length, float32 or float64, into the
            buffer `words`, which is neither trained nor saved: the language model has them already.
        temperature: divides the cosines that predict.
        eps: entropy of the assignment, in the cosines' unit. Below the temperature, so that what is to be predicted is
            more decided than the prediction.
        num_iterations: Sinkhorn iterations. 50 leave no more than float32's rounding at eps 0.05, save with a handful
            of samples and of words, or a smaller eps.

    Logs:
        assignment_prediction: the loss. audio_term, image_term: the cross-entropy of what the audio (the image)
        predicts. floor: the assignments' mean entropy, the least that perfect predictions would leave of the loss.

    Raises:
        TypeError: word_embeddings is no floating-point tensor.
        ValueError: word_embeddings of another shape, with a NaN, an infinity or a row of zeros, or, when called, of
            another width than the tokens; a number that is not positive.
    """

    words: torch.Tensor

    def __init__(
        self,
        word_embeddings: torch.Tensor,
        temperature: float = 0.1,
        eps: float = 0.05,
        num_iterations: int = 50,
    ):
        super().__init__()
        for name, number in (("temperature", temperature), ("eps", eps), ("num_iterations", num_iterations)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {number}")
        self.temperature = temperature
        self.eps = eps
        self.num_iterations = num_iterations
        self.register_buffer("words", _unit_words(word_embeddings), persistent=False)

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        if audio.shape[2] != self.words.shape[1]:
            raise ValueError(
                f"audio_tokens and image_tokens are {audio.shape[2]} wide and word_embeddings {self.words.shape[1]}; "
                "they need one width"
            )
        words = self.words.to(audio.dtype)
        # Masked tokens are zero here, and at unit length a sum is as good as a mean.
        sums = torch.stack((audio.sum(dim=1), image.sum(dim=1)))
        scores = F.normalize(sums, dim=2) @ words.T  # (2, B, V): audio, image
        log_plans = log_assignment(scores.detach(), eps=self.eps, num_iterations=self.num_iterations)
        # A softmax of the logarithms rescales each row to sum 1, whatever Sinkhorn left of its weight 1/B.
        assignments = log_plans.softmax(dim=2)
        audio_term = F.cross_entropy(scores[0] / self.temperature, assignments[1])
        image_term = F.cross_entropy(scores[1] / self.temperature, assignments[0])
        loss = (audio_term + image_term) / 2
        floor = -torch.special.xlogy(assignments, assignments).sum(dim=2).mean()
        names = ("assignment_prediction", "audio_term", "image_term", "floor")
        logs = torch.stack((loss, audio_term, image_term, floor)).detach().tolist()
        return LossOutput(loss, dict(zip(names, logs, strict=True)))


@torch.no_grad()
def _unit_words(word_embeddings: torch.Tensor) -> torch.Tensor:
    """(V, D) rows at unit length in float32 or float64, checked; a copy."""
    if not isinstance(word_embeddings, torch.Tensor) or not word_embeddings.is_floating_point():
        is_tensor = isinstance(word_embeddings, torch.Tensor)
        kind = word_embeddings.dtype if is_tensor else type(word_embeddings).__name__
        raise TypeError(f"word_embeddings must be a floating-point tensor, not {kind}")
    if word_embeddings.dim() != 2 or word_embeddings.numel() == 0:
        raise ValueError(f"word_embeddings must be (words, width), not of shape {tuple(word_embeddings.shape)}")
    words = word_embeddings.to(torch.promote_types(word_embeddings.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(words, dim=1, keepdim=True)
    for name, rows in (("a NaN or an infinity", ~torch.isfinite(lengths)), ("only zeros", lengths == 0)):
        if rows.any():
            raise ValueError(
                f"word_embeddings holds {name} in row {int(rows[:, 0].nonzero()[0])}; leave such a row out"
            )
    return words / lengths
