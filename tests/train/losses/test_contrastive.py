import pytest
import torch
import torch.nn.functional as F

from dali_llava.train.losses import ContrastiveLoss


def naive_infonce(audio, image, temperature=0.05):
    """The definition, one term at a time."""
    audio, image = audio.mean(1), image.mean(1)
    loss = 0
    for queries, keys in ((audio, image), (image, audio)):
        for i, query in enumerate(queries):
            scores = torch.stack([F.cosine_similarity(query, key, dim=0) for key in keys]) / temperature
            loss = loss - (scores[i] - scores.exp().sum().log())
    return loss / (2 * len(audio))


def tokens(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(batch, 4, 6, generator=generator, dtype=torch.float64)
    return audio.requires_grad_(), (audio.detach() + torch.randn(batch, 4, 6, generator=generator)).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_definition(dtype, tolerance):
    audio, image = tokens(5)
    narrow = [batch.detach().to(dtype).requires_grad_() for batch in (audio, image)]
    value = ContrastiveLoss()(*narrow).loss
    expected = naive_infonce(audio, image)
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    for got, wanted in zip(
        torch.autograd.grad(value, narrow), torch.autograd.grad(expected, (audio, image)), strict=True
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_orthogonal_pairs():
    """The cosine is 1 for a pair and 0 otherwise: -log of e^20 / (e^20 + 1)."""
    audio = torch.eye(2, dtype=torch.float64)[:, None]
    output = ContrastiveLoss()(audio, 3 * audio)
    assert output.loss.item() == pytest.approx(torch.tensor(-20.0, dtype=torch.float64).exp().log1p().item(), rel=1e-6)
    assert output.logs["accuracy"] == 1


def test_one_pair_has_no_negatives():
    with pytest.raises(ValueError, match="audio_tokens holds one sample.*no negatives"):
        ContrastiveLoss()(*tokens(1))


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature"):
        ContrastiveLoss(temperature=0.0)


# Loss and gradients of each rank's part of the tokens, for equal and for unequal parts.
RANK = """
from dali_llava.train.losses import ContrastiveLoss

results = []
for first in (3, 4):
    part = slice(0, first) if rank == 0 else slice(first, 6)
    audio, image = (torch.tensor(batch, dtype=torch.float64)[part].requires_grad_() for batch in given)
    try:
        loss = ContrastiveLoss()(audio, image).loss
        loss.backward()
        results.append({"loss": loss.item(), "audio": audio.grad.tolist(), "image": image.grad.tolist()})
    except ValueError as error:
        results.append({"error": str(error)})
"""


@pytest.fixture(scope="module")
def ranks(on_two_ranks):
    """Results of two ranks, with 3 and 3 or with 4 and 2 pairs."""
    return on_two_ranks(RANK, [batch.tolist() for batch in tokens(6)])


def test_two_ranks_make_one_batch(ranks):
    """The mean of the ranks' losses and gradients, as in DistributedDataParallel, equals that of the whole batch."""
    audio, image = tokens(6)
    first, second = (results[0] for results in ranks)
    loss = ContrastiveLoss()(audio, image).loss
    loss.backward()
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(loss.item(), rel=1e-12)
    for name, expected in (("audio", audio.grad), ("image", image.grad)):
        gathered = torch.tensor(first[name] + second[name], dtype=torch.float64) / 2
        torch.testing.assert_close(gathered, expected, rtol=1e-10, atol=1e-12)


def test_ranks_of_different_sizes_are_refused(ranks):
    for results in ranks:
        assert "[4, 2] samples by rank" in results[1]["error"]
