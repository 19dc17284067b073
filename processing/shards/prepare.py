"""The run: the rows of a corpus, through worker processes, into shards; it can be killed and goes on."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
from tqdm import tqdm

from ..corpora.shards import INDEX_FILE
from .clip import ClipSettings, Dropped, PreparedClip, prepare_clip
from .lock import output_lock
from .plan import Plan, make_plan
from .pool import Died, WorkerPool
from .report import ShardSummary, read_record, shard_name, summarise, write_index, write_record
from .writer import TarShard, tar_size, write_error, write_whole


SAMPLED_CLIPS = 32  # from which the size of a clip is estimated
ASSUMED_SIZE = 500_000  # bytes of a clip, where none of them could be read


def prepare_shards(
    rows: datasets.Dataset,
    out: str | os.PathLike,
    settings: ClipSettings | None = None,
    *,
    corpus: str | None = None,
    shard_size: int = 500,
    clips_per_shard: int | None = None,
    num_proc: int | None = None,
    num_jobs: int = 1,
    job_id: int = 0,
) -> ShardSummary:
    """
    Put the clips of a corpus into shards: tar files in the layout of WebDataset, 16 kHz FLAC and JPEG.

    A shard holds a fixed range of rows, and its bytes depend on the rows, their media and the settings alone: not on
    the number of processes or jobs, nor on how often the run was killed and called again. Finished shards are skipped
    unless their rows have changed.

    Args:
        rows: of a corpus; see `dali_llava.processing.corpora`.
        out: folder of the shards, made if missing.
        settings: of the clips; default `ClipSettings()`.
        corpus: a name to write down with the settings.
        shard_size: of a shard in MB (10**6 bytes), roughly: it is turned into a number of rows with the sizes of 32
            clips of the corpus.
        clips_per_shard: that number itself.
        num_proc: worker processes; default, one a core.
        num_jobs, job_id: job k of n makes the shards k, k + n, k + 2n, ...; the last one to finish writes the index.

    Returns:
        What the folder holds now, other jobs' shards included.

    Raises:
        ValueError: a number outside its range, no rows, another run at work on `out`, or `out` begun with other
            settings or other clips.
        OSError: `out` cannot be written to; nothing half-written is left.
    """
    settings, out, num_proc = settings or ClipSettings(), Path(out), num_proc or _cores()
    for name, value in {"shard_size": shard_size, "clips_per_shard": clips_per_shard, "num_proc": num_proc}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= job_id < num_jobs:
        raise ValueError(f"job_id must be one of 0 to num_jobs - 1 = {num_jobs - 1}, not {job_id}")
    if len(rows) == 0:
        raise ValueError(f"the corpus {corpus or ''} has no clips; check its options and its split")
    tag = f".{job_id}-of-{num_jobs}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileExistsError(f"{out}: is a file; give --out a folder") from error
    except OSError as error:
        raise write_error(out, error) from error
    with output_lock(out, job_id, num_jobs):
        estimate = partial(_clips_for, shard_size, rows, settings, num_proc)
        plan = make_plan(rows, out, settings, corpus, shard_size, clips_per_shard, estimate, tag)
        own = range(job_id, plan.num_shards, num_jobs)
        pending = [number for number in own if read_record(out, number, plan) is None]
        if pending:
            (out / INDEX_FILE).unlink(missing_ok=True)  # it would tell of shards that are about to change
            finished = sum(len(plan.rows_of(number)) for number in set(own) - set(pending))
            total = sum(len(plan.rows_of(number)) for number in own)
            with (
                WorkerPool(partial(prepare_clip, settings=settings), num_proc) as pool,
                tqdm(total=total, initial=finished, desc="preparing", unit=" clips") as bar,
            ):
                outcomes = _outcomes(rows, plan, pending, pool)
                for number in pending:
                    _make_shard(out, number, plan, outcomes, bar)
        records = [read_record(out, number, plan) for number in range(plan.num_shards)]
        if None not in records:
            write_index(out, plan, records, tag)
        return summarise([record for record in records if record is not None], plan.num_shards)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _clips_for(shard_size: int, rows: datasets.Dataset, settings: ClipSettings, num_proc: int) -> int:
    """How many rows make a shard of `shard_size` MB, by clips taken from all over the corpus."""
    step = -(-len(rows) // SAMPLED_CLIPS)
    sampled = (rows[number] for number in range(0, len(rows), step))
    with WorkerPool(partial(prepare_clip, settings=settings), num_proc) as pool:
        outcomes = tqdm(pool.map(sampled), total=-(-len(rows) // step), desc="sizing the shards", leave=False)
        sizes = [tar_size(outcome) if isinstance(outcome, PreparedClip) else 0 for outcome in outcomes]
    return max(1, round(shard_size * 1_000_000 / (sum(sizes) / len(sizes) or ASSUMED_SIZE)))


def _outcomes(
    rows: datasets.Dataset, plan: Plan, shards: list[int], pool: WorkerPool
) -> Iterator[PreparedClip | Dropped]:
    """What becomes of the rows of the shards, in their order; the clips of the next shard are begun in good time."""
    numbers = [number for shard in shards for number in plan.rows_of(shard)]
    results = pool.map(rows[number] for number in numbers if number not in plan.duplicates)
    for number in numbers:
        if number in plan.duplicates:
            yield Dropped(rows[number]["id"], "duplicate", "an earlier clip has this id")
            continue
        result = next(results)
        if isinstance(result, Died):
            result = Dropped(rows[number]["id"], "crashed", f"its process ended with {_ending(result.exit_code)}")
        yield result


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and -exit_code in {entry.value for entry in signal.Signals}:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


def _make_shard(out: Path, number: int, plan: Plan, outcomes: Iterator[PreparedClip | Dropped], bar: tqdm) -> None:
    """Write a shard, and when it is whole its record."""
    dropped = []
    path = out / shard_name(number)
    with write_whole(path) as file:
        shard = TarShard(file)
        for _ in plan.rows_of(number):
            outcome = next(outcomes)
            if isinstance(outcome, PreparedClip):
                shard.add(outcome)
            else:
                dropped.append(outcome)
            bar.update()
        shard.finish()
    if not shard.clips:
        path.unlink()  # an archive without files is an error to many a reader
    write_record(out, number, plan, shard, dropped)
