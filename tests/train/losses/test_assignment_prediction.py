import math

import numpy as np
import pytest
import torch

from dali_llava.train.losses import LOSSES, AlignmentLoss, AssignmentPredictionLoss
from dali_llava.train.losses import assignment_prediction as module


TEMPERATURE, EPS, ITERATIONS = 0.1, 0.05, 50


def tokens(batch=4, width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, n, width, generator=generator, dtype=dtype) for n in (5, 3))


def vocabulary(count=7, width=6, seed=100, dtype=torch.float64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_token(*rows):
    """(B, 1, D) float64: a sample is one vector."""
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def naive_assignment(scores, eps=EPS, iterations=ITERATIONS):
    """Sinkhorn and Knopp's scaling of exp(S / eps) to marginals 1/B and 1/V; rows rescaled to sum 1."""
    samples, words = scores.shape
    kernel, column = np.exp(scores / eps), np.full(words, 1.0)
    for _ in range(iterations):
        row = np.array([1 / (samples * (kernel[i] * column).sum()) for i in range(samples)])
        column = np.array([1 / (words * (kernel[:, j] * row).sum()) for j in range(words)])
    plan = row[:, None] * kernel * column
    return plan / plan.sum(axis=1, keepdims=True)


def naive_scores(batch, words):
    """(B, V) cosines of mean token and word, one at a time."""
    rows = []
    for sample in batch:
        mean = sum(sample) / len(sample)
        rows.append(torch.stack([mean @ word / (mean @ mean).sqrt() / (word @ word).sqrt() for word in words]))
    return torch.stack(rows)


def naive_loss(audio, image, words, temperature=TEMPERATURE, eps=EPS, iterations=ITERATIONS):
    """The definition, word by word; the assignments come from NumPy and so carry no gradient."""
    scores = [naive_scores(batch, words) for batch in (audio, image)]
    targets = [naive_assignment(each.detach().numpy(), eps, iterations) for each in scores]
    total = 0
    for own, target in ((scores[0], targets[1]), (scores[1], targets[0])):
        for i, row in enumerate(own):
            partition = sum((score / temperature).exp() for score in row)
            for j, score in enumerate(row):
                total = total - target[i, j] * (score / temperature - partition.log())
    return total / (2 * len(audio))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "eps": 0.2, "num_iterations": 3}])
def test_equals_the_definition(dtype, tolerance, options):
    audio, image = tokens()
    words = vocabulary()
    narrow = [batch.to(dtype).requires_grad_() for batch in (audio, image)]
    output = AssignmentPredictionLoss(words.to(dtype), **options)(*narrow)
    gradients = torch.autograd.grad(output.loss, narrow)

    wide = [batch.detach().double().requires_grad_() for batch in narrow]
    names = {"num_iterations": "iterations"}
    expected = naive_loss(*wide, words, **{names.get(name, name): value for name, value in options.items()})
    assert output.loss.dtype == dtype
    torch.testing.assert_close(output.loss.double(), expected, rtol=tolerance, atol=0)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_logs_hold_the_terms_and_the_floor():
    audio, image = tokens(seed=1)
    words = vocabulary()
    output = AssignmentPredictionLoss(words)(audio, image)
    scores = [naive_scores(batch, words).numpy() for batch in (audio, image)]
    targets = [naive_assignment(each) for each in scores]

    def log_softmax(each):
        return each / TEMPERATURE - np.log(np.exp(each / TEMPERATURE).sum(axis=1, keepdims=True))

    expected = {
        "assignment_prediction": output.loss.item(),
        "audio_term": -(targets[1] * log_softmax(scores[0])).sum(axis=1).mean(),
        "image_term": -(targets[0] * log_softmax(scores[1])).sum(axis=1).mean(),
        "floor": -sum((target * np.log(target)).sum(axis=1).mean() for target in targets) / 2,
    }
    assert output.logs == pytest.approx(expected, rel=1e-9)
    assert output.loss.item() == pytest.approx((expected["audio_term"] + expected["image_term"]) / 2, rel=1e-9)
    assert all(type(value) is float for value in output.logs.values())


