"""The plan of a run: settings that the first run saves in the output folder and later runs must match."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from .clip import METADATA, REQUIREMENTS, SAMPLING_RATE, ClipSettings, is_given
from .writer import write_whole


SETTINGS_FILE = "settings.json"
FORMAT = 1
_BATCH = 1000


@dataclass(frozen=True)
class Plan:
    """
    Assigns rows to shards: shard n contains the good clips of rows n * clips_per_shard to (n + 1) * clips_per_shard.

    Attributes:
        settings: content of settings.json.
        row_digests: digest of each row.
        duplicates: numbers of the rows with the id of an earlier row.
    """

    settings: dict[str, Any]
    row_digests: list[bytes]
    duplicates: frozenset[int]

    @property
    def num_shards(self) -> int:
        return -(-self.settings["rows"] // self.settings["clips_per_shard"])

    @property
    def digest(self) -> str:
        """Digest of the settings, which shards with the same settings share."""
        return hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:16]

    def rows_of(self, shard: int) -> range:
        first = shard * self.settings["clips_per_shard"]
        return range(first, min(first + self.settings["clips_per_shard"], self.settings["rows"]))

    def rows_digest(self, shard: int) -> str:
        """Digest of the rows of a shard. Captions, times and new media change it, but paths do not."""
        rows = self.rows_of(shard)
        return hashlib.sha256(b"".join(self.row_digests[rows.start : rows.stop])).hexdigest()[:16]


def default_requirements(rows: datasets.Dataset) -> tuple[str, ...]:
    """Return what a clip must have by default: sound, and pictures if the corpus lists any."""
    for batch in rows.select_columns("frames").iter(_BATCH):
        if any(batch["frames"]):
            return REQUIREMENTS
    return ("audio",)


def make_plan(
    rows: datasets.Dataset,
    out: Path,
    clip_settings: ClipSettings,
    corpus: str | None,
    shard_size: int,
    clips_per_shard: int | None,
    estimate: Callable[[], int],
    tag: str = "",
) -> Plan:
    """
    Make the plan for `rows`. The first run saves its settings in the folder `out`; later runs must match them.

    Args:
        estimate: returns `clips_per_shard` if neither the caller nor an earlier run has set it.

    Raises:
        ValueError: if the folder was started with other settings or clips. The message names the differences.
    """
    ids_digest, row_digests, duplicates = _scan(rows)
    settings = {"format": FORMAT, "corpus": corpus, "rows": len(rows), "ids_sha256": ids_digest}
    settings |= {"sampling_rate": SAMPLING_RATE, **asdict(clip_settings), "require": list(clip_settings.require)}
    settings |= {"shard_size": shard_size, "clips_per_shard": clips_per_shard}
    path = out / SETTINGS_FILE
    if path.exists():
        begun = _read_settings(path)
        if clips_per_shard is None:
            settings["clips_per_shard"] = begun.get("clips_per_shard")
        if differences := _differences(begun, settings):
            raise ValueError(
                f"{path}: was started with other settings: {differences}; use the same settings, or give another --out"
            )
    else:
        settings["clips_per_shard"] = clips_per_shard or estimate()
        with write_whole(path, tag) as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
    return Plan(settings, row_digests, duplicates)


def _scan(rows: datasets.Dataset) -> tuple[str, list[bytes], frozenset[int]]:
    """Return a digest of all ids, a digest of each row, and the numbers of the rows with the id of an earlier row."""
    ids_digest, row_digests, duplicates, seen = hashlib.sha256(), [], [], set()
    columns = (*METADATA, "audio", "frames")
    with tqdm(total=len(rows), desc="reading the list", unit=" clips", leave=False) as bar:
        for batch in rows.select_columns(list(columns)).iter(_BATCH):
            for *about, audio, frames in zip(*(batch[name] for name in columns), strict=True):
                text = json.dumps([*about, is_given(audio), len(frames or [])])
                if about[0] in seen:
                    duplicates.append(len(row_digests))
                seen.add(about[0])
                ids_digest.update(json.dumps(about[0]).encode())
                row_digests.append(hashlib.sha256(text.encode()).digest()[:8])
            bar.update(len(batch["id"]))
    return ids_digest.hexdigest(), row_digests, frozenset(duplicates)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["format"]
        return settings
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a settings file of `dali-llava prepare`; give another --out") from error


def _differences(begun: dict[str, Any], wanted: dict[str, Any]) -> str:
    found = []
    for name in wanted:
        old, new = begun.get(name), wanted[name]
        if old == new:
            continue
        if name == "ids_sha256":
            if begun.get("rows") == wanted["rows"]:
                found.append("the clips or their order differ")
        elif name in ("format", "corpus", "rows"):
            found.append(f"{name} was {old}, is {new}")
        else:
            found.append(f"--{name.replace('_', '-')} was {_shown(old)}, is {_shown(new)}")
    return "; ".join(found)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
