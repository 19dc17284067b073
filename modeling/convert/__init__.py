"""
Conversion of released weights to our checkpoint.

    source files -> sources.py -> rules.py -> captioner.py -> writer.py -> folder
                    tensors       names       parts           one tensor at a time

A converter is the function `convert` of the module with the name of its kind (`cav-mae`: cav_mae.py). One kind of
converter starts a captioner, the other replaces parts of it:

    convert(source: Path, tokenizer, vision: Path | None = None) -> ConvertedCaptioner
    convert(source: Path, captioner: ConvertedCaptioner) -> ConvertedCaptioner

The kinds are listed with their help in dali_llava/cli/convert.py.
"""

import importlib
from collections.abc import Callable


def get_converter(kind: str) -> Callable:
    """The function `convert` of a kind of source."""
    return importlib.import_module(f".{kind.replace('-', '_')}", __name__).convert


__all__ = ["get_converter"]