@pytest.mark.parametrize("eps", [0.05, 0.01, 0.3])
def test_two_samples_on_two_orthogonal_words(eps):
    """Cosines 1 and 0: assigned by 1 - r and r with r = 1 / (1 + e^(1/eps)), predicted by p = 1 / (1 + e^(-1/t))."""
    own = one_token([1, 0], [0, 1])
    loss = AssignmentPredictionLoss(torch.eye(2, dtype=torch.float64), eps=eps)
    rest = 1 / (1 + math.exp(1 / eps))
    likely, unlikely = math.log1p(math.exp(-10)), 10 + math.log1p(math.exp(-10))  # -log p, -log(1 - p)
    alike, swapped = loss(own, 2 * own).loss.item(), loss(own, own.flip(0)).loss.item()
    assert alike == pytest.approx((1 - rest) * likely + rest * unlikely, rel=1e-9)
    assert swapped == pytest.approx(rest * likely + (1 - rest) * unlikely, rel=1e-9)


def test_two_samples_near_one_word_share_both():
    """The plan leans to word 1 for the sample that needs word 0 less, though both are nearest to word 0.

    With equal marginals a plan of two by two is r and 1 - r crosswise, and (r / (1 - r))^2 is
    exp((S_01 + S_10 - S_00 - S_11) / eps) = exp(-0.8 / eps).
    """
    own = one_token([1.0, 0.0], [0.8, 0.6])
    loss = AssignmentPredictionLoss(torch.eye(2, dtype=torch.float64), temperature=0.5, eps=0.2, num_iterations=200)
    rest = 1 / (1 + math.exp(0.4 / 0.2))
    first = math.log1p(math.exp(-2.0)) + rest * 2.0  # cosines 1 and 0, words 0 and 1 by 1 - r and r
    second = math.log1p(math.exp(0.4)) - rest * 0.4  # cosines 0.8 and 0.6, by r and 1 - r
    output = loss(own, own)
    assert output.loss.item() == pytest.approx((first + second) / 2, rel=1e-9)
    assert output.logs["floor"] == pytest.approx(-rest * math.log(rest) - (1 - rest) * math.log(1 - rest), rel=1e-9)


def test_right_pairs_cost_less_than_wrong_ones():
    audio, _ = tokens(batch=5, seed=2)
    loss = AssignmentPredictionLoss(vocabulary(40))
    alike = loss(audio, audio).loss
    for shift in range(1, 5):
        assert loss(audio, audio.roll(shift, dims=0)).loss > alike + 1


def test_modalities_can_be_exchanged():
    audio, image = tokens(seed=3)
    loss = AssignmentPredictionLoss(vocabulary())
    forth, back = loss(audio, image), loss(image, audio)
    torch.testing.assert_close(forth.loss, back.loss, rtol=1e-12, atol=0)
    assert forth.logs["audio_term"] == pytest.approx(back.logs["image_term"], rel=1e-12)
    assert forth.logs["audio_term"] != pytest.approx(forth.logs["image_term"], rel=1e-3)


def test_one_sample_is_assigned_to_all_words_alike():
    """The word marginal whatever the tokens: -log p averaged over words; flat predictions give log V, the least."""
    audio, image = tokens(batch=1, seed=4)
    words = vocabulary()
    output = AssignmentPredictionLoss(words)(audio, image)
    scores = torch.cat([naive_scores(batch, words) for batch in (audio, image)]) / TEMPERATURE
    torch.testing.assert_close(output.loss, -scores.log_softmax(dim=1).mean(), rtol=1e-10, atol=0)
    assert output.logs["floor"] == pytest.approx(math.log(7), rel=1e-12)
    flat = AssignmentPredictionLoss(torch.eye(3, dtype=torch.float64))(torch.ones(1, 2, 3), torch.ones(1, 4, 3))
    assert flat.loss.item() == pytest.approx(math.log(3), rel=1e-6)


