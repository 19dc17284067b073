"""
Rules that convert the tensors of a source to the weights of our model.

Each tensor of the source is renamed, split, grown or dropped by the first rule whose pattern matches its whole name.
Each weight of the model has exactly one origin: a tensor of the source, or an initial value.

    >>> import torch
    >>> rules = [Rename(r"fc\\.(weight)", r"proj.\\1"), Drop(r"head\\..*", "classifier")]
    >>> [rule.match(name) is not None for rule, name in zip(rules, ("fc.weight", "head.bias"))]
    [True, True]
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .sources import Source


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor that is computed when it is written.

    Attributes:
        shape, dtype: of the tensor.
        read: returns the tensor, on the CPU.
        origin: where it comes from, for messages.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    origin: str

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The tensor in another dtype. Integers are unchanged."""
        if not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


class Rule:
    """A rule for the tensors whose whole name matches the regular expression `pattern`."""

    pattern: str

    def match(self, name: str) -> re.Match | None:
        return re.fullmatch(self.pattern, name)

    def convert(self, source: Source, match: re.Match, expected: Mapping[str, torch.Size]) -> dict[str, LazyTensor]:
        """The weights, by target name, that the matched tensor of `source` becomes."""
        raise NotImplementedError


def _whole(source: Source, name: str) -> LazyTensor:
    return LazyTensor(source.shape(name), source.dtype(name), lambda: source.read(name), name)


@dataclass(frozen=True)
class Rename(Rule):
    """`target` contains the groups of `pattern` as `\\1`."""

    pattern: str
    target: str

    def convert(self, source, match, expected):
        return {match.expand(self.target): _whole(source, match.string)}


@dataclass(frozen=True)
class Split(Rule):
    """Split into equal parts along `dim`, such as queries, keys and values that are fused in one layer."""

    pattern: str
    targets: Sequence[str]
    dim: int = 0

    def convert(self, source, match, expected):
        name, parts = match.string, len(self.targets)
        shape, dtype = list(source.shape(name)), source.dtype(name)
        if len(shape) <= self.dim or shape[self.dim] % parts:
            raise ValueError(
                f"{source.path}: {name} has shape {tuple(shape)}, which cannot be split into {parts} along dimension "
                f"{self.dim}; give the weights of another model"
            )
        size = shape[self.dim] // parts
        shape[self.dim] = size

        def part(index: int) -> LazyTensor:
            return LazyTensor(
                torch.Size(shape), dtype, lambda: source.read(name).narrow(self.dim, index * size, size), name
            )

        return {match.expand(target): part(index) for index, target in enumerate(self.targets)}


@dataclass(frozen=True)
class Grow(Rule):
    """Rename, and add rows for new tokens if the model has more of them. A new row is the mean of the others."""

    pattern: str
    target: str

    def convert(self, source, match, expected):
        target, whole = match.expand(self.target), _whole(source, match.string)
        rows = expected[target][0] if target in expected else 0
        if rows <= whole.shape[0]:
            return {target: whole}

        def grow() -> torch.Tensor:
            old = whole.read()
            mean = old.mean(0, keepdim=True, dtype=torch.float32).to(old.dtype)
            return torch.cat([old, mean.expand(rows - len(old), *old.shape[1:])])

        return {target: replace(whole, shape=torch.Size([rows, *whole.shape[1:]]), read=grow)}


@dataclass(frozen=True)
class Drop(Rule):
    """The tensor is not used, for the stated reason."""

    pattern: str
    reason: str

    def convert(self, source, match, expected):
        return {}


