"""
The Parquet file of pseudo-captions, with the columns `id`, `caption` and `error`.

Its schema metadata has the provenance of the captions, a JSON object with the key `dali_llava`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dali_llava.atomic import atomic_path


CAPTIONS = "pseudo_captions.parquet"  # in the output folder of a distillation
METADATA = b"dali_llava"  # key of the provenance in the schema
SCHEMA = pa.schema([("id", pa.string()), ("caption", pa.string()), ("error", pa.string())])
INFORMATION = ("base_model", "version")  # parts of the provenance that do not affect captions


class PseudoCaption(NamedTuple):
    """The caption of a clip, or the error in one line."""

    caption: str | None
    error: str | None = None


def settings_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance that affects captions."""
    return {name: value for name, value in provenance.items() if name not in INFORMATION}


def differences(provenance: Any, expected: Mapping[str, Any]) -> list[str]:
    """Describe each difference of a file's provenance from the expected one that affects captions."""
    if not isinstance(provenance, dict):
        return ["no provenance in the file"]
    changed = []
    for name, value in settings_of(expected).items():
        have = provenance.get(name)
        if have == value:
            continue
        if name == "checkpoint":
            shown = [f"{str(each.get(name))[:8]} ({each.get('base_model')})" for each in (provenance, expected)]
        else:
            shown = [json.dumps(each, ensure_ascii=False) for each in (have, value)]
        changed.append(f"{name} {shown[0]}, not {shown[1]}")
    return changed


def write_captions(path: Path, captions: Mapping[str, PseudoCaption], provenance: Mapping[str, Any]) -> None:
    """Write captions by id and their provenance to a Parquet file, whole or not at all."""
    rows = [{"id": name, **caption._asdict()} for name, caption in captions.items()]
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({METADATA: json.dumps(provenance)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_captions(path: str | Path) -> tuple[dict[str, PseudoCaption], Any]:
    """
    Read a Parquet file with the columns `id` and `caption`, and optionally `error`.

    Returns:
        the captions by id, and the provenance, or None if the file has none.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a Parquet file, or has other columns.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"captions {path}: no such file; give the {CAPTIONS} of an earlier run.")
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in SCHEMA.names if name in file.schema_arrow.names]
            table = file.read(names).cast(pa.schema([SCHEMA.field(name) for name in names]))
            provenance = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"null"))
    except (pa.ArrowException, ValueError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path}: not a Parquet file of captions ({message}); delete it or give another.") from error
    if missing := {"id", "caption"} - set(names):
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; give a Parquet file with id and caption.")
    captions = {row["id"]: PseudoCaption(row["caption"], row.get("error")) for row in table.to_pylist()}
    return captions, provenance