def test_indistinct_samples_are_assigned_to_all_words_alike():
    audio, image = (batch[:1].repeat(3, 1, 1) for batch in tokens(seed=5))
    words = vocabulary()
    loss = AssignmentPredictionLoss(words)
    torch.testing.assert_close(loss(audio, image).loss, loss(audio[:1], image[:1]).loss, rtol=1e-10, atol=0)


def test_many_words_bound_the_loss_from_below():
    """log(V / B), all but reached where each of 4 samples has 15 words just like it and is far from the others."""
    words = torch.eye(4, dtype=torch.float64).repeat(15, 1)
    output = AssignmentPredictionLoss(words)(words[:4, None], words[:4, None])
    rest = 3 * math.exp(-20)  # by the side of each word's own share, to first order
    assert output.logs["floor"] == pytest.approx(math.log(15) + 20 * rest, rel=1e-7)
    assert output.loss.item() == pytest.approx(math.log(15) + math.log1p(3 * math.exp(-10)) + 10 * rest, rel=1e-9)
    scattered = AssignmentPredictionLoss(vocabulary(60), eps=0.01, num_iterations=500)(*tokens(seed=19))
    assert scattered.loss.item() > scattered.logs["floor"] > math.log(15)


def test_a_batch_said_twice_gives_the_same_loss():
    audio, image = tokens(seed=6)
    loss = AssignmentPredictionLoss(vocabulary())
    twice = loss(audio.repeat(2, 1, 1), image.repeat(2, 1, 1)).loss
    torch.testing.assert_close(twice, loss(audio, image).loss, rtol=1e-10, atol=0)


def test_order_of_words_tokens_and_samples_does_not_matter():
    audio, image = tokens(seed=7)
    words = vocabulary()
    expected = AssignmentPredictionLoss(words)(audio, image).loss
    generator = torch.Generator().manual_seed(8)

    def shuffled(tensor, dim):
        return tensor.index_select(dim, torch.randperm(tensor.shape[dim], generator=generator))

    by_word = AssignmentPredictionLoss(shuffled(words, 0))(audio, image).loss
    by_token = AssignmentPredictionLoss(words)(shuffled(audio, 1), shuffled(image, 1)).loss
    pairs = torch.randperm(4, generator=generator)
    by_sample = AssignmentPredictionLoss(words)(audio[pairs], image[pairs]).loss
    for got in (by_word, by_token, by_sample):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_lengths_of_tokens_and_words_do_not_matter():
    """One factor a sample, as a mean takes its tokens' share from their lengths; one a word."""
    audio, image = tokens(seed=9)
    words = vocabulary()
    expected = AssignmentPredictionLoss(words)(audio, image).loss
    per_sample = torch.tensor([0.01, 1.0, 7.0, 1000.0], dtype=torch.float64)[:, None, None]
    per_word = torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]
    got = AssignmentPredictionLoss(per_word * words)(per_sample * audio, 0.1 * image).loss
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_masked_tokens_are_as_good_as_removed():
    """Value and gradients, with masks that differ by sample and NaN where nothing may look."""
    audio, image = tokens(batch=3, seed=10)
    loss = AssignmentPredictionLoss(vocabulary())
    audio_mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    image_mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    padded = [
        batch.masked_fill(~mask[..., None], torch.nan).requires_grad_()
        for batch, mask in ((audio, audio_mask), (image, image_mask))
    ]
    masked = loss(*padded, audio_mask, image_mask)
    removed = [
        torch.stack([one[keep] for one, keep in zip(batch, mask, strict=True)]).requires_grad_()
        for batch, mask in ((audio, audio_mask), (image, image_mask))
    ]
    plain = loss(*removed)
    torch.testing.assert_close(masked.loss, plain.loss, rtol=1e-12, atol=0)
    assert masked.logs == pytest.approx(plain.logs, rel=1e-12)
    got, wanted = torch.autograd.grad(masked.loss, padded), torch.autograd.grad(plain.loss, removed)
    for full, part, mask in zip(got, wanted, (audio_mask, image_mask), strict=True):
        torch.testing.assert_close(full[mask], part.flatten(0, 1), rtol=1e-10, atol=1e-14)
        assert (full[~mask] == 0).all()


