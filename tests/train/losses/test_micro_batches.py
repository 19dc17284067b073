"""The transport of a batch that arrives in parts."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from dali_llava.train.losses import AttentiveTransportLoss, TransportLoss, transport
from dali_llava.train.transport import TransportProblem


BATCH = 5


def make(epoch: int | None) -> TransportLoss:
    """`TransportLoss`, or `AttentiveTransportLoss` in an epoch. With a small temperature, the weights differ."""
    if epoch is None:
        return TransportLoss().double()
    torch.manual_seed(0)
    loss = AttentiveTransportLoss(16, num_heads=4, temperature=0.05).double()
    loss.set_epoch(epoch)
    return loss


def tokens(masked: bool) -> tuple[torch.Tensor, ...]:
    """Five pairs. Their distances differ, so that lambda depends on the whole batch."""
    generator = torch.Generator().manual_seed(1)
    audio, image = (torch.randn(BATCH, n, 16, generator=generator, dtype=torch.float64) for n in (7, 6))
    image = image + torch.arange(BATCH)[:, None, None]
    audio_mask = torch.arange(7) < torch.tensor([[7], [3], [5], [7], [1]]) if masked else None
    return audio.requires_grad_(), image.requires_grad_(), audio_mask, None


def parts(batch: tuple[torch.Tensor, ...], sizes=(2, 2, 1)):
    split = [itertools.repeat(None) if tensor is None else tensor.split(sizes) for tensor in batch]
    return zip(*split, strict=False)


@pytest.fixture
def solutions(monkeypatch) -> list:
    """The solutions of all problems, in the order in which they are solved."""
    solved = []
    solve = TransportProblem.solve
    monkeypatch.setattr(TransportProblem, "solve", lambda self: solved.append(solve(self)) or solved[-1])
    return solved


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("epoch", [None, 1, 3])
def test_parts_give_the_loss_and_gradients_of_the_batch(solutions, epoch, masked):
    loss, batch = make(epoch), tokens(masked)
    wanted = [*batch[:2], *loss.parameters()]
    whole = loss(*batch)
    in_parts = loss.over_micro_batches(parts(batch))

    alone, *solved = solutions
    assert [len(solution.cost) for solution in solved] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([each.cost for each in solved]), alone.cost, rtol=1e-13, atol=0)
    plans = torch.cat([each.plan.to_dense() for each in solved])
    torch.testing.assert_close(plans, alone.plan.to_dense(), rtol=1e-10, atol=1e-13)

    torch.testing.assert_close(in_parts.loss, whole.loss, rtol=1e-13, atol=0)
    assert in_parts.logs.keys() == whole.logs.keys()
    for name in in_parts.logs.keys() - {"transport_seconds"}:
        assert in_parts.logs[name] == pytest.approx(whole.logs[name], rel=1e-12, abs=1e-15)
    for found, expected in zip(
        torch.autograd.grad(in_parts.loss, wanted), torch.autograd.grad(whole.loss, wanted), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_part_is_solved_while_the_next_one_is_made(monkeypatch):
    """The second part is made after the solver has begun with the first one, which waits for the second."""
    begun, made = threading.Event(), threading.Event()
    solve = TransportProblem.solve

    def waits(self):
        begun.set()
        assert made.wait(timeout=60)
        return solve(self)

    def stream():
        first, second = parts(tokens(False), (3, 2))
        yield first
        assert begun.wait(timeout=60)
        made.set()
        yield second

    monkeypatch.setattr(TransportProblem, "solve", waits)
    found = make(None).over_micro_batches(stream())
    torch.testing.assert_close(found.loss, make(None)(*tokens(False)).loss, rtol=1e-13, atol=0)


def test_thread_of_the_solver_builds_no_graph(solutions):
    make(3).over_micro_batches(parts(tokens(False)))
    assert not any(tensor.requires_grad for each in solutions for tensor in (each.plan, each.u, each.v, each.gap))


@pytest.mark.parametrize("in_parts", [False, True])
def test_transport_seconds_are_the_time_until_all_is_solved(monkeypatch, in_parts):
    """The clock advances by 1 at each call: the time does not depend on the number of parts."""
    monkeypatch.setattr(transport, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    loss, batch = make(None), tokens(False)
    output = loss.over_micro_batches(parts(batch)) if in_parts else loss(*batch)
    assert output.logs["transport_seconds"] == 1


def test_errors_of_the_solver_reach_the_caller():
    loss = TransportLoss(solver="sinkhorn", solver_options={"eps": (0.1,), "num_iterations": (1, 2)})
    with pytest.raises(ValueError, match="eps and num_iterations must be of one length"):
        loss.over_micro_batches(parts(tokens(False)))


def test_bad_tokens_are_named():
    audio, image, *masks = tokens(False)
    image.data[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="image_tokens.*sample 1"):  # of the second part
        make(None).over_micro_batches(parts((audio, image, *masks)))


def test_autocast_does_not_reach_the_loss():
    """Only the generator, which runs the towers, is under autocast."""
    loss, batch = make(3).float(), [None if each is None else each.detach().float() for each in tokens(False)]
    expected = loss(*batch).loss

    def stream():
        for part in parts(batch):
            assert torch.is_autocast_enabled("cpu")
            yield part

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.over_micro_batches(stream()).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
