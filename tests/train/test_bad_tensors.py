"""Every solver and loss rejects bad tensors with an error that names them, and accepts unusual layouts.

POT's network simplex can crash the process. Therefore a child process, which runs this file as a program, executes
all cases and prints one line of JSON after each. A case without a line crashed the process or comes after the crash.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from dali_llava.train.losses import (
    AlignmentLoss,
    AttentiveTransportLoss,
    ContrastiveLoss,
    MMDLoss,
    TokenAssignmentLoss,
    TransportLoss,
)
from dali_llava.train.transport import solve_transport


BATCH, WIDTH, COUNTS = 3, 4, (7, 5)
TIMEOUT = 120  # seconds; the child takes about ten, mostly for imports


def attentive(epoch: int) -> AlignmentLoss:
    loss = AttentiveTransportLoss(WIDTH, num_heads=2, temperature=0.05)
    loss.set_epoch(epoch)
    return loss


SOLVERS = ["exact", "certified", "sinkhorn"]
LOSSES: dict[str, Callable[[], AlignmentLoss]] = {
    "mmd": MMDLoss,
    **{f"ot {solver}": lambda solver=solver: TransportLoss(solver) for solver in SOLVERS},
    "ot_att in epoch 1": lambda: attentive(1),
    "ot_att in epoch 3": lambda: attentive(3),
    "contrastive": ContrastiveLoss,
    "assignment": TokenAssignmentLoss,
}


def fill(sample: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fill one sample with `value`."""
    return lambda tensor: tensor.index_fill(0, torch.tensor([sample]), value)