def test_frozen_image_tokens_leave_half_of_the_loss_a_gradient():
    """Only the audio's prediction has one: (p - q) / (2 B t) by its cosines."""
    audio, image = tokens(seed=11)
    audio = audio[:, :1].clone().requires_grad_()
    words = vocabulary()
    AssignmentPredictionLoss(words)(audio, image).loss.backward()
    scores = naive_scores(audio.detach(), words)
    target = torch.from_numpy(naive_assignment(naive_scores(image, words).numpy()))
    by_cosine = ((scores / TEMPERATURE).softmax(dim=1) - target) / (2 * len(audio) * TEMPERATURE)
    by_unit = by_cosine @ (words / words.norm(dim=1, keepdim=True))
    length = audio.detach()[:, 0].norm(dim=1, keepdim=True)
    unit = audio.detach()[:, 0] / length
    expected = (by_unit - (by_unit * unit).sum(dim=1, keepdim=True) * unit) / length
    torch.testing.assert_close(audio.grad[:, 0], expected, rtol=1e-10, atol=1e-14)
    assert image.grad is None


def test_gradients_by_differences(monkeypatch):
    """With the assignments held where they are, as the gradient takes them to be."""
    audio, image = (batch.requires_grad_() for batch in tokens(batch=3, seed=12))
    loss = AssignmentPredictionLoss(vocabulary(), temperature=0.5, eps=0.2)
    held = []
    solve = module.log_assignment

    def hold(scores, **options):
        if not held:
            held.append(solve(scores, **options))
        return held[0]

    monkeypatch.setattr(module, "log_assignment", hold)
    assert torch.autograd.gradcheck(lambda *pair: loss(*pair).loss, (audio, image))
    assert len(held) == 1 and not held[0].requires_grad


