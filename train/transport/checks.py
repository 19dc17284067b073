"""Checks on batches of point sets, shared by the transport solvers and the alignment losses."""

import math

import torch


def check_point_sets(
    x: torch.Tensor,
    y: torch.Tensor,
    x_mask: torch.Tensor | None = None,
    y_mask: torch.Tensor | None = None,
    names: tuple[str, str] = ("x", "y"),
    mask_names: tuple[str, str] = ("x_mask", "y_mask"),
) -> None:
    """Raises an error for point sets without meaningful distances.

    Args:
        x: (B, N, D) floating-point tensor.
        y: (B, M, D) floating-point tensor on the same device.
        x_mask: (B, N) bool, True for points in use. Values of other points are ignored.
        y_mask: (B, M) bool, the same for y.
        names: names of `x` and `y` in messages.
        mask_names: names of the masks in messages.

    Raises:
        TypeError: an argument is not a dense tensor of the right kind.
        ValueError: shapes do not match, a set has no points, or a value is NaN, infinite or so large that squared
            distances overflow float32 (float64 if x or y is float64); the message names the argument and the sample.
    """
    sets = list(zip(names, mask_names, (x, y), (x_mask, y_mask), strict=True))
    for name, mask_name, points, mask in sets:
        _check_shapes(name, mask_name, points, mask)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{names[0]} holds {x.shape[0]} samples and {names[1]} {y.shape[0]}; they come in pairs")
    if x.shape[2] != y.shape[2]:
        raise ValueError(f"{names[0]} is {x.shape[2]} wide and {names[1]} {y.shape[2]}; they need one width")
    if x.device != y.device:
        raise ValueError(f"{names[0]} is on {x.device} and {names[1]} on {y.device}; they need one device")

    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    # |x - y|^2 is at most 4 D largest^2, and sums of this over all points must not overflow either.
    largest = math.sqrt(torch.finfo(dtype).max / (8 * x.shape[2] * (x.shape[1] + y.shape[1])))
    # One flag needs one synchronization. The sample at fault is determined only if there is one.
    flags = []
    for _, _, points, mask in sets:
        counted = _counted(points, mask)
        flags += [(torch.stack(torch.aminmax(counted)).double().abs() <= largest).all()]
        if mask is not None:
            flags += [mask.any(dim=1).all()]
    if bool(torch.stack(flags).all()):
        return
    for name, mask_name, points, mask in sets:
        if mask is not None and not mask.any(dim=1).all():
            sample = int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(f"{mask_name} leaves no token in sample {sample}; drop the sample or mend its mask")
        finite = torch.isfinite(_counted(points, mask)).flatten(1).all(dim=1)
        if not finite.all():
            sample = int((~finite).nonzero()[0])
            raise ValueError(f"{name} holds a NaN or an infinity in sample {sample}")
        sizes = _counted(points, mask).abs().flatten(1).amax(dim=1).double()
        if (sizes > largest).any():
            sample = int((sizes > largest).nonzero()[0])
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} holds numbers up to {sizes[sample].item():.0e} in sample {sample}, too large for squared "
                f"distances in {kind}; rescale the points"
            )


def _check_shapes(name: str, mask_name: str, points: torch.Tensor, mask: torch.Tensor | None) -> None:
    if not isinstance(points, torch.Tensor) or not points.is_floating_point():
        kind = points.dtype if isinstance(points, torch.Tensor) else type(points).__name__
        raise TypeError(f"{name} must be a floating-point tensor, not {kind}")
    if points.layout != torch.strided:
        raise TypeError(f"{name} must be dense, not {points.layout}; call to_dense()")
    if points.dim() != 3:
        raise ValueError(f"{name} must be (batch, tokens, width), not of shape {tuple(points.shape)}")
    if points.shape[0] == 0 or points.shape[2] == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(points.shape)}")
    if points.shape[1] == 0:
        raise ValueError(f"{name} holds no tokens, from sample 0 on: its shape is {tuple(points.shape)}")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{mask_name} must be a bool tensor, not {kind}")
    if mask.shape != points.shape[:2]:
        raise ValueError(
            f"{mask_name} must be of shape {tuple(points.shape[:2])} as {name} is, not {tuple(mask.shape)}"
        )
    if mask.device != points.device:
        raise ValueError(f"{mask_name} is on {mask.device} and {name} on {points.device}; they need one device")


def _counted(points: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    points = points.detach()
    return points if mask is None else points.masked_fill(~mask[..., None], 0.0)


def check_weights(name: str, weights: torch.Tensor, points: torch.Tensor) -> None:
    """Raises an error unless `weights` (B, N) suit points (B, N, D): finite, non-negative, not all 0 in any sample.

    Raises:
        TypeError: the weights are not a floating-point tensor.
        ValueError: the shape, the device or a value is wrong; the message names the argument and the sample.
    """
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, torch.Tensor) else type(weights).__name__
        raise TypeError(f"{name} must be a floating-point tensor, not {kind}")
    if weights.shape != points.shape[:2]:
        raise ValueError(f"{name} must be of shape {tuple(points.shape[:2])}, not {tuple(weights.shape)}")
    if weights.device != points.device:
        raise ValueError(f"{name} is on {weights.device} and its points on {points.device}; they need one device")
    weights = weights.detach()
    sums = weights.double().sum(dim=1)
    problems = {
        "holds a NaN or an infinity": ~torch.isfinite(sums),
        "holds a negative weight": (weights < 0).any(dim=1),
        "holds no weight above 0": sums == 0,
    }
    if not bool(torch.stack(tuple(problems.values())).any()):
        return
    for problem, samples in problems.items():
        if samples.any():
            raise ValueError(f"{name} {problem} in sample {int(samples.nonzero()[0])}")
