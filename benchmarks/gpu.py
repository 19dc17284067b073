"""Measure the alignment objectives on a GPU at full size, and the share of an alignment step spent in OT^Att.

The tokens are synthetic float32: 512 audio and 576 image tokens of width 1024. The benchmark requires one GPU with
80 GB of memory and at least ten CPU cores, which run the network simplex. It takes a few minutes:

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts step --step-batch 128
    python benchmarks/gpu.py --device cpu --batch 2 --step-batch 1 --shape 32 36 16 --repeats 1

The last command is a smoke test for the CPU, which is not expected to meet the speed requirements.

Parts:
    transport   the "certified" solver and the default "exact" solver compared with POT's emd2 in a loop over the
                pairs, forward and backward with respect to the audio tokens, as in transport.py; then the stages of
                "certified"
    mmd         MMDLoss compared with the same loss in a loop over the pairs, as in mmd.py
    step        a training step of the full-size audio tower under bf16 autocast (forward, loss, backward, Adam) with
                OT^Att in its third epoch, compared with the same step under a loss of negligible cost. The image
                tokens are precomputed; with the vision tower in the step, the share of OT^Att is smaller.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import mmd
import torch
import transport
from measure import (
    FULL_SHAPE,
    benchmark_parser,
    format_spread,
    load_average,
    parse_benchmark,
    positive_int,
    save,
    show,
    spread,
    time_in_turns,
    wait_for,
)
from torch import nn
from tqdm import trange

from dali_llava.modeling import CavMaeAudioConfig, CavMaeAudioModel
from dali_llava.train.losses import AttentiveTransportLoss, LossOutput
from dali_llava.train.transport import certified, solve, solve_transport


FULL_BATCH = 256
TRANSPORT_TIMES_FASTER = {"certified": 20.0}
MMD_TIMES_FASTER = 5.0
MMD_MEMORY_SHARE = 0.1
# Lower bounds in seconds for an H200 at full size (4.3 TB/s, 790 TFLOP/s in bf16): one pass of the cost matrices
# through memory, 50 streamed Sinkhorn iterations, and MMD forward and backward (a range).
FLOORS = {"distances": 0.20e-3, "arcs": 7e-3, "mmd": (1.6e-3, 2.4e-3)}
# The functions in which "certified" spends its time. A function that no longer exists is left out of the table.
STAGES = {
    "distances": (solve, "expanded_costs"),
    "arcs": (certified, "likely_arcs"),
    "simplex": (certified, "_solve_restricted"),
}
EPOCH = 3  # the attention is trained from epoch 2 on
TRIVIAL = "mean tokens"
# "auto" selects one of these.
STEP_SOLVERS = ("certified", "exact")


def measure_transport(arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Time the loop, "certified" and "exact" in turn, then the stages of "certified", and print both tables."""
    batch = arguments.batch
    case = transport.measure_case("uniform", batch, ("certified", "exact"), arguments)
    problem = transport.make_problem("uniform", batch, tuple(arguments.shape), arguments.device)
    work = partial(transport.run_ours, problem, "certified")
    rounds = [
        stage_seconds(work, arguments.device) for _ in trange(arguments.repeats, desc="transport, stages", leave=False)
    ]
    stages = {name: spread(seconds[name] for seconds in rounds) for name in rounds[0]}
    floors = {name: FLOORS[name] for name in stages if name in FLOORS} if at_full_size(arguments) else {}
    case |= {"stages": stages, "floors": floors}
    musts = transport.requirements([case], TRANSPORT_TIMES_FASTER)
    show(transport.TITLE, transport.COLUMNS, transport.table_rows([case]), musts)
    columns = ["stage", "ms", "share of total", "H200 lower bound, ms"]
    show(f"Stages of certified, B = {batch} (min / median / max)", columns, stage_rows(stages, floors), [])
    return case, musts


