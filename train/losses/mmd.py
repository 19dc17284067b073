"""Maximum mean discrepancy between two sets of tokens (DALI_MMD)."""

import torch
from torch.autograd.function import once_differentiable

from dali_llava.train.losses.base import AlignmentLoss, LossOutput, uniform_weights


# The bandwidths are s times 1/4, 1/2, 1, 2 and 4. The widest kernel is exp(-d^2 / (4 s)); each narrower one has half
# the bandwidth and is the square of the previous one.
_WIDEST = 4.0
_NUM_KERNELS = 5
_MEMORY_MB = {False: 32.0, True: 512.0}  # key: whether the tokens are on a GPU


class MMDLoss(AlignmentLoss):
    """Squared maximum mean discrepancy between the tokens of each pair, averaged over the batch [1, equation 3].

    The loss is the biased estimator [2, equation 5], `mean k(x, x') - 2 mean k(x, y) + mean k(y, y')` with the
    diagonals, and `k = sum_r exp(-d^2 / (m_r s))` for m_r in {1/4, 1/2, 1, 2, 4}. s is the mean squared distance
    between two different tokens of the pair's joint set, without gradient. The loss of a pair whose tokens are all
    equal is 0. Only first derivatives are available.

    Args:
        memory_mb: largest memory of the kernel matrices in megabytes. A larger batch is computed in parts of at least
            one pair. By default 32, which suits the cache of a CPU, or 512 on a GPU, which is slow on small parts.

    Logs:
        mmd: the loss. bandwidth: the mean of s over the batch.

    References:
        [1] H. Malard et al., "An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using
        Audiovisual Distribution Alignment", 2024.
        [2] A. Gretton et al., "A Kernel Two-Sample Test", Journal of Machine Learning Research 13, 2012.

    Example:
        >>> import torch
        >>> audio, image = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[2.0], [3.0]]])
        >>> output = MMDLoss()(audio, image)
        >>> round(output.loss.item(), 4), round(output.logs["bandwidth"], 4)
        (4.5798, 3.3333)
    """

    def __init__(self, memory_mb: float | None = None):
        super().__init__()
        if memory_mb is not None and not memory_mb > 0:
            raise ValueError(f"memory_mb must be positive, not {memory_mb}")
        self.memory_mb = memory_mb

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        memory_mb = _MEMORY_MB[audio.is_cuda] if self.memory_mb is None else self.memory_mb
        per_pair, bandwidth = _PairedMMD.apply(
            audio, image, uniform_weights(audio, audio_mask), uniform_weights(image, image_mask), memory_mb
        )
        loss = per_pair.mean()
        mmd, mean_bandwidth = torch.stack((loss.detach(), bandwidth.mean())).tolist()
        return LossOutput(loss, {"mmd": mmd, "bandwidth": mean_bandwidth})


class _PairedMMD(torch.autograd.Function):
    """MMD^2 (B,) and bandwidth (B,) of x (B, N, D) with weights a (B, N) and y (B, M, D) with weights b (B, M).

    The gradient has a closed form that needs the same kernel matrices as the value. It is computed in the forward
    pass, so that no N x N matrix is kept longer than its part of the batch is processed.
    """

    @staticmethod
    def forward(ctx, x, y, a, b, memory_mb):
        # At most five matrices exist at once: three of the current block and the slopes of the two previous ones.
        largest = max(x.shape[1], y.shape[1])
        pairs = max(1, int(memory_mb * 2**20 / (5 * largest**2 * x.element_size())))
        needs_x, needs_y = ctx.needs_input_grad[:2]
        parts = [
            _mmd_with_gradients(*part, needs_x, needs_y)
            for part in zip(*(tensor.split(pairs) for tensor in (x, y, a, b)), strict=True)
        ]
        value, bandwidth, dx, dy = (
            None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
        )
        ctx.save_for_backward(dx, dy)
        ctx.mark_non_differentiable(bandwidth)
        return value, bandwidth

    @staticmethod
    @once_differentiable
    def backward(ctx, d_value, _):
        dx, dy = (None if gradient is None else d_value[:, None, None] * gradient for gradient in ctx.saved_tensors)
        return dx, dy, None, None, None


