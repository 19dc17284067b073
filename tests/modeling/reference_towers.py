"""CAV-MAE and CED written from their papers and the names of their released weights, in float64."""

from collections.abc import Callable

import torch

from dali_llava.modeling import CavMaeAudioConfig, CedAudioConfig


Weights = dict[str, torch.Tensor]


def random_tensors(seed: int) -> Callable[..., torch.Tensor]:
    """`draw(*shape, scale=0.15, shift=0.0)`: normal deviates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.15, shift=0.0):
        return shift + scale * torch.randn(*shape, generator=generator)

    return draw


def norm_weights(draw, width: int, name: str) -> Weights:
    return {f"{name}.weight": draw(width, shift=1.0), f"{name}.bias": draw(width)}


def block_weights(draw, config: CavMaeAudioConfig, name: str, norms: tuple[str, ...] = ("norm1", "norm2")) -> Weights:
    """Weights of a block with fused qkv; norms differ from their initial values."""
    width, inner = config.hidden_size, config.intermediate_size
    weights = {}
    for norm in norms:
        weights |= norm_weights(draw, width, f"{name}.{norm}")
    for layer, out, into in (
        ("attn.qkv", 3 * width, width),
        ("attn.proj", width, width),
        ("mlp.fc1", inner, width),
        ("mlp.fc2", width, inner),
    ):
        weights |= {f"{name}.{layer}.weight": draw(out, into), f"{name}.{layer}.bias": draw(out)}
    return weights


def norm(x: torch.Tensor, w: Weights, name: str, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def block(x: torch.Tensor, w: Weights, name: str, heads: int, eps: float, norms=("norm1", "norm2")) -> torch.Tensor:
    """Pre-norm block with exact GELU, (B, N, width) -> (B, N, width)."""
    query, key, value = linear(norm(x, w, f"{name}.{norms[0]}", eps), w, f"{name}.attn.qkv").chunk(3, dim=-1)
    size = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / size**0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outputs.append(weights / weights.sum(-1, keepdim=True) @ value[..., part])
    x = x + linear(torch.cat(outputs, dim=-1), w, f"{name}.attn.proj")
    hidden = linear(norm(x, w, f"{name}.{norms[1]}", eps), w, f"{name}.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return x + linear(hidden, w, f"{name}.mlp.fc2")


def patches(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """Embedded patches (B, mel rows, columns, width) of spectrograms (B, frames, mels)."""
    kernel = w[f"{name}.weight"][:, 0].flatten(1)  # (width, 16 mels x 16 frames)
    batch, frames, mels = x.shape
    rows = []
    for row in range(mels // 16):
        tokens = []
        for column in range(frames // 16):
            patch = x[:, 16 * column : 16 * column + 16, 16 * row : 16 * row + 16]
            tokens.append(patch.transpose(1, 2).reshape(batch, -1) @ kernel.T + w[f"{name}.bias"])
        rows.append(torch.stack(tokens, dim=1))
    return torch.stack(rows, dim=1)


def cav_mae_weights(config: CavMaeAudioConfig, seed: int) -> Weights:
    """Random weights of the audio branch of CAV-MAE with DALI's linear layer, by their released names."""
    draw = random_tensors(seed)
    width = config.hidden_size
    rows, columns = config.grid_size
    weights = {
        "patch_embed_a.proj.weight": draw(width, 1, 16, 16, scale=0.05),
        "patch_embed_a.proj.bias": draw(width),
        "pos_embed_a": draw(1, rows * columns, width, scale=0.5),
        "modality_a": draw(1, 1, width, scale=0.5),
        **norm_weights(draw, width, "norm_a"),
        "proj.weight": draw(config.output_size, width),
        "proj.bias": draw(config.output_size),
    }
    for index in range(config.num_hidden_layers):
        weights |= block_weights(draw, config, f"blocks_a.{index}")
    for index in range(config.num_joint_layers):
        weights |= block_weights(draw, config, f"blocks_u.{index}", ("norm1_a", "norm2_a"))
    return weights


def cav_mae_audio_branch(weights: Weights, fbank: torch.Tensor, heads: int) -> torch.Tensor:
    """CAV-MAE's `forward_audio` and DALI's linear layer: (B, frames, mels) -> (B, tokens, output width)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = patches(fbank.double(), w, "patch_embed_a.proj").flatten(1, 2) + w["pos_embed_a"] + w["modality_a"]
    for index in range(sum(name.startswith("blocks_a.") and name.endswith("norm1.bias") for name in w)):
        x = block(x, w, f"blocks_a.{index}", heads, 1e-5)
    for index in range(sum(name.startswith("blocks_u.") and name.endswith("norm1_a.bias") for name in w)):
        x = block(x, w, f"blocks_u.{index}", heads, 1e-5, ("norm1_a", "norm2_a"))
    return linear(norm(x, w, "norm_a", 1e-5), w, "proj")


def ced_weights(config: CedAudioConfig, seed: int) -> Weights:
    """Random weights of the encoder of CED, by the names in its original `.pt` file."""
    draw = random_tensors(seed)
    width, mels = config.hidden_size, config.num_mel_bins
    rows, columns = config.grid_size
    weights = {
        **norm_weights(draw, mels, "init_bn.1"),
        "init_bn.1.running_mean": draw(mels, scale=5.0, shift=-20.0),
        "init_bn.1.running_var": draw(mels, scale=50.0).abs() + 900.0,
        "init_bn.1.num_batches_tracked": torch.tensor(7),
        "patch_embed.proj.weight": draw(width, 1, 16, 16, scale=0.05),
        "patch_embed.proj.bias": draw(width),
        "time_pos_embed": draw(1, width, 1, columns, scale=0.5),
        "freq_pos_embed": draw(1, width, rows, 1, scale=0.5),
        **norm_weights(draw, width, "norm"),
    }
    for index in range(config.num_hidden_layers):
        weights |= block_weights(draw, config, f"blocks.{index}")
    return weights


def ced_encoder(weights: Weights, spectrogram: torch.Tensor, heads: int, batch_norm: bool = False) -> torch.Tensor:
    """
    The encoder of CED: (B, frames, mels) -> (B, mel rows, columns, width).

    `batch_norm` normalises by the statistics of the batch. Clips longer than the time positions use positions
    interpolated linearly between the centres of columns, constant at the ends.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = spectrogram.double()
    mean, variance = w["init_bn.1.running_mean"], w["init_bn.1.running_var"]
    if batch_norm:
        mean = x.mean((0, 1))
        variance = (x - mean).square().mean((0, 1))
    x = (x - mean) / torch.sqrt(variance + 1e-5) * w["init_bn.1.weight"] + w["init_bn.1.bias"]
    x = patches(x, w, "patch_embed.proj")
    rows, columns = x.shape[1:3]
    time = w["time_pos_embed"][0, :, 0].T  # (positions, width)
    if columns > len(time):
        centres = ((torch.arange(columns) + 0.5) * len(time) / columns - 0.5).clamp(0, len(time) - 1).double()
        left = centres.long().clamp(max=len(time) - 2)
        share = (centres - left)[:, None]
        time = (1 - share) * time[left] + share * time[left + 1]
    x = x + time[:columns] + w["freq_pos_embed"][0, :, :, 0].T[:, None]
    x = x.flatten(1, 2)
    for index in range(sum(name.startswith("blocks.") and name.endswith("norm1.bias") for name in w)):
        x = block(x, w, f"blocks.{index}", heads, 1e-6)
    return norm(x, w, "norm", 1e-6).unflatten(1, (rows, columns))
