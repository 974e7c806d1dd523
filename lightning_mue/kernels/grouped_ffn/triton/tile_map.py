"""Computes on the device which rows each tile covers: grids depend on shapes alone, and nothing waits for the host.

Expert e owns rows offsets[e] to offsets[e + 1]. Cutting every expert's rows into tiles of M gives at most
ceil(S / M) + E - 1 of them for every routing, which is the length of the table. The device counts how many there are, and
kernels loop up to that number.

Two ways of cutting:
    tiles   equal tiles of `size` rows, the last of an expert ragged; for products with one result a row.
    chunks  for sums over an expert's rows (weight gradients): an expert of more than `size` rows is cut into equal chunks
            that are summed later, any other is one chunk, also with no rows, since its gradient must be written. Chunks of
            cut experts come first: they are the longest, and tile i of them stores its sum in slot i.

Shape legend: S rows sorted by expert, E experts.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.triton_tools.launching import add, new_empty


class TileMap(NamedTuple):
    """A table of tiles.

    Attributes:
        tiles: int32 [bound, 4]: expert, first row, end row, and the number of chunks that are summed: 1 if the expert is
            not cut, that number at the first of its chunks, 0 at the others. Only the first `live` entries are written.
        live: int32 [1], how many tiles there are.
        bound: How many there can be.
        slots: How many of them can be chunks of experts that are cut.
    """

    tiles: Tensor
    live: Tensor
    bound: int
    slots: int


@triton.jit(do_not_specialize=["n_experts", "size"])
def tile_map_kernel(offsets_ptr, tiles_ptr, live_ptr, n_experts, size, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr):
    """One program per expert: it counts the tiles before its own and writes those."""
    e = tl.program_id(0)
    i = tl.arange(0, EXPERTS)
    inside = i < n_experts
    counts = tl.load(offsets_ptr + 1 + i, mask=inside, other=0) - tl.load(offsets_ptr + i, mask=inside, other=0)
    first, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    pieces, mine = (counts + size - 1) // size, (end - first + size - 1) // size
    per = size
    if CHUNKS:
        pieces, mine = tl.where(inside, tl.maximum(pieces, 1), 0), tl.maximum(mine, 1)
        per = (end - first + mine - 1) // mine
        cut = pieces > 1
        earlier = (cut & ((mine <= 1) | (i < e))) | ((pieces <= 1) & (mine <= 1) & (i < e))
    else:
        earlier = i < e
    before = tl.reduce(tl.where(earlier, pieces, 0), 0, add)
    if e == 0:
        tl.store(live_ptr, tl.reduce(pieces, 0, add))
    lane = tl.arange(0, 64)
    for done in range(0, mine, 64):
        tile = done + lane
        row = first + tile * per
        at = tiles_ptr + (before + tile) * 4
        tl.store(at, e + tile * 0, mask=tile < mine)
        tl.store(at + 1, tl.minimum(row, end), mask=tile < mine)
        tl.store(at + 2, tl.minimum(row + per, end), mask=tile < mine)
        summed = tl.where(tile == 0, mine, 0) if CHUNKS else tile * 0 + 1
        tl.store(at + 3, summed, mask=tile < mine)


@triton.jit
def place_of(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP row tiles at a time, column by column, so that their operands stay in L2."""
    group = tile // (GROUP * col_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * col_tiles)
    return group * GROUP + within % height, within // height


def tile_rows(offsets: Tensor, rows: int, size: int) -> TileMap:
    """Return the table of tiles of at most `size` of `rows` rows."""
    experts = len(offsets) - 1
    # No more tiles than rows, either: an expert without rows has none.
    return _fill(offsets, min(-(-rows // size) + experts - 1, rows), 0, size, False)


def chunk_rows(offsets: Tensor, rows: int, size: int) -> TileMap:
    """Return the table of chunks; an expert with more than `size` of `rows` rows is cut."""
    experts = len(offsets) - 1
    # An expert of n > size rows has ceil(n / size) < 2 n / size chunks.
    slots = 2 * rows // size if rows > size else 0
    return _fill(offsets, -(-rows // size) + experts, slots, size, True)


def _fill(offsets: Tensor, bound: int, slots: int, size: int, chunks: bool) -> TileMap:
    experts = len(offsets) - 1
    tiles = new_empty(offsets, max(bound, 1), 4, dtype=torch.int32)
    live = new_empty(offsets, 1, dtype=torch.int32)
    width = triton.next_power_of_2(experts)
    tile_map_kernel[(experts,)](offsets, tiles, live, experts, size, CHUNKS=chunks, EXPERTS=width, num_warps=4)
    return TileMap(tiles, live, bound, slots)