def _mmd_with_gradients(x, y, a, b, needs_x, needs_y):
    x, y, bandwidth, scale = _standardise(x, y, a, b)
    mean_xx, slope_xx, norm_x = _kernel_within(x, a, with_slope=needs_x)
    mean_yy, slope_yy, norm_y = _kernel_within(y, b, with_slope=needs_y)
    mean_xy, slope_xy = _kernel(x @ y.mT, norm_x, norm_y, a, b, with_slope=needs_x or needs_y)
    value = mean_xx - 2 * mean_xy + mean_yy

    dx = dy = None
    if needs_x:
        pull = _pull(slope_xx, x, x, a) - _pull(slope_xy, x, y, b)
        dx = (4 * scale[:, None] * a)[..., None] * pull
    if needs_y:
        pull = _pull(slope_yy, y, y, b) - _pull(slope_xy.mT, y, x, a)
        dy = (4 * scale[:, None] * b)[..., None] * pull
    return torch.where(scale > 0, value, 0.0).to(x.dtype), bandwidth, dx, dy


def _standardise(x, y, a, b):
    """Centres and scales both clouds so that the widest kernel is exp(-d^2). Also returns s and the scale.

    The shift does not change distances. Without it, float32 would lose digits for clouds far from the origin.
    """
    count_x, count_y = (a > 0).sum(dim=1), (b > 0).sum(dim=1)
    count = (count_x + count_y).to(x.dtype)
    total = (count_x[:, None] * (a[:, None] @ x)[:, 0]) + (count_y[:, None] * (b[:, None] @ y)[:, 0])
    centre = total / count[:, None]
    # Masked tokens are moved to the centre, where they do not contribute to any sum.
    x = (x - centre[:, None]) * (a > 0)[..., None]
    y = (y - centre[:, None]) * (b > 0)[..., None]
    # sum_ij |z_i - z_j|^2 = 2 N sum_i |z_i|^2 for centred points, over the N (N - 1) pairs of different points.
    bandwidth = 2 * (x.square().sum(dim=(1, 2)) + y.square().sum(dim=(1, 2))) / (count - 1)
    # Equal points differ from their rounded mean by a few units in the last place, which does not count as spread.
    rounding = (4 * torch.finfo(x.dtype).eps) ** 2 * centre.square().sum(dim=1)
    bandwidth = torch.where(bandwidth > rounding, bandwidth, 0.0)
    scale = torch.where(bandwidth > 0, (_WIDEST * bandwidth).rsqrt(), 0.0)
    return x * scale[:, None, None], y * scale[:, None, None], bandwidth, scale


def _kernel_within(x, a, with_slope):
    """`_kernel` for the tokens of one cloud. Also returns their squared norms (B, N).

    The norms are taken from the products, so that the distance of a token to itself is exactly 0 at any precision.
    """
    gram = x @ x.mT
    norms = gram.diagonal(dim1=1, dim2=2).clone()
    return *_kernel(gram, norms, norms, a, a, with_slope), norms


def _kernel(gram, row_norms, column_norms, a, b, with_slope):
    """Weighted mean (B,) of the kernel matrix of a Gram matrix (B, N, M), and its derivatives with respect to d^2.

    The mean is float64, because MMD is a small difference of three such means and would have four digits in float32.

    Overwrites the Gram matrix. Returns None for the derivatives unless `with_slope`.
    """
    power = gram.mul_(2).sub_(row_norms[:, :, None]).sub_(column_norms[:, None]).clamp_(max=0).exp_()
    kernel = power.clone()
    slope = power.neg() if with_slope else None
    for step in range(1, _NUM_KERNELS):
        power.square_()
        kernel += power
        if with_slope:
            slope.sub_(power, alpha=2**step)
    return ((a[:, None] @ kernel)[:, 0].double() * b.double()).sum(dim=1), slope


def _pull(slope, rows, columns, weights):
    """sum_j w_j slope_ij (row_i - column_j), (B, N, D)."""
    return (slope @ weights[..., None]) * rows - slope @ (weights[..., None] * columns)
