"""Splits batches into parts that fit into the cache of a CPU."""

from collections.abc import Iterator

import torch


# The allocator reuses blocks up to this size. Much larger blocks come from the system every time, and touching their
# pages for the first time takes longer than the computation.
_PART_BYTES = 2**24


def in_parts(bytes_per_pair: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields parts of the batch that take about 16 MB on a CPU, at least one pair each; on a GPU the whole batch.

    Args:
        bytes_per_pair: memory that one pair takes during the work.
        tensors: (B, ...) each.
    """
    pairs = len(tensors[0]) if tensors[0].is_cuda else max(1, _PART_BYTES // max(1, bytes_per_pair))
    return zip(*(tensor.split(pairs) for tensor in tensors), strict=True)
