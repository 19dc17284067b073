"""The plan of a stage as text."""

from dali_llava.train.planning.plan import BANDWIDTH, Plan


def format_plan(plan: Plan, engine: str, gpus: int, gpu_memory: float | None, tflops: float) -> str:
    """
    Return the tables of a plan.

    Args:
        plan: the plan.
        engine: name of the engine.
        gpus: number of GPUs.
        gpu_memory: memory of a GPU, in 10^9 bytes, to compare with.
        tflops: the throughput that the hours assume.
    """
    parts = [(name, f"{part.parameters:,}", f"{part.trained:,}", _gb(part.bytes)) for name, part in plan.parts.items()]
    columns = list(plan.parts.values())
    total = [sum(getattr(part, name) for part in columns) for name in ("parameters", "trained", "bytes")]
    parts.append(("total", f"{total[0]:,}", f"{total[1]:,}", _gb(total[2])))
    lines = _table([("part", "parameters", "trained", "GB"), *parts]) + [""]
    for phase, memory in (("training", plan.memory), ("captioning", plan.captioning)):
        if memory:
            rows = [(f"memory per GPU, {phase}", "GB"), *((name, _gb(size)) for name, size in memory.items())]
            lines += _table([*rows, ("total", _gb(sum(memory.values())))]) + [""]
    if gpu_memory is not None:
        verdict = "fits" if plan.peak <= gpu_memory * 1e9 else "does not fit"
        lines.append(f"{verdict}: {_gb(plan.peak)} of {gpu_memory:g} GB per GPU, {gpus} GPU(s), {engine}")
    lines.append(
        f"update: {plan.samples:,} samples of {plan.sequence:,} tokens ({plan.samples * plan.sequence:,} tokens), "
        f"{plan.flops / 1e12:,.1f} TFLOP on all GPUs"
    )
    if plan.steps is None:
        lines.append("updates: unknown; give --clips N")
    else:
        hours = ", ".join(f"{phase} {hours:.2f} hours" for phase, hours in plan.hours.items())
        lines.append(f"updates: {plan.steps:,}; {hours}, assuming {tflops:g} TFLOP/s per GPU")
        if plan.captioning:
            lines.append(f"        and {BANDWIDTH / 1e12:g} TB/s from its memory in captioning")
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column is left-aligned, the others are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
