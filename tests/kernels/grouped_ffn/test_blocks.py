"""Cutting rows into blocks: every row has one place, blocks are of few lengths, and no block is too large a share."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mue.kernels.grouped_ffn.pytorch import blocks
from lightning_mue.kernels.grouped_ffn.pytorch.blocks import Cutting, plan_blocks

CUTTINGS = [
    Cutting(1, False, 0),
    Cutting(1, False, 8),
    Cutting(32, True, 0),
    Cutting(32, True, 2),
    Cutting(32, True, 8),
]


def layout_of(counts, idle=0, hidden=64, cutting=CUTTINGS[-1]):
    return plan_blocks([0, *accumulate(counts)], sum(counts) + idle, hidden, cutting)


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(0, 70), st.integers(0, 9000)), min_size=1, max_size=40),
    idle=st.integers(0, 5),
    cutting=st.sampled_from(CUTTINGS),
)
def test_every_sorted_row_has_one_padded_row_of_its_expert(counts, idle, cutting):
    layout, n_routed = layout_of(counts, idle, cutting=cutting), sum(counts)
    expert_S = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = torch.arange(n_routed + idle)
    slot_S = rows if layout.slot_S is None else layout.slot_S.long()
    assert slot_S.unique().numel() == n_routed + idle
    assert slot_S[n_routed:].tolist() == list(range(layout.n_rows - idle, layout.n_rows))
    for block in layout.blocks:
        source = rows[block.padded] if layout.source_P is None else layout.source_P[block.padded].long()
        owners = expert_S[source].view(block.shape)
        assert owners.tolist() == [[e] * block.length for e in range(block.experts.start, block.experts.stop)]
        assert source.unique().tolist() == rows[block.rows].tolist()
        real = torch.ones(block.n_rows, dtype=torch.bool) if layout.real_P is None else layout.real_P[block.padded]
        assert slot_S[block.rows].tolist() == (torch.arange(block.n_rows)[real] + block.padded.start).tolist()
    assert layout.empty_experts(len(counts)) == [e for e, n in enumerate(counts) if n == 0]


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 9000), min_size=1, max_size=40), cutting=st.sampled_from(CUTTINGS))
def test_extra_parts_are_counted(counts, cutting):
    layout = layout_of(counts, cutting=cutting)
    assert [block.part for block in layout.extra_parts] == list(range(1, len(layout.extra_parts) + 1))
    seen = set()
    for block in layout.blocks:
        assert (block.experts.start in seen) == (block.part > 0)
        seen.add(block.experts.start)


def test_without_padding_nothing_is_looked_up():
    layout = layout_of([5, 0, 9], cutting=Cutting(1, False, 8))
    assert layout.source_P is layout.real_P is layout.slot_S is None
    assert [block.length for block in layout.blocks] == [5, 9]


def test_an_expert_with_most_rows_is_cut():
    whole = layout_of([10_000, 100, 100, 100], cutting=Cutting(1, False, 0))
    cut = layout_of([10_000, 100, 100, 100], cutting=Cutting(1, False, 8))
    assert max(block.n_rows for block in whole.blocks) == 10_000
    assert max(block.n_rows for block in cut.blocks) <= 2 * cut.n_rows / 8
    assert max(block.length for block in cut.blocks[:-3]) - min(block.length for block in cut.blocks[:-3]) <= 1


def test_small_experts_share_blocks_and_lengths_are_few():
    generator = torch.Generator().manual_seed(0)
    seen, n_blocks = set(), set()
    for _ in range(30):
        counts = torch.bincount(torch.randint(64, (8192,), generator=generator), minlength=64).tolist()
        layout = layout_of(counts, hidden=256)
        seen |= {block.shape for block in layout.blocks}
        n_blocks.add(len(layout.blocks))
        assert layout.n_rows <= blocks._WASTE * 1.25 * 8192  # also of rounding up to 32
    assert n_blocks <= {8, 9, 10}
    assert len(seen) <= 8


@pytest.mark.parametrize("n", [1, 31, 32, 33, 511, 512, 513, 5000, 100_000])
def test_rounding_up_wastes_little(n):
    rounded = blocks._round_up(n, 32)
    assert n <= rounded <= max(n + 31, 17 / 16 * n + 1)
    assert rounded % 32 == 0
    assert blocks._round_up(n, 1) == n
