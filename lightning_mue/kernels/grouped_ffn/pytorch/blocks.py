"""Cuts the rows into blocks of work: one expert each, part of one that has many rows, or a few small ones.

In bfloat16 a GEMM of oneDNN costs 30 us before it computes anything, and 2 to 5 ms when it meets a new shape, as row counts
do at every step. So neighbouring experts are padded to equal length and multiplied in one batched GEMM, and there are few
different lengths. An expert with more than a fair share of the rows is split, so that no thread waits for another.

Shape legend: S rows sorted by expert, P rows of the padded layout, B experts of a block, C padded rows of each, h expert
hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 20  # of a [B, C, h] buffer
_WASTE = 1.25  # rows of a block, as a multiple of what its experts would have one by one
_CUT_ROWS = 512  # parts of an expert have no fewer: each adds a weight gradient of its own


class Cutting(NamedTuple):
    """How to cut.

    Attributes:
        row_multiple: What C is a multiple of.
        batch: Whether a block may hold several experts.
        parts: Smallest number of blocks, so that workers are loaded evenly. 0: no expert is split.
    """

    row_multiple: int
    batch: bool
    parts: int


class RowBlock(NamedTuple):
    """Some neighbouring experts, or part of the rows of one.

    Attributes:
        experts: Slice of the E experts.
        length: C.
        rows: Slice of the S sorted rows.
        padded: Slice of the P padded rows.
        part: 0 for the first block of an expert; the other blocks are numbered 1, 2, ... over all experts.
    """

    experts: slice
    length: int
    rows: slice
    padded: slice
    part: int

    @property
    def shape(self) -> tuple[int, int]:
        """B and C."""
        return self.experts.stop - self.experts.start, self.length

    @property
    def n_rows(self) -> int:
        """B * C."""
        return self.padded.stop - self.padded.start

    @property
    def is_padded(self) -> bool:
        """Whether there are fewer sorted rows."""
        return self.n_rows != self.rows.stop - self.rows.start


class RowLayout(NamedTuple):
    """All blocks.

    Attributes:
        blocks: Of all experts that have rows.
        n_rows: P, followed by the masked rows.
        source_P: int32, the sorted row that each padded row holds. Padding repeats its expert's last row, so that it can
            hold no NaN that the expert does not have.
        real_P: bool, false for padding.
        slot_S: int32, the padded row of each sorted row. All three are None if nothing is padded.
    """

    blocks: list[RowBlock]
    n_rows: int
    source_P: Tensor | None
    real_P: Tensor | None
    slot_S: Tensor | None

    @property
    def extra_parts(self) -> list[RowBlock]:
        """The blocks that are not the first of their expert."""
        return [block for block in self.blocks if block.part]

    def empty_experts(self, n_experts: int) -> list[int]:
        """Those in no block."""
        filled = {e for block in self.blocks for e in range(block.experts.start, block.experts.stop)}
        return [e for e in range(n_experts) if e not in filled]

    def by_sorted_row(self, values_S: Tensor) -> Sequence[Tensor]:
        """The part of each block. All at once: a view made between two GEMMs costs many microseconds."""
        return _split(values_S, [block.rows for block in self.blocks])

    def by_padded_row(self, values_P: Tensor) -> Sequence[Tensor]:
        """The part of each block."""
        return _split(values_P, [block.padded for block in self.blocks])

    def by_expert(self, values_E: Tensor) -> Sequence[Tensor]:
        """The experts of each block."""
        firsts = [block.experts for block in self.blocks if not block.part]
        views = {experts.start: view for experts, view in zip(firsts, _split(values_E, firsts), strict=True)}
        return [views[block.experts.start] for block in self.blocks]


def _split(values: Tensor, slices: Sequence[slice]) -> Sequence[Tensor]:
    """`values` at each slice; these are in order and do not overlap."""
    sizes, end = [], 0
    for part in slices:
        sizes += [part.start - end, part.stop - part.start]
        end = part.stop
    return values.split([*sizes, len(values) - end])[1:-1:2]


def plan_blocks(ends: Sequence[int], n_rows: int, hidden: int, cutting: Cutting) -> RowLayout:
    """Cut the rows into blocks. Expert e has the sorted rows ``ends[e]`` to ``ends[e + 1]``; `n_rows` is S."""
    counts = [stop - start for start, stop in pairwise(ends)]
    lengths = [_round_up(n, cutting.row_multiple) for n in counts]
    limit = max(_CUT_ROWS, 3 * ends[-1] // (2 * cutting.parts)) if cutting.parts else n_rows
    blocks: list[RowBlock] = []
    start = n_extra = 0
    for first, stop in _groups(lengths, hidden, cutting):
        n_parts = -(-counts[first] // limit) if stop == first + 1 else 1
        for part, rows in enumerate(_equal_parts(ends[first], ends[stop], n_parts)):
            length = (
                max(lengths[first:stop]) if n_parts == 1 else _round_up(rows.stop - rows.start, cutting.row_multiple)
            )
            padded = slice(start, start + length * (stop - first))
            n_extra += part > 0
            blocks.append(RowBlock(slice(first, stop), length, rows, padded, n_extra if part else 0))
            start = padded.stop
    if start == ends[-1]:
        return RowLayout(blocks, n_rows, None, None, None)
    return _padded(blocks, ends, n_rows)


def _round_up(n: int, multiple: int) -> int:
    """To a multiple; where n is large and there is padding, to a coarser one, so that there are 16 lengths an octave."""
    if multiple > 1:
        multiple = max(multiple, 1 << max(n.bit_length() - 5, 0))
    return -(-n // multiple) * multiple


def _equal_parts(start: int, stop: int, n_parts: int) -> Iterator[slice]:
    """The slice from `start` to `stop` in parts of equal length, up to one row."""
    for first, last in pairwise(start + (stop - start) * i // n_parts for i in range(n_parts + 1)):
        yield slice(first, last)


def _groups(lengths: Sequence[int], hidden: int, cutting: Cutting) -> Iterator[tuple[int, int]]:
    """Groups of equally many experts."""
    filled = sum(length > 0 for length in lengths)
    fitting = _BLOCK_ELEMENTS * filled // max(hidden * sum(lengths), 1)
    size = max(1, min(fitting, len(lengths) // max(cutting.parts, 1))) if cutting.batch else 1
    for first in range(0, len(lengths), size):
        yield from _halved(lengths, first, min(first + size, len(lengths)))


def _halved(lengths: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The group, or recursively its halves where it has an empty expert or would waste too much."""
    part = lengths[first:stop]
    if min(part) > 0 and max(part) * len(part) <= _WASTE * sum(part):
        yield first, stop
    elif stop - first > 1:
        middle = (first + stop) // 2
        yield from _halved(lengths, first, middle)
        yield from _halved(lengths, middle, stop)


