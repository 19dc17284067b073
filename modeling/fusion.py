"""
Fusion of the audio tokens and the image tokens of a sample, before the projector.

A fusion takes the encoders' tokens of samples and returns fused tokens, which fill the same placeholders. One linear
layer, `audio_projector`, projects the fused tokens of both modalities.

`FUSIONS` lists the fusions that are saved with a checkpoint. Other packages add theirs with `register_fusion`. Import
such a package before you load a checkpoint with its fusion. `"concatenate"` is DALI: no fusion, and an MLP projector
for each modality.

Reference: K. Rho, H. Lee, V. Iverson and J. S. Chung, "LAVCap: LLM-based Audio-Visual Captioning using Optimal
Transport", ICASSP, 2025. Its ablation compares the fusions.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from .configuration_cav_mae import CavMaeAudioConfig
from .modeling_cav_mae import CavMaeLayer
from .sinkhorn import log_assignment


CONCATENATE = "concatenate"


class Fusion(nn.Module):
    """
    Base of the fusions, and the fusion `"shared_projector"`: the tokens stay as they are, and both modalities share
    the linear projector. This is the plain concatenation of LAVCap's ablation.

    A subclass takes its options as keyword arguments of the constructor, and raises a ValueError for a value that it
    does not support.

    Args:
        width: width of the tokens, D.
    """

    def __init__(self, width: int):
        super().__init__()
        self._no_split_modules = {type(self).__name__}  # as in `PreTrainedModel`

    def forward(
        self, audio: torch.Tensor, image: torch.Tensor, audio_mask: torch.Tensor, image_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Fuse the tokens of each sample.

        Args:
            audio, image: (S, Na, D) and (S, Nv, D), padded at the end.
            audio_mask, image_mask: (S, Na) and (S, Nv), True for tokens. A sample may lack one modality; its tokens
                are then those of the other modality alone.

        Returns:
            The fused tokens, of the same shapes; padding positions have any values.
        """
        return audio, image


class OTAttention(Fusion):
    """
    Optimal-transport attention (LAVCap, equations 2, 3 and 5): `x + Q y` and `y + Q^T x`, without parameters.

    For tokens x and y of unit length, `S = x y^T`, and `Q = argmax <Q, S> + eps H(Q)` with uniform marginals, without
    gradient. A row of Q sums to 1/Na and a column to 1/Nv, so the other modality adds little: about 1% of an audio
    token at 64 audio tokens. It is computed in float32 or better. Audio alone stays x.

    Args:
        width: width of the tokens.
        eps: weight of the entropy.
        num_iterations: number of Sinkhorn iterations.
        rescale: whether to multiply Q by Na in the first sum and by Nv in the second, so that each token adds a mean
            of the other modality.
        normalize: whether x and y in the sums have unit length, as in the authors' code. Otherwise, only S uses unit
            length.
    """

    def __init__(
        self, width: int, eps: float = 0.1, num_iterations: int = 50, rescale: bool = False, normalize: bool = True
    ):
        super().__init__(width)
        if not eps > 0 or num_iterations < 1:
            raise ValueError(f"eps and num_iterations must be positive, not {eps} and {num_iterations}.")
        self.eps = eps
        self.num_iterations = num_iterations
        self.rescale = rescale
        self.normalize = normalize

    def forward(self, audio, image, audio_mask, image_mask):
        dtype = torch.promote_types(audio.dtype, torch.float32)
        audio, image = audio.to(dtype), image.to(dtype)
        with torch.autocast(audio.device.type, enabled=False):
            unit_audio, unit_image = F.normalize(audio, dim=2), F.normalize(image, dim=2)
            assignment = self.assignment(unit_audio @ unit_image.mT, audio_mask, image_mask)
            if self.normalize:
                audio, image = unit_audio, unit_image
            for_audio = for_image = assignment
            if self.rescale:
                for_audio = assignment * audio_mask.sum(dim=1)[:, None, None]
                for_image = assignment * image_mask.sum(dim=1)[:, None, None]
            return audio + for_audio @ image, image + for_image.mT @ audio

    def assignment(self, similarity: torch.Tensor, audio_mask: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
        """Q (S, Na, Nv) of a similarity, without gradient; zero at masked tokens and where a modality is absent."""
        both = (audio_mask.any(dim=1) & image_mask.any(dim=1))[:, None]
        a, b = (torch.where(both, mask, True).to(similarity.dtype) for mask in (audio_mask, image_mask))
        a, b = a / a.sum(dim=1, keepdim=True), b / b.sum(dim=1, keepdim=True)
        log_q = log_assignment(similarity.detach(), a, b, self.eps, self.num_iterations)
        return log_q.exp() * both[..., None]


def check_heads(width: int, num_attention_heads: int) -> None:
    """Raise a ValueError if the heads do not divide the width."""
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"num_attention_heads ({num_attention_heads}) must divide the width of the tokens ({width}).")


