import math

import pytest
import torch

from dali_llava.train.losses import MMDLoss


def naive_mmd(x, y):
    """The definition, with N x N x D differences and autograd."""
    z = torch.cat((x, y), dim=1)
    n, count = x.shape[1], z.shape[1]
    distances = (z[:, :, None] - z[:, None]).square().sum(-1)
    bandwidth = distances.detach().sum((1, 2), keepdim=True) / (count * (count - 1))
    kernel = sum(torch.exp(-distances / (multiple * bandwidth)) for multiple in (1 / 4, 1 / 2, 1, 2, 4))
    xx, xy, yy = kernel[:, :n, :n], kernel[:, :n, n:], kernel[:, n:, n:]
    return (xx.mean((1, 2)) - 2 * xy.mean((1, 2)) + yy.mean((1, 2))).mean()


def clouds(seed, dtype=torch.float64, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 16, 8, generator=generator, dtype=torch.float64)
    y = 0.7 * torch.randn(4, 9, 8, generator=generator, dtype=torch.float64) + 0.5
    return (x + offset).to(dtype).requires_grad_(), (y + offset).to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_definition(dtype, tolerance):
    x, y = clouds(0, dtype)
    value = MMDLoss()(x, y).loss
    assert value.dtype == dtype
    dx, dy = torch.autograd.grad(value, (x, y))
    wide_x, wide_y = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    expected = naive_mmd(wide_x, wide_y)
    expected_dx, expected_dy = torch.autograd.grad(expected, (wide_x, wide_y))
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=tolerance, atol=tolerance * expected_dx.abs().max())
    torch.testing.assert_close(dy.double(), expected_dy, rtol=tolerance, atol=tolerance * expected_dy.abs().max())


def test_two_points():
    """One token each at distance d: s = d^2, so the loss is 10 - 2 sum_m exp(-1 / m) for every d."""
    x, y = torch.zeros(1, 1, 3), torch.full((1, 1, 3), 2.0)
    expected = 10 - 2 * sum(math.exp(-1 / multiple) for multiple in (0.25, 0.5, 1, 2, 4))
    output = MMDLoss()(x, y)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.logs == pytest.approx({"mmd": expected, "bandwidth": 12.0}, rel=1e-6)


def test_equal_clouds_are_at_zero_in_any_order():
    x, _ = clouds(1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert MMDLoss()(x, x[:, order]).loss.item() == pytest.approx(0, abs=1e-14)


def test_symmetric_and_blind_to_order():
    x, y = clouds(2)
    generator = torch.Generator().manual_seed(0)
    value = MMDLoss()(x, y).loss
    assert value > 0.1
    torch.testing.assert_close(MMDLoss()(y, x).loss, value, rtol=1e-13, atol=0)
    shuffled = MMDLoss()(x[:, torch.randperm(16, generator=generator)], y[:, torch.randperm(9, generator=generator)])
    torch.testing.assert_close(shuffled.loss, value, rtol=1e-13, atol=0)


def test_blind_to_unit_and_position():
    x, y = clouds(3)
    value = MMDLoss()(x, y).loss
    torch.testing.assert_close(MMDLoss()(1e-6 * x, 1e-6 * y).loss, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(MMDLoss()(x + 100, y + 100).loss, value, rtol=1e-10, atol=0)


def test_float32_clouds_far_out_keep_their_digits():
    x, y = clouds(4, torch.float32, offset=1000.0)
    value = MMDLoss()(x, y).loss
    torch.testing.assert_close(value.double(), naive_mmd(x.double(), y.double()), rtol=1e-5, atol=0)


def test_float32_value_of_nearby_clouds_keeps_its_digits():
    """Three means of about 1 cancel to 0.01. Their sum in float32 would have an error of 2e-5."""
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(4, 300, 64, generator=generator)
    y = torch.randn(4, 350, 64, generator=generator)
    for sample in range(4):
        value = MMDLoss()(x[sample : sample + 1], y[sample : sample + 1]).loss
        expected = naive_mmd(x[sample : sample + 1].double(), y[sample : sample + 1].double())
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)


def test_parts_of_a_batch_make_the_whole():
    x, y = clouds(5)
    whole, parts = MMDLoss()(x, y).loss, MMDLoss(memory_mb=1e-3)(x, y).loss
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    for got, expected in zip(torch.autograd.grad(parts, (x, y)), torch.autograd.grad(whole, (x, y)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-16)


def test_a_frozen_side_gets_no_gradient_and_the_other_the_same():
    x, y = clouds(6)
    (expected,) = torch.autograd.grad(MMDLoss()(x, y).loss, x)
    frozen = y.detach()
    MMDLoss()(x, frozen).loss.backward()
    assert frozen.grad is None
    torch.testing.assert_close(x.grad, expected, rtol=1e-13, atol=1e-16)
    assert not MMDLoss()(x.detach(), frozen).loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.1, 1e6])
def test_points_that_are_all_one_give_zero(dtype, value):
    x = torch.full((2, 7, 5), value, dtype=dtype, requires_grad=True)
    output = MMDLoss()(x, x.detach()[:, :3])
    output.loss.backward()
    assert output.loss.item() == 0 and output.logs == {"mmd": 0.0, "bandwidth": 0.0}
    assert (x.grad == 0).all()


def test_gradients_scale_with_what_comes_after():
    x, y = clouds(7)
    (single,) = torch.autograd.grad(MMDLoss()(x, y).loss, x)
    (tripled,) = torch.autograd.grad(3 * MMDLoss()(x, y).loss, x)
    torch.testing.assert_close(tripled, 3 * single)


def test_bad_memory():
    with pytest.raises(ValueError, match="memory_mb"):
        MMDLoss(memory_mb=0)
