"""A batch in parts that fit into a CPU's cache."""

from collections.abc import Iterator

import torch


# Memory up to this size is handed out again by the allocator; what is much larger comes from the system every time,
# and touching it first costs more than computing on it.
_PART_BYTES = 2**24


def in_parts(bytes_per_pair: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors' pairs, as many at a time as need some 16 MB on a CPU, one at least; on a GPU all at once.

    Args:
        bytes_per_pair: what the work on one pair takes.
        tensors: (B, ...) each.
    """
    pairs = len(tensors[0]) if tensors[0].is_cuda else max(1, _PART_BYTES // max(1, bytes_per_pair))
    return zip(*(tensor.split(pairs) for tensor in tensors), strict=True)
