"""The options of a corpus: dataclass fields, from which the commands derive their arguments."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_type_hints


def option(
    help: str,
    *,
    default: Any = None,
    metavar: str | None = None,
    is_path: bool = False,
    required: bool = False,
    choices: Sequence[str] | None = None,
    example: str | None = None,
) -> Any:
    """
    A dataclass field that is an option of a corpus.

    Args:
        help: what it means, in one line of the commands' help.
        default: its value where it is not given; a mapping is copied for each corpus.
        metavar: how the help shows its value.
        is_path: whether it names a file or folder, which must exist.
        required: whether the corpus cannot be loaded without it.
        choices: its possible values.
        example: a value for the example in the commands' help.
    """
    metadata = {
        "help": help,
        "metavar": metavar,
        "is_path": is_path,
        "required": required,
        "choices": choices,
        "example": example,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a corpus: its name, its type (`bool`, `int`, `float`, `str`, or `dict` for JSON), and `metadata` as
    given to `option`."""

    name: str
    type: type
    default: Any
    metadata: dict[str, Any]


def options_of(configuration: type) -> list[Option]:
    """
    The options of a corpus, in the order of their declaration.

    Args:
        configuration: a dataclass; its options are the fields made by `option`.
    """
    hints, found = get_type_hints(configuration), []
    for field in dataclasses.fields(configuration):
        if "help" in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            found.append(Option(field.name, _simple_type(hints[field.name]), default, dict(field.metadata)))
    return found


def _simple_type(hint: Any) -> type:
    """The type of an annotation without its `None`; `dict` for any that a single word cannot hold."""
    kinds = [kind for kind in getattr(hint, "__args__", (hint,)) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, str) else dict
