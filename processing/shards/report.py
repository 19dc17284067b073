"""Records of the clips: a JSON file per shard, and report.csv and index.json for all shards."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..corpora.shards import INDEX_FILE
from .clip import REASONS, Dropped
from .plan import Plan
from .writer import TarShard, write_whole


REPORT_FILE = "report.csv"


@dataclass(frozen=True)
class ShardSummary:
    """
    Totals of the finished shards of an output folder.

    Attributes:
        rows: number of rows.
        clips: number of clips in the shards.
        bytes: size of the shards.
        seconds: total length of the sound.
        dropped: number of clips left out, by reason.
        shards: number of finished shards.
        num_shards: number of all shards.
    """

    rows: int
    clips: int
    bytes: int
    seconds: float
    dropped: dict[str, int]
    shards: int
    num_shards: int

    @property
    def is_complete(self) -> bool:
        return self.shards == self.num_shards

    def __str__(self) -> str:
        gone = sum(self.dropped.values())
        lines = [
            f"{self.rows} clips: {self.clips} ready ({self.seconds / 3600:.2f} h of sound, {self.bytes / 1e6:.1f} MB)"
            f", {gone} left out; {self.shards} of {self.num_shards} shards done"
        ]
        lines += [f"  {reason:<10} {count:>8}  {REASONS[reason]}" for reason, count in self.dropped.items()]
        return "\n".join(lines)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _record_path(out: Path, number: int) -> Path:
    return (out / shard_name(number)).with_suffix(".json")


def write_record(out: Path, number: int, plan: Plan, shard: TarShard, dropped: Sequence[Dropped]) -> None:
    """Write the record of a finished shard, including the clips left out."""
    record = {
        "shard": shard_name(number) if shard.clips else None,
        "settings": plan.digest,
        "rows": len(plan.rows_of(number)),
        "rows_sha256": plan.rows_digest(number),
        "clips": shard.clips,
        "seconds": round(shard.seconds, 4),
        "bytes": shard.size if shard.clips else 0,
        "sha256": shard.digest() if shard.clips else None,
        "dropped": [[clip.id, clip.reason, clip.detail] for clip in dropped],
    }
    with write_whole(_record_path(out, number)) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


def read_record(out: Path, number: int, plan: Plan) -> dict[str, Any] | None:
    """
    Read the record of a shard; None if the shard is not finished, is damaged, or its rows have changed.

    Raises:
        ValueError: if the shard was written with other settings, or the file is not a record.
    """
    path = _record_path(out, number)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_ours, is_current = record["settings"] == plan.digest, record["rows_sha256"] == plan.rows_digest(number)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a record of a shard; delete it to write the shard again") from error
    if not is_ours:
        raise ValueError(f"{path}: its shard was written with other settings; empty the folder, or give another --out")
    if record["shard"] is not None:
        shard = out / record["shard"]
        is_current = is_current and shard.is_file() and shard.stat().st_size == record["bytes"]
    return record if is_current else None


def summarise(records: Sequence[dict[str, Any]], num_shards: int) -> ShardSummary:
    """Compute the totals of the records of finished shards."""
    counts = Counter(reason for record in records for _, reason, _ in record["dropped"])
    totals = {name: sum(record[name] for record in records) for name in ("rows", "clips", "bytes")}
    seconds = round(sum(record["seconds"] for record in records), 4)
    dropped = {reason: counts[reason] for reason in REASONS if counts[reason]}
    return ShardSummary(**totals, seconds=seconds, dropped=dropped, shards=len(records), num_shards=num_shards)


def write_index(out: Path, plan: Plan, records: Sequence[dict[str, Any]], tag: str = "") -> None:
    """Write report.csv (id, reason and detail of each clip left out), then index.json."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("id", "reason", "detail"))
    for record in records:
        writer.writerows(record["dropped"])
    with write_whole(out / REPORT_FILE, tag) as file:
        file.write(table.getvalue().encode(errors="backslashreplace"))
    summary = summarise(records, plan.num_shards)
    index = {
        "rows": summary.rows,
        "clips": summary.clips,
        "seconds": summary.seconds,
        "bytes": summary.bytes,
        "dropped": summary.dropped,
        "settings": plan.settings,
        "shards": [
            {"name": record["shard"], **{name: record[name] for name in ("clips", "bytes", "sha256")}}
            for record in records
            if record["clips"]
        ],
    }
    with write_whole(out / INDEX_FILE, tag) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())
