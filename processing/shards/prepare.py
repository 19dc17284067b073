"""Convert the rows of a corpus to shards with worker processes. A run that was killed resumes when called again."""

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


SAMPLED_CLIPS = 32  # clips that the size of a clip is estimated from
ASSUMED_SIZE = 500_000  # bytes per clip if none of the sampled clips can be read


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
    Write the clips of a corpus to shards: tar files in the WebDataset layout, with 16 kHz FLAC and JPEG.

    A shard contains a fixed range of rows. Its bytes only depend on the rows, their media and the settings. They do
    not depend on the number of processes or jobs, or on whether a run was killed and resumed. Finished shards are
    skipped unless their rows have changed.

    Args:
        rows: rows of a corpus; see `dali_llava.processing.corpora`.
        out: folder of the shards; created if it does not exist.
        settings: settings of the clips; default `ClipSettings()`.
        corpus: name of the corpus, saved with the settings.
        shard_size: approximate size of a shard in MB (10**6 bytes). It is converted to a number of rows by the sizes
            of 32 clips of the corpus.
        clips_per_shard: number of rows per shard, instead of `shard_size`.
        num_proc: number of worker processes; default: one per core.
        num_jobs: number of jobs that share the work. The last job to finish writes the index.
        job_id: number of this job. Job k of n writes the shards k, k + n, k + 2n, ...

    Returns:
        Totals of the folder, including the shards of other jobs.

    Raises:
        ValueError: if a number is outside its range, there are no rows, another run is writing to `out`, or `out` was
            started with other settings or clips.
        OSError: if `out` is not writable. No partial file is left.
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
            (out / INDEX_FILE).unlink(missing_ok=True)  # its shards are about to change
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
    """Estimate the number of rows per shard of `shard_size` MB from clips spread over the corpus."""
    step = -(-len(rows) // SAMPLED_CLIPS)
    sampled = (rows[number] for number in range(0, len(rows), step))
    with WorkerPool(partial(prepare_clip, settings=settings), num_proc) as pool:
        outcomes = tqdm(pool.map(sampled), total=-(-len(rows) // step), desc="sizing the shards", leave=False)
        sizes = [tar_size(outcome) if isinstance(outcome, PreparedClip) else 0 for outcome in outcomes]
    return max(1, round(shard_size * 1_000_000 / (sum(sizes) / len(sizes) or ASSUMED_SIZE)))


def _outcomes(
    rows: datasets.Dataset, plan: Plan, shards: list[int], pool: WorkerPool
) -> Iterator[PreparedClip | Dropped]:
    """Yield the outcomes of the rows of the shards, in order. Workers start on the next shard early."""
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
    """Write a shard, and its record when the shard is complete."""
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
        path.unlink()  # many readers reject an archive without files
    write_record(out, number, plan, shard, dropped)