def put(sample: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one element of the last sample to `value`."""

    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[sample].view(-1)[-1] = value
        return tensor

    return put


# Name, function that spoils an argument, and message. {own} is the spoilt argument, {x} and {y} are the point sets.
NOT_FINITE = "^{own} holds a NaN or an infinity in sample "
NOT_POINTS = r"^{own} must be \(batch, tokens, width\)"
POINTS = [
    ("one NaN", put(1, math.nan), NOT_FINITE + "1$"),
    ("one infinity", put(2, math.inf), NOT_FINITE + "2$"),
    ("one minus infinity", put(1, -math.inf), NOT_FINITE + "1$"),
    ("a sample of NaN", fill(2, math.nan), NOT_FINITE + "2$"),
    ("nothing but infinity", lambda t: torch.full_like(t, math.inf), NOT_FINITE + "0$"),
    ("a NaN in bfloat16", lambda t: put(1, math.nan)(t.bfloat16()), NOT_FINITE + "1$"),
    ("beyond float16", lambda t: put(2, 1e5)(t).half(), NOT_FINITE + "2$"),
    ("no tokens", lambda t: t[:, :0], "^{own} holds no tokens, from sample 0 on"),
    ("no samples", lambda t: t[:0], "^{own} is empty"),
    ("no width", lambda t: t[..., :0], "^{own} is empty"),
    ("another width", lambda t: t[..., :3], "^{x} is [34] wide and {y} [34];"),
    ("another batch", lambda t: t[:2], "^{x} holds [23] samples and {y} [23];"),
    ("one sample for all", lambda t: t[:1], "^{x} holds [13] samples and {y} [13];"),
    ("no batch dimension", lambda t: t[0], NOT_POINTS),
    ("one dimension", lambda t: t[0, 0], NOT_POINTS),
    ("no dimension", lambda t: t[0, 0, 0], NOT_POINTS),
    ("four dimensions", lambda t: t[None], NOT_POINTS),
    ("another device", lambda t: t.to("meta"), "^{x} is on (cpu|meta) and {y} on (cpu|meta);"),
]
WEIGHTS = [
    ("one NaN", put(1, math.nan), NOT_FINITE + "1$"),
    ("one infinity", put(2, math.inf), NOT_FINITE + "2$"),
    ("one minus infinity", put(1, -math.inf), NOT_FINITE + "1$"),
    ("both infinities", lambda t: put(1, math.inf)(t).index_fill(1, torch.tensor([0]), -math.inf), NOT_FINITE + "0$"),
    ("a sample of NaN", fill(2, math.nan), NOT_FINITE + "2$"),
    ("a sum beyond float64", fill(1, 1e308), NOT_FINITE + "1$"),
    ("one negative", put(2, -1e-3), "^{own} holds a negative weight in sample 2$"),
    ("all negative", lambda t: -t, "^{own} holds a negative weight in sample 0$"),
    ("all 0", fill(1, 0.0), "^{own} holds no weight above 0 in sample 1$"),
    ("all minus 0", fill(2, -0.0), "^{own} holds no weight above 0 in sample 2$"),
    ("too few", lambda t: t[:, 1:], r"^{own} must be of shape \(3, "),
    ("none", lambda t: t[:, :0], r"^{own} must be of shape \(3, "),
    ("another batch", lambda t: t[:2], r"^{own} must be of shape \(3, "),
    ("no batch dimension", lambda t: t[0], r"^{own} must be of shape \(3, "),
    ("no dimension", lambda t: t[0, 0], r"^{own} must be of shape \(3, "),
    ("another device", lambda t: t.to("meta"), "^{own} is on meta and its points on cpu;"),
]
MASKS = [
    ("no token in one sample", fill(2, False), "^{own} leaves no token in sample 2;"),
    ("no token at all", torch.zeros_like, "^{own} leaves no token in sample 0;"),
    ("too few", lambda t: t[:, 1:], r"^{own} must be of shape \(3, "),
    ("none", lambda t: t[:, :0], r"^{own} must be of shape \(3, "),
    ("another batch", lambda t: t[:2], r"^{own} must be of shape \(3, "),
    ("no batch dimension", lambda t: t[0], r"^{own} must be of shape \(3, "),
    ("no dimension", lambda t: t[0, 0], r"^{own} must be of shape \(3, "),
    ("another device", lambda t: t.to("meta"), "^{own} is on meta and .* on cpu;"),
]
# The same values in memory that is not contiguous or, in the last case, shared between the samples.
LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "a window": lambda t: torch.cat((t, t, t), dim=1)[:, t.shape[1] : 2 * t.shape[1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@dataclass(frozen=True)
class Case:
    """A call of `who`, a key of `LOSSES` or `SOLVERS`: how `argument` is changed, and the expected message.

    Without a message, the call succeeds, `spoil` applies to all arguments, and the result equals that of contiguous
    tensors.
    """

    who: str
    what: str
    spoil: Callable[[torch.Tensor], torch.Tensor]
    argument: str = ""
    message: str = ""

    def __str__(self) -> str:
        return f"{self.who}: {self.argument} {self.what}"


def all_cases() -> Iterator[Case]:
    for names, who_all, tables in (
        (("x", "y"), SOLVERS, ((("x", "y"), POINTS), (("a", "b"), WEIGHTS))),
        (
            ("audio_tokens", "image_tokens"),
            LOSSES,
            ((("audio_tokens", "image_tokens"), POINTS), (("audio_mask", "image_mask"), MASKS)),
        ),
    ):
        for who in who_all:
            for arguments, table in tables:
                for own in arguments:
                    for what, spoil, message in table:
                        yield Case(who, what, spoil, own, message.format(own=own, x=names[0], y=names[1]))
            for what, layout in LAYOUTS.items():
                yield Case(who, what, layout)
    one_sample = "^audio_tokens holds one sample, which has no negatives;"
    yield Case("contrastive", "one sample, as in image_tokens", lambda t: t[:1], "audio_tokens", one_sample)


CASES = list(all_cases())


def good_arguments(who: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(BATCH, n, WIDTH, generator=generator, dtype=torch.float64) for n in COUNTS]
    if who in SOLVERS:
        weights = [torch.rand(BATCH, n, generator=generator, dtype=torch.float64) + 0.1 for n in COUNTS]
        return dict(zip("xyab", points + weights, strict=True))
    masks = [torch.rand(BATCH, n, generator=generator) < 0.7 for n in COUNTS]
    for mask in masks:
        mask[:, 0] = True
    names = ("audio_tokens", "image_tokens", "audio_mask", "image_mask")
    return dict(zip(names, points + masks, strict=True))


def call(who: str, arguments: dict[str, torch.Tensor]) -> list[float]:
    """Returns the loss or the sum of the costs, and all gradients, in one list."""
    learnt = [tensor.detach().requires_grad_() for tensor in arguments.values() if tensor.is_floating_point()]
    arguments = dict(zip(arguments, [*learnt, *list(arguments.values())[len(learnt) :]], strict=True))
    if who in SOLVERS:
        value = solve_transport(**arguments, solver=who).cost.sum()
    else:
        torch.manual_seed(0)
        value = LOSSES[who]().double()(**arguments).loss
    gradients = torch.autograd.grad(value, learnt)
    return [value.item(), *torch.cat([gradient.flatten() for gradient in gradients]).tolist()]


def outcome(case: Case) -> dict:
    """Returns the child's report of a case."""
    arguments = good_arguments(case.who)
    if not case.message:
        arguments = {name: case.spoil(tensor) for name, tensor in arguments.items()}
        contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in arguments.items()}
        return {
            "contiguous": all(tensor.is_contiguous() for tensor in arguments.values()),
            "got": call(case.who, arguments),
            "expected": call(case.who, contiguous),
        }
    if case.what == "one sample, as in image_tokens":
        arguments = {name: tensor[:1] for name, tensor in arguments.items()}
    elif not case.argument.endswith("mask"):
        arguments = {name: tensor for name, tensor in arguments.items() if not name.endswith("mask")}
    arguments[case.argument] = case.spoil(arguments[case.argument])
    try:
        return {"error": None, "message": f"no error but {call(case.who, arguments)}"}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def run_all() -> None:
    """Main function of the child: prints and flushes one line of JSON after each case."""
    for case in CASES:
        try:
            result = outcome(case)
        except Exception as error:
            result = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps({"case": str(case), **result}), flush=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """The child's reports by case. For a case without a report, "died" gives the reason."""
    path = tmp_path_factory.mktemp("child") / "lines"
    command = [sys.executable, "-X", "faulthandler", __file__]
    with path.open("w") as lines:
        child = subprocess.Popen(
            command, stdout=lines, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            _, errors = child.communicate(timeout=TIMEOUT)
            end = f"ended with {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            _, errors = child.communicate()
            end = f"was still at it after {TIMEOUT} s"
    reports = {report["case"]: report for report in map(json.loads, path.read_text().splitlines())}
    unreported = [str(case) for case in CASES if str(case) not in reports]
    died = {"died": f"the child {end} in {unreported[:1]}\n{errors[:3000]}"}
    return {str(case): reports.get(str(case), died) for case in CASES}


@pytest.mark.parametrize("case", [case for case in CASES if case.message], ids=str)
def test_bad_tensor_is_named(case, outcomes):
    report = outcomes[str(case)]
    assert "died" not in report, report["died"]
    assert report["error"] == "ValueError", report["message"]
    assert re.search(case.message, report["message"])


@pytest.mark.parametrize("case", [case for case in CASES if not case.message], ids=str)
def test_layout_in_memory_does_not_matter(case, outcomes):
    """BLAS may sum in a different order, which changes each term by about 1e-16."""
    report = outcomes[str(case)]
    assert "died" not in report, report["died"]
    assert "error" not in report, report
    assert not report["contiguous"] and any(report["expected"])
    assert report["got"] == pytest.approx(report["expected"], rel=1e-10, abs=1e-12)


def test_each_case_is_run_once():
    assert len({str(case) for case in CASES}) == len(CASES)


if __name__ == "__main__":
    run_all()
