"""Batches are a pure function of (seed, step, rank); validation windows are fixed and divided evenly among ranks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mue.data.sampling import FixedLoader, StepLoader, gather_windows, validation_starts, window_starts

TOKENS = np.arange(1000, dtype=np.uint16)


def loader(**kwargs):
    return StepLoader(kwargs.pop("tokens_N", TOKENS), **{"context_length": 8, "batch_size": 4, "seed": 1, **kwargs})


def tokens_of(batches):
    return [batch["tokens"].tolist() for batch in batches]


def test_starts_depend_on_seed_step_and_rank_only():
    draw = {"batch_size": 16, "n_starts": 10**6}
    reference = window_starts(3, 7, 2, **draw)
    np.random.seed(0)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(5)
    assert (window_starts(3, 7, 2, **draw) == reference).all()
    for other in ((4, 7, 2), (3, 8, 2), (3, 7, 3), (2, 7, 3), (7, 3, 2), (3, 2, 7), (3, 7 + 2**32, 2)):
        assert not (window_starts(*other, **draw) == reference).any()


def test_starts_are_pinned():
    """These numbers may never change: a checkpoint resumed under a newer version relies on them."""
    assert window_starts(0, 0, 0, batch_size=4, n_starts=10**9).tolist() == [201967259, 202625458, 878205049, 246414556]
    assert window_starts(42, 1000, 3, batch_size=4, n_starts=10**9).tolist() == [
        7501433,
        18205585,
        874166059,
        252092393,
    ]


def test_a_smaller_batch_is_a_prefix_of_a_larger_one():
    large = window_starts(0, 1, 0, batch_size=64, n_starts=99)
    assert (window_starts(0, 1, 0, batch_size=5, n_starts=99) == large[:5]).all()


def test_starts_are_uniform_and_reach_both_ends():
    n_starts, n_steps, batch_size = 10, 500, 40
    starts = np.concatenate(
        [window_starts(0, step, 0, batch_size=batch_size, n_starts=n_starts) for step in range(n_steps)]
    )
    counts = np.bincount(starts, minlength=n_starts)
    expected = n_steps * batch_size / n_starts
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # 99.9 % quantile of chi-squared with 9 degrees of freedom; the draws are fixed, so this cannot be flaky.
    assert chi_squared < 27.9
    assert len(counts) == n_starts


def test_steps_and_ranks_are_uncorrelated():
    """Starts of neighbouring steps and ranks: |correlation| below 4 standard errors; a copied stream would give 1."""
    n = 4000
    starts_by_step = np.array([window_starts(0, step, 0, batch_size=2, n_starts=10**6) for step in range(n)])
    starts_by_rank = np.array([window_starts(0, 0, rank, batch_size=2, n_starts=10**6) for rank in range(n)])
    pairs = {
        "neighbouring steps": (starts_by_step[1:, 0], starts_by_step[:-1, 0]),
        "neighbouring ranks": (starts_by_rank[1:, 0], starts_by_rank[:-1, 0]),
        "step against rank": (starts_by_step[1:, 0], starts_by_rank[1:, 0]),
        "within a batch": (starts_by_step[:, 0], starts_by_step[:, 1]),
    }
    for name, pair in pairs.items():
        assert abs(np.corrcoef(*pair)[0, 1]) < 4 / np.sqrt(n), name


def test_windows_are_contiguous_tensors_shifted_by_one():
    batch = gather_windows(TOKENS, np.array([0, 991]), 8)
    assert batch["tokens"].tolist() == [list(range(8)), list(range(991, 999))]
    assert batch["targets"].tolist() == [list(range(1, 9)), list(range(992, 1000))]
    for tensor in batch.values():
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_largest_ids_survive_the_conversion(dtype):
    top = np.iinfo(dtype).max
    batch = gather_windows(np.full(4, top, dtype=dtype), np.array([0]), 3)
    assert batch["tokens"].tolist() == [[top] * 3]


@given(
    n_tokens=st.integers(2, 400),
    context_length=st.integers(1, 20),
    step=st.integers(0, 2**40),
    rank=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_every_window_lies_within_the_tokens(n_tokens, context_length, step, rank):
    if n_tokens <= context_length:
        return
    stream = loader(tokens_N=np.arange(n_tokens), context_length=context_length, rank=rank)
    batch = stream.batch(step)
    assert batch["tokens"].shape == (4, context_length)
    assert (batch["targets"] == batch["tokens"] + 1).all()


def test_the_first_and_the_last_window_are_drawn():
    stream = loader(tokens_N=TOKENS[:11], context_length=8, batch_size=60)
    assert {tuple(window) for window in stream.batch(0)["targets"].tolist()} == {
        tuple(range(start + 1, start + 9)) for start in range(3)
    }


def test_two_loaders_agree_and_ranks_differ():
    assert tokens_of(loader()) == tokens_of(loader())
    streams = [{tuple(map(tuple, batch)) for batch in tokens_of(loader(rank=rank, world_size=4))} for rank in range(4)]
    assert not set.intersection(*streams)
    assert len(set.union(*streams)) == sum(map(len, streams))


@pytest.mark.parametrize(
    ("n_tokens", "world_size", "expected"), [(1000, 1, 31), (1000, 2, 15), (1000, 64, 1), (9, 1, 1)]
)
def test_length_is_what_all_ranks_need_to_draw_the_split_once(n_tokens, world_size, expected):
    stream = loader(tokens_N=TOKENS[:n_tokens], world_size=world_size)
    assert len(stream) == expected
    assert len(list(stream)) == expected


def test_epochs_continue_the_stream():
    stream = loader()
    first, second = tokens_of(stream), tokens_of(stream)
    assert stream.step == 2 * len(stream)
    assert not any(batch in first for batch in second)
    assert second == [stream.batch(len(stream) + i)["tokens"].tolist() for i in range(len(stream))]


def test_state_restores_the_stream_anywhere():
    stream = loader()
    batches = tokens_of(stream) + tokens_of(stream)
    for step in (0, 1, 17, len(stream), len(stream) + 3):
        resumed = loader()
        resumed.load_state_dict({**stream.state_dict(), "step": step})
        assert resumed.step == step
        n = min(len(stream), len(batches) - step)
        assert tokens_of(resumed)[:n] == batches[step : step + n]


def test_asking_for_an_iterator_does_not_move_the_stream():
    stream = loader()
    iter(stream)
    next(iter(stream))
    assert stream.state_dict()["step"] == 1


def test_a_batch_in_flight_is_not_counted_as_seen():
    stream = loader(in_flight=lambda: 1)
    next(iter(stream))
    assert stream.state_dict()["step"] == 0


def test_restoring_another_stream_warns_and_names_the_change():
    state = loader(seed=1, batch_size=4).state_dict()
    with pytest.warns(UserWarning, match=r"training data: found other settings .*\(seed: 1 -> 2; batch_size: 4 -> 8\)"):
        loader(seed=2, batch_size=8).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader(seed=1, batch_size=4, rank=0).load_state_dict(state)


def test_state_is_plain_integers():
    assert {type(value) for value in loader().state_dict().values()} == {int}


@given(
    n_tokens=st.integers(10, 2000),
    context_length=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    max_batches=st.none() | st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_validation_windows_are_distinct_and_shared_evenly(
    n_tokens, context_length, batch_size, world_size, max_batches
):
    n_windows = (n_tokens - 1) // context_length
    if n_windows < world_size:
        return
    arguments = {
        "context_length": context_length,
        "batch_size": batch_size,
        "world_size": world_size,
        "max_batches": max_batches,
    }
    by_rank = [validation_starts(n_tokens, rank=rank, **arguments) for rank in range(world_size)]
    assert len({starts.shape for starts in by_rank}) == 1
    n_batches, size = by_rank[0].shape
    assert 1 <= size <= batch_size
    assert n_batches >= 1
    if max_batches is not None:
        assert n_batches <= max_batches
    else:  # less than one batch of every rank is dropped
        assert n_windows - n_batches * size * world_size < size * world_size
    starts = np.sort(np.concatenate([starts.ravel() for starts in by_rank]))
    assert (np.diff(starts) >= context_length).all()
    assert starts[0] >= 0
    assert starts[-1] + context_length + 1 <= n_tokens


def test_limited_validation_spans_the_whole_split():
    starts = validation_starts(10_001, context_length=10, batch_size=5, rank=0, world_size=1, max_batches=4)
    assert starts.ravel().tolist() == list(range(0, 10_000, 500))


def test_too_few_windows_for_the_processes():
    with pytest.raises(
        ValueError,
        match=r"found 40 tokens, which is 3 windows of context_length=10, expected at least one .* 4 processes",
    ):
        validation_starts(40, context_length=10, batch_size=1, rank=0, world_size=4, max_batches=None)


def test_fixed_loader_repeats_itself():
    starts = validation_starts(100, context_length=8, batch_size=3, rank=0, world_size=1, max_batches=None)
    fixed = FixedLoader(TOKENS[:100], starts, 8)
    assert len(fixed) == len(list(fixed)) == 4
    assert tokens_of(fixed) == tokens_of(fixed)
