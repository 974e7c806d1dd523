"""Sharing experts out over threads: PyTorch's own OpenMP threads, and the pool where those cannot be had."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from lightning_mue.kernels.grouped_ffn.pytorch import experts as grouped_ffn
from lightning_mue.kernels.grouped_ffn.pytorch import workers
from lightning_mue.kernels.grouped_ffn.pytorch.elementwise import ELEMENTWISE
from lightning_mue.kernels.grouped_ffn.pytorch.workers import interrupts_held, run_in_threads, run_over_experts
from lightning_mue.moe import MoELayer


@pytest.fixture(params=["openmp", "pool"])
def two_threads(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(workers, "_openmp_region", lambda: None)
    elif workers._openmp_region() is None:
        pytest.skip("PyTorch is built without OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(before)


def test_every_expert_with_rows_runs_exactly_once(two_threads):
    seen = []
    run_over_experts(seen.extend, [500, 0, *[7] * 40, 0], parallel=True)
    assert sorted(seen) == [0, *range(2, 42)]


def test_small_experts_run_in_two_threads_at_once(two_threads):
    both, threads = threading.Barrier(2, timeout=20), set()

    def work(experts):
        both.wait()  # breaks if one thread were to do all
        threads.add(threading.get_ident())
        assert list(experts) is not None

    run_over_experts(work_of_small(work), [5] * 16, parallel=True)
    assert len(threads) == 2


def work_of_small(work):
    """`run_over_experts` first offers the large experts, of which there are none, to the calling thread."""

    def offered(experts):
        if experts != []:
            work(experts)

    return offered


def test_operators_of_a_worker_are_single_threaded(two_threads):
    """A worker that starts threads of its own has as many competitors as there are workers."""
    found = []
    a = torch.randn(64, 64)
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.[sd][oy]*"))))

    def body():
        _ = a @ a
        # Inside a parallel region PyTorch's operators start none of their own, whatever their number is set to.
        found.append(torch.get_num_threads() == 1 if two_threads == "pool" else library.omp_in_parallel() == 1)

    run_in_threads(body, 2)
    assert found == [True, True]
    assert torch.get_num_threads() == 2


def test_serial_where_threads_are_not_wanted(two_threads):
    threads = set()
    run_over_experts(lambda experts: threads.add(threading.get_ident()), [5] * 16, parallel=False)
    assert threads == {threading.get_ident()}


def test_errors_in_a_worker_reach_the_caller(two_threads):
    def fail(experts):
        for e in experts:
            raise RuntimeError(f"expert {e}")

    with pytest.raises(RuntimeError, match="expert"):
        run_over_experts(fail, [5] * 16, parallel=True)
    seen = []
    run_over_experts(seen.extend, [5] * 16, parallel=True)
    assert len(seen) == 16


def test_worker_leaves_no_inference_mode_behind(two_threads):
    run_over_experts(lambda experts: list(experts), [5] * 16, parallel=True)
    modes = []
    run_in_threads(lambda: modes.append(torch.is_inference_mode_enabled()), 2)
    assert modes == [False, False]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork(two_threads):
    """A forked child has none of its parent's threads, OpenMP's included."""
    calls = []
    run_over_experts(calls.extend, [5] * 16, parallel=True)
    child = os.fork()
    if child == 0:
        run_over_experts(calls.extend, [5] * 16, parallel=True)
        os._exit(0 if len(calls) == 32 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_interrupt_waits_for_the_block():
    done, before = [], signal.getsignal(signal.SIGINT)

    def body():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done
    assert signal.getsignal(signal.SIGINT) is before
    with interrupts_held():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_goes_to_the_handler_that_was_there(monkeypatch):
    calls, before = [], signal.getsignal(signal.SIGINT)
    try:
        for handler, expected in ((lambda *args: calls.append(args), 1), (signal.SIG_IGN, 1)):
            signal.signal(signal.SIGINT, handler)
            with interrupts_held():
                signal.raise_signal(signal.SIGINT)
            assert len(calls) == expected
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("backward", [False, True])
def test_an_interrupt_leaves_the_main_thread_as_it_was(two_threads, monkeypatch, backward):
    """It comes in the middle of a block, in inference mode, in a callback from OpenMP."""
    layer, x = MoELayer(64, 64, 16, 2, init_std=0.1), torch.randn(1000, 64)
    expected = layer(x)
    function, finished = ELEMENTWISE["swiglu"].function, []

    def silu(z, out):
        signal.raise_signal(signal.SIGINT)
        finished.append(z.shape)  # the main thread gets here only if the interrupt waits
        return function(z, out)

    y = layer(x)
    with monkeypatch.context() as patch:
        patch.setitem(grouped_ffn.ELEMENTWISE, "swiglu", ELEMENTWISE["swiglu"]._replace(function=silu))
        with pytest.raises(KeyboardInterrupt):
            y.sum().backward() if backward else layer(x)
    assert len(finished) == 16
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)