def test_descent_makes_pairs_agree():
    """Audio tokens that follow the gradient come to predict the image's assignment."""
    audio, image = tokens(batch=4, seed=13)
    loss = AssignmentPredictionLoss(vocabulary(4))
    audio.requires_grad_()
    before = loss(audio, image).logs
    optimizer = torch.optim.Adam([audio], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(audio, image).loss.backward()
        optimizer.step()
    after = loss(audio, image).logs
    assert after["audio_term"] < 0.5 * before["audio_term"]
    assert after["assignment_prediction"] < 0.7 * before["assignment_prediction"]


def test_half_precision_is_computed_in_float32():
    audio, image = (batch.bfloat16().requires_grad_() for batch in tokens(seed=14))
    words = vocabulary().bfloat16()
    output = AssignmentPredictionLoss(words)(audio, image)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and audio.grad.dtype == image.grad.dtype == torch.bfloat16
    wide = [batch.detach().float() for batch in (audio, image)]
    assert torch.equal(output.loss, AssignmentPredictionLoss(words.float())(*wide).loss)
    exact = naive_loss(*(batch.double() for batch in wide), words.double())
    torch.testing.assert_close(output.loss.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("of_tokens", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_words", [torch.float32, torch.float64])
def test_tokens_decide_the_precision(of_tokens, of_words):
    audio, image = tokens(seed=15)
    words = vocabulary()
    output = AssignmentPredictionLoss(words.to(of_words))(audio.to(of_tokens), image.to(of_tokens))
    assert output.loss.dtype == of_tokens
    torch.testing.assert_close(output.loss.double(), naive_loss(audio, image, words), rtol=2e-5, atol=0)


def test_autocast_changes_nothing():
    audio, image = tokens(seed=16, dtype=torch.float32)
    audio.requires_grad_()
    loss = AssignmentPredictionLoss(vocabulary(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(audio, image).loss
    outside = loss(audio, image).loss
    assert torch.equal(inside, outside) and inside.dtype == torch.float32
    assert torch.equal(*(torch.autograd.grad(value, audio)[0] for value in (inside, outside)))


def test_same_tokens_same_loss():
    """Bit by bit, without a draw from the generator."""
    audio, image = (batch.requires_grad_() for batch in tokens(seed=17))
    loss = AssignmentPredictionLoss(vocabulary())
    state = torch.get_rng_state()
    first, second = loss(audio, image), loss(audio, image)
    assert torch.equal(first.loss, second.loss) and first.logs == second.logs
    grads = [torch.autograd.grad(output.loss, (audio, image)) for output in (first, second)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_words_are_a_frozen_copy_that_is_not_saved():
    embedding = torch.nn.Embedding.from_pretrained(vocabulary(dtype=torch.float32), freeze=False)
    loss = AssignmentPredictionLoss(embedding.weight)
    audio, image = (batch.requires_grad_() for batch in tokens(seed=18, dtype=torch.float32))
    output = loss(audio, image)
    output.loss.backward()
    assert embedding.weight.grad is None and not loss.words.requires_grad
    assert not list(loss.parameters()) and not loss.state_dict()
    torch.testing.assert_close(loss.words.norm(dim=1), torch.ones(7))
    with torch.no_grad():
        embedding.weight.mul_(-1)
    assert torch.equal(loss(audio, image).loss, output.loss)
    assert loss.to(torch.float64).words.dtype == torch.float64


def test_exported_but_not_to_be_named_as_an_objective():
    """A configuration cannot hold word embeddings, and the aligning stage gives an objective its width alone."""
    assert issubclass(AssignmentPredictionLoss, AlignmentLoss)
    assert AssignmentPredictionLoss not in LOSSES.values()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda words: words.index_fill(0, torch.tensor([2]), torch.nan), "word_embeddings holds a NaN.* in row 2"),
        (lambda words: words.index_fill(1, torch.tensor([1]), torch.inf), "word_embeddings .*infinity in row 0"),
        (lambda words: words.index_fill(0, torch.tensor([5]), 0.0), "word_embeddings holds only zeros in row 5"),
        (lambda words: words[0], r"word_embeddings must be \(words, width\), not of shape \(6,\)"),
        (lambda words: words[None], r"word_embeddings must be .* not of shape \(1, 7, 6\)"),
        (lambda words: words[:0], r"word_embeddings must be .* not of shape \(0, 6\)"),
    ],
)
def test_bad_words(spoil, message):
    with pytest.raises(ValueError, match=message):
        AssignmentPredictionLoss(spoil(vocabulary()))


@pytest.mark.parametrize(("words", "kind"), [([[1.0]], "list"), (torch.ones(3, 2, dtype=torch.long), "torch.int64")])
def test_words_of_the_wrong_kind(words, kind):
    with pytest.raises(TypeError, match=f"word_embeddings must be a floating-point tensor, not {kind}"):
        AssignmentPredictionLoss(words)


def test_words_of_another_width():
    with pytest.raises(ValueError, match="audio_tokens and image_tokens are 6 wide and word_embeddings 8"):
        AssignmentPredictionLoss(vocabulary(width=8))(*tokens())


@pytest.mark.parametrize("name", ["temperature", "eps", "num_iterations"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, not {value}"):
        AssignmentPredictionLoss(vocabulary(), **{name: value})


def test_bad_tokens_are_named():
    audio, image = tokens()
    loss = AssignmentPredictionLoss(vocabulary())
    with pytest.raises(ValueError, match="audio_tokens holds a NaN.* sample 1"):
        loss(audio.index_fill(0, torch.tensor([1]), torch.nan), image)
    with pytest.raises(ValueError, match="image_mask leaves no token in sample 3"):
        loss(audio, image, image_mask=torch.tensor([[True] * 3] * 3 + [[False] * 3]))
