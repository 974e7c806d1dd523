"""The type of CPU products: what is measured, what fixes it, and that all ranks take one."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
import torch.distributed as dist

from lightning_mue.kernels import compute_type
from lightning_mue.kernels.compute_type import VARIABLE, bfloat16_is_slow, cpu_product_dtype


def forget():
    compute_type._measured.cache_clear()
    compute_type._gain.cache_clear()
    compute_type._agreed.clear()


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    forget()
    yield
    forget()


def times(monkeypatch, gains):
    """A processor on which bfloat16 is `gains` times as fast, by shape."""
    asked = []

    def seconds(shape, dtype):
        asked.append(shape)
        return gains[compute_type._SHAPES.index(shape)] if dtype == torch.float32 else 1.0

    monkeypatch.setattr(compute_type, "_seconds", seconds)
    return asked


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ((1.5, 2.2, 2.4, 2.8), torch.bfloat16),
        ((0.7, 1.6, 2.4, 2.8), torch.bfloat16),  # slower for the smallest products alone
        ((1.1, 1.2, 1.2, 1.3), torch.float32),  # not by enough to give up precision
        ((0.9, 0.8, 0.9, 0.7), torch.float32),
    ],
)
def test_bfloat16_is_taken_where_it_is_clearly_faster(monkeypatch, gains, chosen):
    times(monkeypatch, gains)
    assert cpu_product_dtype() == chosen


def test_a_slow_type_is_not_measured_to_the_end(monkeypatch):
    asked = times(monkeypatch, (0.02, 9.0, 9.0, 9.0))
    assert cpu_product_dtype() == torch.float32
    assert set(asked) == {compute_type._SHAPES[0]}


def test_it_is_measured_and_told_once(monkeypatch, caplog):
    asked = times(monkeypatch, (2.0,) * 4)
    with caplog.at_level(logging.INFO, logger="lightning_mue"):
        cpu_product_dtype()
        count = len(asked)
        cpu_product_dtype()
    assert len(asked) == count
    (record,) = [r for r in caplog.records if r.name == compute_type.__name__]
    assert "bfloat16 is 2 times as fast" in record.getMessage()
    assert f"{VARIABLE}=bfloat16" in record.getMessage()


@pytest.mark.parametrize(
    ("gains", "slow"),
    [
        ((0.02, 9.0, 9.0, 9.0), True),
        ((0.6, 0.7, 0.6, 0.6), True),
        ((0.9, 1.0, 0.8, 0.9), False),  # conversions would cost what is gained
        ((2.0,) * 4, False),
    ],
)
def test_bfloat16_is_slow_only_by_a_margin(monkeypatch, gains, slow):
    times(monkeypatch, gains)
    assert bfloat16_is_slow() == slow


def test_a_measurement_that_fails_calls_nothing_slow(monkeypatch):
    def seconds(shape, dtype):
        raise RuntimeError("no such product")

    monkeypatch.setattr(compute_type, "_seconds", seconds)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    assert not bfloat16_is_slow()
    assert cpu_product_dtype() == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_variable_fixes_it(monkeypatch, name):
    asked = times(monkeypatch, (2.0,) * 4)
    monkeypatch.setenv(VARIABLE, name)
    assert cpu_product_dtype() == getattr(torch, name)
    assert bfloat16_is_slow() == (name == "float32")
    assert not asked


def test_an_unknown_type_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "float8")
    with pytest.raises(ValueError, match=rf"{VARIABLE}: found 'float8', expected .*bfloat16"):
        cpu_product_dtype()


def test_the_real_measurement_leaves_the_caller_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
        cpu_product_dtype()
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_take_the_choice_of_the_first_that_asks(monkeypatch, caplog):
    """By the job's store, not by a collective: ranks ask at different times, some perhaps never."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        times(monkeypatch, (2.0,) * 4)
        assert cpu_product_dtype() == torch.bfloat16  # the first rank's
        # Another rank of the job: another process, whose processor is another.
        forget()
        times(monkeypatch, (0.5,) * 4)
        assert compute_type._measured() == "float32"
        with caplog.at_level(logging.WARNING, logger="lightning_mue"):
            assert cpu_product_dtype() == torch.bfloat16
        assert "another rank's choice" in caplog.text
    finally:
        dist.destroy_process_group()