@dataclass(frozen=True)
class Copy:
    """An initial value: a copy of another weight of the model. `target` contains groups of the pattern as `\\1`."""

    target: str

    def describe(self, match: re.Match) -> str:
        return "copy of " + match.expand(self.target).rpartition(".")[0]

    def initial(self, match: re.Match, shape: torch.Size, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        return tensors[match.expand(self.target)]


@dataclass(frozen=True)
class Start:
    """
    An initial value: a weight of a new model.

    Args:
        weights: returns the weights of the new model by target name, in float32. Called when a weight is written.
        description: what the weights are, for the report.
    """

    weights: Callable[[], Mapping[str, torch.Tensor]]
    description: str = "random"

    def describe(self, match: re.Match) -> str:
        return self.description

    def initial(self, match: re.Match, shape: torch.Size, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        return LazyTensor(shape, torch.float32, lambda: self.weights()[match.string], self.description)


@dataclass(frozen=True)
class Conversion:
    """
    Weights of our model that are read from their source when they are written.

    Attributes:
        tensors: the weights, by target name.
        used: names of the source tensors that were used.
        dropped: names of the source tensors that were not used -> the reason.
        started: target names of the weights without a source tensor -> their initial value.
    """

    tensors: dict[str, LazyTensor]
    used: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    started: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of each weight. Only one tensor is in memory at a time, if the caller keeps none."""
        return ((name, tensor.read()) for name, tensor in self.tensors.items())

    def __or__(self, other: "Conversion") -> "Conversion":
        """The weights of both, such as those of two parts of a model."""
        return Conversion(
            self.tensors | other.tensors,
            self.used + other.used,
            self.dropped | other.dropped,
            self.started | other.started,
        )

    def to(self, dtype: torch.dtype) -> "Conversion":
        """All weights with floating point numbers in another dtype."""
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def report(self) -> str:
        """The number of source tensors that were used and dropped, and of weights that have an initial value."""
        lines = [f"{len(self.used)} tensors used"] if self.used else []
        lines += [f"{count} dropped: {reason}" for reason, count in Counter(self.dropped.values()).items()]
        lines += [f"{count} weights start as: {value}" for value, count in Counter(self.started.values()).items()]
        return "\n".join(lines)


def apply_rules(
    source: Source,
    rules: Sequence[Rule],
    expected: Mapping[str, torch.Size],
    initial: Mapping[str, Copy | Start] | None = None,
) -> Conversion:
    """
    Convert the tensors of a source. Reads no data.

    Args:
        source: the tensors.
        rules: the rules; the first one that matches a name applies.
        expected: the weights of the model, or of the part of it that is converted, by name.
        initial: pattern of target names -> initial value of the weights that the source may lack.

    Raises:
        ValueError: a source tensor matches no rule or becomes a weight that the model does not have, a shape is wrong,
            two tensors become the same weight, or a weight has no source tensor and no initial value. The message
            contains the names.
    """
    tensors: dict[str, LazyTensor] = {}
    used, dropped = [], {}
    for name in source.names():
        rule = next((rule for rule in rules if rule.match(name)), None)
        if rule is None:
            raise ValueError(f"{source.path}: {name} is unknown; give the released weights of this kind of model")
        if isinstance(rule, Drop):
            dropped[name] = rule.reason
            continue
        used.append(name)
        for target, tensor in rule.convert(source, rule.match(name), expected).items():
            if target not in expected:
                raise ValueError(
                    f"{source.path}: {name} becomes {target}, which the model does not have; check the number of "
                    "layers in its configuration"
                )
            if target in tensors:
                raise ValueError(f"{source.path}: {tensors[target].origin} and {name} both become {target}")
            if tensor.shape != expected[target]:
                raise ValueError(
                    f"{source.path}: {name} gives shape {tuple(tensor.shape)}, but {target} has shape "
                    f"{tuple(expected[target])}; check the widths in the configuration"
                )
            tensors[target] = tensor
    started = {}
    for target, shape in expected.items():
        if target in tensors:
            continue
        patterns = ((re.fullmatch(pattern, target), value) for pattern, value in (initial or {}).items())
        match, value = next(((match, value) for match, value in patterns if match), (None, None))
        if match is None:
            raise ValueError(f"{source.path}: no tensor becomes {target}; copy or download the weights again")
        tensors[target], started[target] = value.initial(match, shape, tensors), value.describe(match)
        if tensors[target].shape != shape:
            raise ValueError(
                f"{source.path}: {target} has shape {tuple(shape)}, but starts as {started[target]} with shape "
                f"{tuple(tensors[target].shape)}; check the widths in the configuration"
            )
    return Conversion({target: tensors[target] for target in expected}, used, dropped, started)


__all__ = ["Conversion", "Copy", "Drop", "Grow", "LazyTensor", "Rename", "Rule", "Split", "Start", "apply_rules"]
