import pytest
import torch

from dali_llava.train.losses import LOSSES, AttentiveTransportLoss


def make(name):
    if name == "ot_att":
        loss = AttentiveTransportLoss(width=16)
        loss.set_epoch(2)
        return loss
    return LOSSES[name]()


ALL = list(LOSSES)


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    audio, image = (torch.randn(3, n, 16, generator=generator) for n in (6, 5))
    return audio, image + 0.5


def test_names():
    own = [name for name, loss in LOSSES.items() if loss.__module__.startswith("dali_llava.")]
    assert own == ["contrastive", "mmd", "ot", "ot_att", "token_assignment"]


@pytest.mark.parametrize("name", ALL)
def test_masked_tokens_are_as_good_as_removed(name):
    """Value and gradients, with NaN in masked tokens."""
    torch.manual_seed(1)
    loss = make(name)
    audio, image = (batch.double() for batch in tokens())
    padded_audio = torch.cat((audio, torch.full((3, 2, 16), torch.nan)), dim=1).requires_grad_()
    padded_image = torch.cat((torch.full((3, 3, 16), torch.inf), image), dim=1).requires_grad_()
    audio_mask = torch.tensor([True] * 6 + [False] * 2).repeat(3, 1)
    image_mask = torch.tensor([False] * 3 + [True] * 5).repeat(3, 1)
    masked = loss(padded_audio, padded_image, audio_mask, image_mask)
    masked.loss.backward()
    plain = loss(audio.requires_grad_(), image.requires_grad_())
    plain.loss.backward()
    # The attention's parameters have float32 values, but everything is computed in float64.
    torch.testing.assert_close(masked.loss, plain.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(padded_audio.grad[:, :6], audio.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(padded_image.grad[:, 3:], image.grad, rtol=1e-8, atol=1e-12)
    assert (padded_audio.grad[:, 6:] == 0).all() and (padded_image.grad[:, :3] == 0).all()
    for logs in (masked.logs, plain.logs):
        logs.pop("transport_seconds", None)
    assert masked.logs == pytest.approx(plain.logs, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_masks_may_differ_from_sample_to_sample(name):
    torch.manual_seed(2)
    loss = make(name)
    audio, image = (batch.double() for batch in tokens(1))
    audio_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    together = loss(audio, image, audio_mask).loss
    if name == "contrastive":  # its samples depend on one another
        means = torch.stack([one[mask].mean(0) for one, mask in zip(audio, audio_mask, strict=True)])
        expected = loss(means[:, None], image).loss
    elif name == "ot_att":  # lambda depends on the batch's mean distance
        loss.entropy_schedule = (0.0,)
        together = loss(audio, image, audio_mask).loss
        expected = torch.stack([loss(audio[i, audio_mask[i]][None], image[i][None]).loss for i in range(3)]).mean()
    else:
        expected = torch.stack([loss(audio[i, audio_mask[i]][None], image[i][None]).loss for i in range(3)]).mean()
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name):
    torch.manual_seed(3)
    loss = make(name)
    audio, image = (batch.bfloat16().requires_grad_() for batch in tokens(2))
    output = loss(audio, image)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and audio.grad.dtype == torch.bfloat16
    expected = loss(audio.detach().float(), image.detach().float()).loss
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name):
    torch.manual_seed(4)
    loss = make(name)
    audio, image = tokens(3)
    audio.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(audio, image).loss
    outside = loss(audio, image).loss
    assert torch.equal(inside, outside)
    assert torch.equal(*(torch.autograd.grad(value, audio)[0] for value in (inside, outside)))


@pytest.mark.parametrize("name", ALL)
def test_logs_are_plain_numbers(name):
    torch.manual_seed(5)
    logs = make(name)(*tokens(4)).logs
    assert logs and all(type(value) is float for value in logs.values())


BAD = [
    ("audio_tokens", lambda audio: audio[0], "audio_tokens must be"),
    ("image_tokens", lambda image: image[:2], "audio_tokens holds 3 samples and image_tokens 2"),
    ("image_tokens", lambda image: image[..., :8], "audio_tokens is 16 wide and image_tokens 8"),
    ("audio_tokens", lambda audio: audio[:, :0], "audio_tokens holds no tokens.* sample 0"),
    ("image_tokens", lambda image: image[:, :0], "image_tokens holds no tokens.* sample 0"),
    ("audio_tokens", lambda a: a.index_fill(0, torch.tensor([1]), torch.nan), "audio_tokens holds a NaN.* sample 1"),
    ("image_tokens", lambda i: i.index_fill(0, torch.tensor([2]), torch.inf), "image_tokens holds .* sample 2"),
    (
        "audio_mask",
        lambda mask: mask.index_fill(0, torch.tensor([2]), False),
        "audio_mask leaves no token in sample 2",
    ),
    (
        "image_mask",
        lambda mask: mask.index_fill(0, torch.tensor([0]), False),
        "image_mask leaves no token in sample 0",
    ),
    ("image_mask", lambda mask: mask[:, 1:], r"image_mask must be of shape \(3, 5\)"),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("argument", "spoil", "message"), BAD)
def test_bad_input_is_named(name, argument, spoil, message):
    audio, image = tokens()
    arguments = {
        "audio_tokens": audio,
        "image_tokens": image,
        "audio_mask": torch.ones(3, 6, dtype=torch.bool),
        "image_mask": torch.ones(3, 5, dtype=torch.bool),
    }
    arguments[argument] = spoil(arguments[argument])
    if argument == "audio_tokens" and arguments[argument].shape[:2] != (3, 6):
        arguments["audio_mask"] = None
    if argument == "image_tokens" and arguments[argument].shape[:2] != (3, 5):
        arguments["image_mask"] = None
    with pytest.raises(ValueError, match=message):
        make(name)(**arguments)


def test_an_integer_mask_is_refused():
    audio, image = tokens()
    with pytest.raises(TypeError, match="audio_mask must be a bool tensor"):
        LOSSES["mmd"]()(audio, image, torch.ones(3, 6, dtype=torch.long))