class MultiHeadCrossAttention(nn.Module):
    """Multi-head attention from queries to the tokens of another set; zero if the set is empty."""

    def __init__(self, width: int, num_attention_heads: int):
        super().__init__()
        check_heads(width, num_attention_heads)
        self.num_attention_heads = num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(S, N, D) queries and (S, M, D) tokens with mask (S, M) -> (S, N, D)."""
        query, key, value = (
            states.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for states in (self.q_proj(queries), self.k_proj(tokens), self.v_proj(tokens))
        )
        present = mask.any(dim=1, keepdim=True)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=(mask | ~present)[:, None, None])
        return self.o_proj(attended.transpose(1, 2).flatten(2)) * present[..., None]


class CrossAttention(Fusion):
    """
    Audio tokens attend to the image tokens, with a residual. The image tokens stay as they are.

    Args:
        width: width of the tokens.
        num_attention_heads: number of heads.
    """

    def __init__(self, width: int, num_attention_heads: int = 12):
        super().__init__(width)
        self.attention = MultiHeadCrossAttention(width, num_attention_heads)

    def forward(self, audio, image, audio_mask, image_mask):
        return audio + self.attention(audio, image, image_mask), image


class JointEncoder(Fusion):
    """
    Transformer blocks over the audio tokens and the image tokens together, and a norm.

    Args:
        width: width of the tokens.
        num_attention_heads: number of heads.
        num_layers: number of blocks.
    """

    def __init__(self, width: int, num_attention_heads: int = 12, num_layers: int = 1):
        super().__init__(width)
        check_heads(width, num_attention_heads)
        self.config = CavMaeAudioConfig(
            hidden_size=width,
            num_attention_heads=num_attention_heads,
            intermediate_size=4 * width,
            layer_norm_eps=1e-6,
        )
        self.config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(CavMaeLayer(self.config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=self.config.layer_norm_eps)

    def forward(self, audio, image, audio_mask, image_mask):
        tokens = torch.cat([audio, image], dim=1)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=tokens, attention_mask=torch.cat([audio_mask, image_mask], dim=1)
        )
        for layer in self.layers:
            tokens = layer(tokens, attention_mask)
        return self.norm(tokens).split([audio.shape[1], image.shape[1]], dim=1)


class QFormerLayer(nn.Module):
    """Post-norm cross-attention and feed-forward layers."""

    def __init__(self, width: int, num_attention_heads: int):
        super().__init__()
        self.attention = MultiHeadCrossAttention(width, num_attention_heads)
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        queries = self.norm1(queries + self.attention(queries, tokens, mask))
        return self.norm2(queries + self.fc2(F.gelu(self.fc1(queries))))


class QFormer(Fusion):
    """
    Windows of tokens, each summarised by one learned query through layers of cross-attention.

    Each modality has windows of its own, with shared weights. The output of a window fills all its placeholders. The
    last window may be partial; the authors' code drops it.

    Args:
        width: width of the tokens.
        num_attention_heads: number of heads.
        num_layers: number of layers.
        window: number of tokens per query.
    """

    def __init__(self, width: int, num_attention_heads: int = 12, num_layers: int = 2, window: int = 2):
        super().__init__(width)
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}.")
        self.window = window
        self.query = nn.Embedding(1, width)
        self.layers = nn.ModuleList(QFormerLayer(width, num_attention_heads) for _ in range(num_layers))

    def forward(self, audio, image, audio_mask, image_mask):
        # One pass for both modalities: with sharded weights, each layer runs once on each rank.
        length = max(audio.shape[1], image.shape[1])
        length += -length % self.window
        tokens = torch.cat([F.pad(tokens, (0, 0, 0, length - tokens.shape[1])) for tokens in (audio, image)])
        mask = torch.cat([F.pad(mask, (0, length - mask.shape[1])) for mask in (audio_mask, image_mask)])
        windows, present = tokens.unflatten(1, (-1, self.window)).flatten(0, 1), mask.unflatten(1, (-1, self.window))
        queries = self.query(torch.zeros(len(windows), 1, dtype=torch.long, device=windows.device))
        for layer in self.layers:
            queries = layer(queries, windows, present.flatten(0, 1))
        fused = queries.reshape(2 * len(audio), -1, tokens.shape[2]).repeat_interleave(self.window, dim=1)
        return fused[: len(audio), : audio.shape[1]], fused[len(audio) :, : image.shape[1]]


FUSIONS: dict[str, type[Fusion]] = {
    "shared_projector": Fusion,
    "ot_attention": OTAttention,
    "cross_attention": CrossAttention,
    "joint_encoder": JointEncoder,
    "q_former": QFormer,
}


def register_fusion(name: str, fusion_class: type[Fusion]) -> None:
    """
    Add a fusion, so that `LlavaAudioConfig(fusion=name)` builds it. The same class may be registered again.

    Raises:
        TypeError: the class is not a subclass of `Fusion`.
        ValueError: the name belongs to another fusion.
    """
    if not (isinstance(fusion_class, type) and issubclass(fusion_class, Fusion)):
        raise TypeError(f"fusion {name!r}: {fusion_class!r} is not a subclass of Fusion.")
    if name == CONCATENATE or FUSIONS.get(name, fusion_class) is not fusion_class:
        raise ValueError(f"fusion {name!r} is already registered; choose another name.")
    FUSIONS[name] = fusion_class


def build_fusion(name: str, width: int, options: dict | None = None) -> Fusion | None:
    """
    Build a fusion with random weights; None for `"concatenate"`.

    Args:
        name: a key of `FUSIONS`, or `"concatenate"`.
        width: width of the tokens.
        options: keyword arguments of the fusion.

    Raises:
        ValueError: the fusion or an option is unknown, or an option has a value that the fusion does not support.
    """
    options = options or {}
    if name != CONCATENATE and name not in FUSIONS:
        raise ValueError(
            f"fusion {name!r} is unknown; known fusions: {', '.join((CONCATENATE, *FUSIONS))}. Import the package "
            "that registers it."
        )
    known = list(inspect.signature(FUSIONS[name]).parameters)[1:] if name in FUSIONS else []
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"fusion_options: {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}."
        )
    try:
        return FUSIONS[name](width, **options) if name in FUSIONS else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"fusion_options of {name!r}: {error}") from error


__all__ = ["FUSIONS", "Fusion", "build_fusion", "register_fusion"]
