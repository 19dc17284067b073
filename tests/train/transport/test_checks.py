import pytest
import torch

from dali_llava.train.losses import (
    AttentiveTransportLoss,
    ContrastiveLoss,
    MMDLoss,
    TokenAssignmentLoss,
    TransportLoss,
)
from dali_llava.train.transport import solve_transport


LOSSES = {
    "mmd": MMDLoss,
    "ot": TransportLoss,
    "ot_att": lambda: AttentiveTransportLoss(4, num_heads=2),
    "contrastive": ContrastiveLoss,
    "assignment": TokenAssignmentLoss,
}


def clouds(scale: float, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, count, 4, generator=generator, dtype=torch.float64) for count in (6, 5))
    x, y = x / x.abs().max(), y / y.abs().max()
    return (scale * x).to(dtype).requires_grad_(), (scale * y).to(dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_whose_squares_overflow_are_named(name):
    """In float32 the loss would be 0 or infinite."""
    audio, image = clouds(1.0)
    image[1, 2, 3] = 1e20
    with pytest.raises(ValueError, match="image_tokens holds numbers up to 1e[+]20 in sample 1.*float32; rescale"):
        LOSSES[name]()(audio, image)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2] = False
    assert torch.isfinite(LOSSES[name]()(audio, image, image_mask=mask).loss)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 4e17), (torch.float64, 2e152)])
@pytest.mark.parametrize("name", LOSSES)
def test_the_largest_numbers_that_pass_give_finite_losses(name, dtype, scale):
    """The limit is sqrt(max / (8 x 4 x 11)): 9.8e17 and 7.1e152."""
    audio, image = clouds(scale, dtype)
    output = LOSSES[name]()(audio, image)
    (gradient,) = torch.autograd.grad(output.loss, audio)
    assert torch.isfinite(output.loss) and torch.isfinite(gradient).all()


def test_half_precision_is_held_to_what_it_is_computed_in():
    x, y = clouds(6e4, torch.float16)
    torch.testing.assert_close(
        solve_transport(x, y).cost, solve_transport(x.double(), y.double()).cost.float(), rtol=1e-6, atol=0
    )


def test_sparse_tensors_are_refused():
    x, y = clouds(1.0)
    with pytest.raises(TypeError, match="y must be dense, not torch.sparse_coo; call to_dense"):
        solve_transport(x, y.to_sparse())