def _padded(blocks: Sequence[RowBlock], ends: Sequence[int], n_rows: int) -> RowLayout:
    """A layout with the maps between sorted and padded rows."""
    runs = []  # first sorted row, last one, padded length
    for block in blocks:
        if block.shape[0] == 1:
            runs.append((block.rows.start, block.rows.stop - 1, block.length))
        else:
            experts = range(block.experts.start, block.experts.stop)
            runs += [(ends[e], ends[e + 1] - 1, block.length) for e in experts]
    # In numpy, which does not have to wake threads for so little.
    first, last, lengths = np.array(runs, np.int32).T
    n_padded, idle = blocks[-1].padded.stop, n_rows - ends[-1]
    shift = lengths.cumsum(dtype=np.int32) - lengths - first  # from a sorted to its padded row
    sorted_P = np.arange(n_padded, dtype=np.int32) - shift.repeat(lengths)
    last_P = last.repeat(lengths)
    sorted_n = [*(last - first + 1), idle]
    slot_S = np.append(shift, np.int32(n_padded - ends[-1])).repeat(sorted_n) + np.arange(n_rows, dtype=np.int32)
    maps = (np.minimum(sorted_P, last_P), sorted_P <= last_P, slot_S)
    return RowLayout(list(blocks), n_padded + idle, *map(torch.from_numpy, maps))
