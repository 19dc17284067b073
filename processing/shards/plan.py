"""What a run on an output folder is to do: settings that are written down once and hold for every later run."""

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
    """Shard n holds what is left of rows n * clips_per_shard to (n + 1) * clips_per_shard.

    settings: the content of settings.json; row_digests: of what each row says; duplicates: rows whose id an earlier
    row has.
    """

    settings: dict[str, Any]
    row_digests: list[bytes]
    duplicates: frozenset[int]

    @property
    def num_shards(self) -> int:
        return -(-self.settings["rows"] // self.settings["clips_per_shard"])

    @property
    def digest(self) -> str:
        """What shards of the same settings share."""
        return hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:16]

    def rows_of(self, shard: int) -> range:
        first = shard * self.settings["clips_per_shard"]
        return range(first, min(first + self.settings["clips_per_shard"], self.settings["rows"]))

    def rows_digest(self, shard: int) -> str:
        """Of the shard's rows: it changes with captions, times, and media that turn up, but not with their paths."""
        rows = self.rows_of(shard)
        return hashlib.sha256(b"".join(self.row_digests[rows.start : rows.stop])).hexdigest()[:16]


def default_requirements(rows: datasets.Dataset) -> tuple[str, ...]:
    """Sound; and pictures, where the corpus lists any."""
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
    The plan for `rows` in the folder `out`, written down there by the first run, and met by every later one.

    Args:
        estimate: gives `clips_per_shard` where neither the caller nor an earlier run has set it.

    Raises:
        ValueError: the folder was begun with other settings or clips; it names what differs.
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
            raise ValueError(f"{path}: begun with other settings: {differences}; repeat them, or give another --out")
    else:
        settings["clips_per_shard"] = clips_per_shard or estimate()
        with write_whole(path, tag) as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
    return Plan(settings, row_digests, duplicates)


def _scan(rows: datasets.Dataset) -> tuple[str, list[bytes], frozenset[int]]:
    """A digest of all ids, one of each row, and the numbers of the rows whose id is taken."""
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
        raise ValueError(f"{path}: is no settings file of `dali-llava prepare`; give another --out") from error


def _differences(begun: dict[str, Any], wanted: dict[str, Any]) -> str:
    found = []
    for name in wanted:
        old, new = begun.get(name), wanted[name]
        if old == new:
            continue
        if name == "ids_sha256":
            if begun.get("rows") == wanted["rows"]:
                found.append("the clips, or their order, are not the same")
        elif name in ("format", "corpus", "rows"):
            found.append(f"{name} was {old}, is {new}")
        else:
            found.append(f"--{name.replace('_', '-')} was {_shown(old)}, is {_shown(new)}")
    return "; ".join(found)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