def stage_seconds(
    work: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds that one call of `work` spends in each of `STAGES`, in everything else, and in total.

    The device is synchronized before and after each stage, so the total is slightly longer than without timing.
    """
    seconds = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wait_for(device)
        start = clock()
        yield
        wait_for(device)
        seconds[name] = seconds.get(name, 0.0) + clock() - start

    def stand_in(name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            with timed(name):
                return function(*args, **kwargs)

        return run

    patches = [
        mock.patch.object(module, function, stand_in(name, getattr(module, function)))
        for name, (module, function) in STAGES.items()
        if hasattr(module, function)
    ]
    for patch in patches:
        patch.start()
    try:
        with timed("whole"):
            work()
    finally:
        for patch in patches:
            patch.stop()
    whole = seconds.pop("whole")
    return seconds | {"rest": whole - sum(seconds.values()), "whole": whole}


def stage_rows(stages: dict[str, dict[str, float]], floors: dict[str, float]) -> list[list[str]]:
    """One row per stage: milliseconds, share of the total, lower bound."""
    whole = stages["whole"]["median"]
    return [
        [
            name,
            format_spread({key: 1e3 * value for key, value in own.items()}),
            f"{own['median'] / whole:.1%}",
            f"{1e3 * floors[name]:.2g}" if name in floors else "-",
        ]
        for name, own in stages.items()
    ]


def measure_mmd(arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Time the loop and MMDLoss in turn, measure their peak memory and errors, and print the table."""
    case = mmd.measure_case(arguments.batch, "gram", arguments)
    musts = mmd.requirements([case], MMD_TIMES_FASTER, MMD_MEMORY_SHARE)
    rows = mmd.table_rows([case])
    if at_full_size(arguments):
        case["floor"] = FLOORS["mmd"]
        floor = "{:.2g} to {:.2g}".format(*FLOORS["mmd"])
        rows.append([str(arguments.batch), "H200 lower bound", floor, *["-"] * (len(mmd.COLUMNS) - 3)])
    show(mmd.TITLE, mmd.COLUMNS, rows, musts)
    return case, musts


def at_full_size(arguments: argparse.Namespace) -> bool:
    """Return True if the lower bounds apply to this run."""
    return arguments.batch == FULL_BATCH and tuple(arguments.shape) == FULL_SHAPE


class MeanTokens(nn.Module):
    """Squared difference of the mean tokens: a loss of negligible cost, for timing the rest of the step."""

    def forward(self, audio_tokens: torch.Tensor, image_tokens: torch.Tensor) -> LossOutput:
        return LossOutput((audio_tokens.float().mean(dim=1) - image_tokens.mean(dim=1)).square().mean())


class AlignmentStep:
    """Training step under bf16 autocast. It owns its audio tower and objective; each call runs one step.

    Args:
        config: configuration of the audio tower.
        objective: loss between the audio tokens and the image tokens.
        spectrograms: (B, frames, mels).
        image_tokens: (B, M, D), without gradient.
    """

    def __init__(
        self, config: CavMaeAudioConfig, objective: nn.Module, spectrograms: torch.Tensor, image_tokens: torch.Tensor
    ):
        device = spectrograms.device
        self.tower, self.objective = CavMaeAudioModel(config).to(device).train(), objective.to(device).train()
        self.spectrograms, self.image_tokens = spectrograms, image_tokens
        # The optimizer of AlignmentTrainer.
        parameters = [*self.tower.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-4, betas=(0.95, 0.999), weight_decay=5e-7, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.spectrograms.device.type, dtype=torch.bfloat16):
            audio_tokens = self.tower(self.spectrograms).last_hidden_state
            loss = self.objective(audio_tokens, self.image_tokens).loss
        loss.backward()
        self.optimizer.step()


def tower_config(shape: tuple[int, int, int]) -> CavMaeAudioConfig:
    """Configuration of the full-size tower that returns the given number and width of audio tokens."""
    config = CavMaeAudioConfig()
    rows, _ = config.grid_size
    return CavMaeAudioConfig(max_length=shape[0] // rows * config.patch_size, output_size=shape[2])


def attentive_loss(width: int, solver: str) -> AttentiveTransportLoss:
    loss = AttentiveTransportLoss(width, solver=solver)
    loss.set_epoch(EPOCH)
    return loss


def measure_step(arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Time the steps with and without OT^Att in turn and print the table. There are no requirements."""
    batch, (audio, image, width), device = arguments.step_batch, arguments.shape, arguments.device
    torch.manual_seed(0)
    config = tower_config((audio, image, width))
    spectrograms = torch.randn(batch, config.max_length, config.num_mel_bins).to(device)
    image_tokens = torch.randn(batch, image, width).to(device)
    picked = solve_transport(
        torch.rand(1, audio, 1, device=device), torch.rand(1, image, 1, device=device), solver="auto"
    ).solver
    objectives = {TRIVIAL: MeanTokens()}
    for solver in STEP_SOLVERS:
        name = f"OT^Att, {solver}" + (" (selected by auto)" if solver == picked else "")
        objectives[name] = attentive_loss(width, solver)
    steps = {
        name: AlignmentStep(config, objective, spectrograms, image_tokens) for name, objective in objectives.items()
    }
    seconds = time_in_turns(steps, arguments.repeats, device, f"step, B = {batch}")
    case = {
        "batch": batch,
        "tower_parameters": sum(parameter.numel() for parameter in steps[TRIVIAL].tower.parameters()),
        "figures": step_figures(seconds),
    }
    rows = [
        [str(batch), name, format_spread(own["seconds"]), format_spread(own["share"])]
        for name, own in case["figures"].items()
    ]
    show("Alignment step (min / median / max)", ["B", "loss", "seconds", "share of the loss"], rows, [])
    return case, []


def step_figures(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Seconds of a step with each loss, and the share of that time by which it exceeds the step without the loss."""
    return {
        name: {
            "rounds": len(own),
            "seconds": spread(own),
            "share": spread(1 - without / whole for without, whole in zip(seconds[TRIVIAL], own, strict=True)),
        }
        for name, own in seconds.items()
    }


PARTS = {"transport": measure_transport, "mmd": measure_mmd, "step": measure_step}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "gpu", device="cuda")
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=FULL_BATCH,
        help=f"pairs per batch in the parts transport and mmd (default: {FULL_BATCH})",
    )
    parser.add_argument(
        "--step-batch", type=positive_int, default=64, help="pairs per batch in the part step (default: 64)"
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run (default: all)")
    arguments = parse_benchmark(parser, words)
    rows, _ = CavMaeAudioConfig().grid_size
    if "step" in arguments.parts and (arguments.shape[0] % rows or arguments.shape[2] % rows):
        # The number of patch rows in a spectrogram, and of attention heads.
        parser.error(f"--shape: the part step requires audio tokens and a width that are multiples of {rows}")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments, load_before = parse_arguments(words), load_average()
    settings = {name: getattr(arguments, name) for name in ("batch", "step_batch", "shape", "repeats", "device")}
    cases, musts = [], []
    for part in dict.fromkeys(arguments.parts):
        try:
            case, found = PARTS[part](arguments)
        except torch.OutOfMemoryError as error:
            option = "--step-batch" if part == "step" else "--batch"
            raise SystemExit(f"{part}: out of memory; lower {option}. {error}") from error
        cases.append({"part": part, **case})
        musts += found
        # Save after each part, because a later part may fail.
        path = save(arguments.output, "gpu", settings, cases, musts, load_before)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
