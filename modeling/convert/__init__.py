"""
Conversion of released weights to our checkpoint.

    source files -> sources.py -> rules.py -> captioner.py -> writer.py -> folder
                    tensors       names       parts           one tensor at a time

A converter is a module with a function `convert`, listed below by its kind. One that starts a captioner is in `BASES`:

    convert(source: Path, token_ids: dict[str, int], **options) -> ConvertedCaptioner

One that replaces parts of a captioner is in `PARTS`:

    convert(source: Path, captioner: ConvertedCaptioner) -> ConvertedCaptioner
"""

import importlib
from collections.abc import Callable


# kind -> module
BASES = {
    "llava": "llava",
}
PARTS = {}


def get_converter(kind: str) -> Callable:
    """
    The function `convert` of a kind of source.

    Raises:
        ValueError: the kind is unknown.
    """
    modules = BASES | PARTS
    if kind not in modules:
        raise ValueError(f"{kind}: unknown kind of weights; choose one of {', '.join(modules)}")
    return importlib.import_module(f".{modules[kind]}", __name__).convert


__all__ = ["BASES", "PARTS", "get_converter"]
