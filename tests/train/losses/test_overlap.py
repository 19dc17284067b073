"""Transport that is solved while the caller does something else."""

import threading

import pytest
import torch

from dali_llava.train.losses import AttentiveTransportLoss, MMDLoss, TransportLoss
from dali_llava.train.transport import solve, solve_transport, start_transport


def clouds(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    audio, image = (torch.randn(3, count, 16, generator=generator, dtype=torch.float64) for count in (20, 15))
    return audio.to(dtype).requires_grad_(), image.to(dtype)


def make(kind: str, overlap: bool, solver: str = "exact"):
    torch.manual_seed(0)
    if kind == "ot":
        return TransportLoss(solver=solver, overlap=overlap)
    loss = AttentiveTransportLoss(16, num_heads=4, temperature=0.05, solver=solver, overlap=overlap)
    loss.set_epoch(3 if kind == "ot_att in epoch 3" else 1)
    return loss


@pytest.fixture
def held_up(monkeypatch):
    """A solver that waits for an event, and the event."""
    event = threading.Event()

    def solve_exact(*arguments, **options):
        assert event.wait(60)
        return exact(*arguments, **options)

    exact = solve.SOLVERS["exact"]
    monkeypatch.setitem(solve.SOLVERS, "exact", solve_exact)
    return event


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
@pytest.mark.parametrize("kind", ["ot", "ot_att in epoch 1", "ot_att in epoch 3"])
def test_same_loss_logs_and_gradients_bit_for_bit(kind, solver):
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 12:] = False
    found = []
    for overlap in (False, True):
        loss, (audio, image) = make(kind, overlap, solver), clouds()
        output = loss(audio, image, audio_mask=mask)
        total = MMDLoss()(audio, image).loss + output.loss
        total.backward()
        found.append((output.loss.detach(), output.logs, audio.grad, *(p.grad for p in loss.parameters())))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("kind", ["ot", "ot_att in epoch 3"])
def test_the_caller_goes_on_while_the_solver_works(kind, held_up):
    audio, image = clouds()
    output = make(kind, overlap=True)(audio, image)  # without overlap it would wait here, for an event of later
    other = MMDLoss()(audio, image).loss
    other.backward()
    held_up.set()
    before = audio.grad.clone()
    output.loss.backward()
    torch.testing.assert_close(audio.grad - before, gradient_alone(kind), rtol=1e-4, atol=1e-6)


def gradient_alone(kind: str) -> torch.Tensor:
    audio, image = clouds()
    (gradient,) = torch.autograd.grad(make(kind, overlap=False)(audio, image).loss, audio)
    return gradient


def test_under_autocast_and_without_gradients():
    audio, image = clouds()
    expected = make("ot", overlap=False)(audio, image).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = make("ot", overlap=True)(audio, image)
        assert torch.equal(output.loss, expected) and output.loss.requires_grad
    with torch.no_grad():
        output = make("ot", overlap=True)(audio, image)
        assert torch.equal(output.loss, expected) and not output.loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(make("ot", overlap=True)(audio, image).loss, expected)


def test_bad_input_is_told_at_once_and_a_failed_solver_where_the_loss_is_read(monkeypatch):
    audio, image = clouds()
    with pytest.raises(ValueError, match="image_tokens holds a NaN or an infinity in sample 2"):
        make("ot", overlap=True)(audio, image.index_fill(0, torch.tensor([2]), torch.nan))
    failing = TransportLoss(solver_options={"max_iterations": 1, "num_threads": 1}, overlap=True)
    with pytest.warns(UserWarning):  # POT's, from another thread: it may come before the loss is read
        output = failing(audio, image)
        with pytest.raises(RuntimeError, match="no exact transport for sample 0"):
            output.loss.item()


def test_started_transport_is_the_same_as_solved():
    audio, image = clouds(torch.float64)
    started, solved = start_transport(audio, image, solver="auto")(), solve_transport(audio, image)
    assert started.solver == "exact" and torch.equal(started.cost, solved.cost)
    assert torch.equal(started.plan.to_dense(), solved.plan.to_dense())
    assert all(map(torch.equal, started.potentials, solved.potentials))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    audio, image = (tensor.detach().cuda() for tensor in clouds())
    found = []
    for overlap in (False, True):
        tokens = audio.clone().requires_grad_()
        output = make("ot", overlap, "certified")(tokens, image)
        (output.loss + MMDLoss()(tokens, image).loss).backward()
        found.append((output.loss.detach(), tokens.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
