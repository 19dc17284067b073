"""Where released weights come from: their name on the Hub, revision and licence, for the model card."""

from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load


UNKNOWN = "unknown"  # licence
NOT_STATED = "not stated beside the weights"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# Text in the head of a licence -> its identifier on the Hub.
LICENSE_TEXTS = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "llama 2 community license": "llama2",
    "bsd 2-clause": "bsd-2-clause",
    "bsd 3-clause": "bsd-3-clause",
}
HEAD_CHARACTERS = 500
CACHE_PREFIX = "models--"  # of the folder of a model in the cache of the Hub


def describe_source(path: Path, kind: str, license: str) -> dict[str, str]:
    """
    The entry of a source in `LlavaAudioConfig.sources`.

    Args:
        path: file or folder of the source.
        kind: kind of the source, such as `llava`.
        license: identifier of the licence under which this kind of weights was released, or `UNKNOWN`. It is used if
            the source is a file, or a folder with neither a model card with a licence nor a known licence file.

    Returns:
        `kind`, `name` (Hub id, or name of the file or folder), `revision` if it is from the Hub, `license`, and
        `license_from`, which says where the licence was read, or that it is only known for this kind.
    """
    source = {"kind": kind, **_name(path)}
    found, where = _license_in(path) if path.is_dir() else (None, None)
    if found is None:
        found, where = license, NOT_STATED if license == UNKNOWN else f"known for {kind}; {NOT_STATED}"
    return source | {"license": found, "license_from": where}


def _name(path: Path) -> dict[str, str]:
    # .../models--ORG--NAME/snapshots/REVISION
    parts = path.absolute().parts
    for part, folder, revision in zip(parts, parts[1:], parts[2:], strict=False):
        if part.startswith(CACHE_PREFIX) and folder == "snapshots":
            return {"name": part.removeprefix(CACHE_PREFIX).replace("--", "/"), "revision": revision}
    return {"name": path.resolve().name}


def _license_in(folder: Path) -> tuple[str | None, str | None]:
    """The licence in a folder, and the file that states it."""
    card = folder / "README.md"
    if card.is_file():
        try:
            metadata = metadata_load(card) or {}
        except (ValueError, yaml.YAMLError):
            metadata = {}
        name = metadata.get("license")
        if name == "other":
            name = metadata.get("license_name") or name
        if isinstance(name, str):
            return name, card.name
    for file in LICENSE_FILES:
        if (folder / file).is_file():
            head = (folder / file).read_text(encoding="utf-8", errors="replace")[:HEAD_CHARACTERS].lower()
            found = next((name for text, name in LICENSE_TEXTS.items() if text in " ".join(head.split())), None)
            if found is not None:
                return found, file
    return None, None


__all__ = ["UNKNOWN", "describe_source"]
