"""The options of a corpus: dataclass fields that the commands convert to command-line arguments."""

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
        help: one line of description for the help of the commands.
        default: the default value. A mapping is copied for each corpus.
        metavar: placeholder of the value in the help.
        is_path: whether the value is a file or folder, which must exist.
        required: whether the corpus requires the option.
        choices: the allowed values.
        example: a value for the example in the help of the commands.
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
    """
    An option of a corpus.

    Attributes:
        name: name of the field.
        type: `bool`, `int`, `float`, `str`, or `dict` for JSON.
        default: the default value.
        metadata: the other arguments of `option`.
    """

    name: str
    type: type
    default: Any
    metadata: dict[str, Any]


def options_of(configuration: type) -> list[Option]:
    """
    The options of a corpus, in the order of declaration.

    Args:
        configuration: a dataclass. Its options are the fields declared with `option`.
    """
    hints, found = get_type_hints(configuration), []
    for field in dataclasses.fields(configuration):
        if "help" in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            found.append(Option(field.name, _simple_type(hints[field.name]), default, dict(field.metadata)))
    return found


def _simple_type(hint: Any) -> type:
    """The type of an annotation without `None`; `dict` for any type that is not a single word on a command line."""
    kinds = [kind for kind in getattr(hint, "__args__", (hint,)) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, str) else dict
