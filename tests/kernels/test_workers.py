"""Experts in worker threads: each runs once, errors reach the caller, and Ctrl-C at any time leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import weakref

import pytest
import torch

from lightning_mue.kernels import workers
from lightning_mue.kernels.grouped_ffn.pytorch import experts, running
from lightning_mue.kernels.grouped_ffn.pytorch.elementwise import ELEMENTWISE
from lightning_mue.kernels.workers import run_in_threads, run_over_experts
from lightning_mue.moe import MoELayer


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_every_expert_with_rows_runs_exactly_once():
    seen = []
    run_over_experts(seen.extend, [500, 0, *[7] * 40, 0], parallel=True)
    assert sorted(seen) == [0, *range(2, 42)]


def test_small_experts_run_in_two_threads_at_once():
    both, threads = threading.Barrier(2, timeout=20), set()

    def work(experts):
        if experts == []:  # the large experts, which are offered to the calling thread first
            return
        both.wait()  # breaks if one thread were to do all
        threads.add(threading.get_ident())
        assert list(experts) is not None

    run_over_experts(work, [5] * 16, parallel=True)
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_operators_of_a_worker_are_single_threaded():
    """Else workers would compete with threads of their own. Neither the caller's number of threads nor the default changes."""
    workers._teams.clear()
    found, of_new_thread = [], []
    run_in_threads(lambda items: found.append(torch.get_num_threads()), [0, 1], 2)
    assert found == [1, 1]
    assert torch.get_num_threads() == 2
    in_thread(lambda: of_new_thread.append(torch.get_num_threads()))
    assert of_new_thread == [2]


def test_callers_that_need_a_team_at_once_start_one():
    defaults, seen = [], []
    for _ in range(20):
        workers._teams.clear()
        both, before = threading.Barrier(3), threading.active_count()

        def call(both=both):
            torch.set_num_threads(2)
            both.wait()
            run_in_threads(seen.extend, range(4), 2)

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        in_thread(lambda: defaults.append(torch.get_num_threads()))
        assert threading.active_count() - before <= 5  # two workers, and threads that are ending
    assert defaults == [2] * 20
    assert sorted(seen) == sorted([*range(4)] * 60)


def test_a_team_that_cannot_be_started_is_an_error(monkeypatch):
    """Not a wait for ever; the workers that did start end, and the default number of threads is as before."""
    defaults, seen = [], []

    class Refused(threading.Thread):
        def start(self):
            if self.name == "lightning-mue-experts-1":
                raise RuntimeError("can't start new thread")
            super().start()

    workers._teams.clear()
    before = set(threading.enumerate())
    monkeypatch.setattr(workers, "Thread", Refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_in_threads(seen.extend, range(4), 2)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
    in_thread(lambda: defaults.append(torch.get_num_threads()))
    assert defaults == [2]
    monkeypatch.undo()
    run_in_threads(seen.extend, range(4), 2)
    assert sorted(seen) == [*range(4)]


def test_serial_where_threads_are_not_wanted():
    threads = set()
    run_over_experts(lambda experts: threads.add(threading.get_ident()), [5] * 16, parallel=False)
    assert threads == {threading.get_ident()}


def test_errors_in_a_worker_reach_the_caller():
    def fail(experts):
        for e in experts:
            raise RuntimeError(f"expert {e}")

    with pytest.raises(RuntimeError, match="expert") as raised:
        run_over_experts(fail, [5] * 16, parallel=True)
    assert "fail" in [frame.name for frame in raised.traceback]
    seen = []
    run_over_experts(seen.extend, [5] * 16, parallel=True)
    assert len(seen) == 16


def test_workers_are_in_inference_mode_and_the_caller_is_not():
    modes = []
    run_in_threads(lambda items: modes.append(torch.is_inference_mode_enabled()), [0, 1], 2)
    assert modes == [True, True]
    assert not torch.is_inference_mode_enabled()


def test_workers_keep_nothing_of_a_call():
    class Held:
        pass

    held, freed = Held(), threading.Event()
    weakref.finalize(held, freed.set)
    run_in_threads(lambda items, held=held: list(items), [0, 1], 2)
    del held
    assert freed.wait(10)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork():
    """A forked child has none of its parent's threads."""
    calls = []
    run_over_experts(calls.extend, [5] * 16, parallel=True)
    child = os.fork()
    if child == 0:
        run_over_experts(calls.extend, [5] * 16, parallel=True)
        os._exit(0 if len(calls) == 32 else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------------


def ctrl_c():
    """As the terminal sends it: to the process, which handles it in the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


class Problem:
    """A layer whose passes run in two workers, an input and what comes out."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.layer = MoELayer(64, 64, 16, 2, init_std=0.1).to(dtype)
        self.x = torch.randn(300, 64, dtype=dtype)
        self.expected = self.values(self.x)

    def values(self, x):
        x = x.clone().requires_grad_()
        y = self.layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *self.layer.experts.parameters()])]

    def check(self):
        """The main thread is as it was, and a call computes what it did."""
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        for found, expected in zip(self.values(self.x), self.expected, strict=True):
            assert torch.equal(found, expected)
            assert not found.is_inference()


@pytest.fixture(autouse=True)
def _interrupts_are_heard():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def problem(request, monkeypatch):
    monkeypatch.setattr(running, "_PARALLEL_FLOPS", 0)
    return Problem(request.param)


def test_several_threads_share_the_workers(problem):
    """Forward and backward passes of different inputs at the same time, each with its own values."""
    inputs = [problem.x, problem.x.flip(0), problem.x * 2]
    expected, found = [problem.values(x) for x in inputs], {}

    def call(i):
        torch.set_num_threads(2)
        found[i] = [problem.values(inputs[i]) for _ in range(4)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for i, values in enumerate(expected):
        for again in found[i]:
            assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))


def interrupted_after(delay, step):
    """Run `step` again and again until a Ctrl-C after `delay` seconds ends it."""
    caught = threading.Event()

    def send():
        time.sleep(delay)
        ctrl_c()
        while not caught.wait(2):  # Python drops an exception that it raises in a finalizer
            ctrl_c()

    sender = threading.Thread(target=send)
    try:
        sender.start()
        while True:
            step()
    except KeyboardInterrupt:
        caught.set()
    sender.join()


def test_an_interrupt_at_any_time(problem):
    """The interrupted calls had another input: none of their values turns up later."""
    generator, other = random.Random(0), torch.randn_like(problem.x)
    start = time.perf_counter()
    problem.values(other)
    duration = time.perf_counter() - start
    for _ in range(15):
        interrupted_after(generator.uniform(0, 2 * duration), lambda: problem.values(other))
        problem.check()


def test_an_interrupt_while_workers_are_started(problem):
    generator = random.Random(0)
    for _ in range(8):
        workers._teams.clear()
        interrupted_after(generator.uniform(0, 2e-3), lambda: problem.values(problem.x))
        problem.check()


def test_what_had_not_begun_is_dropped():
    """The workers are busy with something else when the interrupt comes, and free again for the next call."""
    free, begun, seen = threading.Event(), [], []
    for _ in range(2):
        workers._team(2).put(free.wait)
    interrupted_after(0.1, lambda: run_in_threads(begun.extend, range(8), 2))
    free.set()
    run_in_threads(seen.extend, range(8), 2)
    assert sorted(seen) == list(range(8))
    assert begun == []


@pytest.fixture
def slow_blocks(problem):
    """Makes every block last `seconds`; the first one sends Ctrl-C at the times `interrupts`. Lists the blocks begun and ended."""
    function, begun, ended = ELEMENTWISE["swiglu"].function, [], []
    patch = pytest.MonkeyPatch()

    def patched(interrupts, seconds):
        def silu(z, out):
            begun.append(threading.current_thread())
            start, first = time.monotonic(), len(begun) == 1
            for at in (*(interrupts if first else ()), seconds):
                time.sleep(max(start + at - time.monotonic(), 0))
                if at != seconds:
                    ctrl_c()
            function(z, out)
            ended.append(threading.current_thread())
            return out

        patch.setitem(experts.ELEMENTWISE, "swiglu", ELEMENTWISE["swiglu"]._replace(function=silu))
        return begun, ended, patch.undo

    yield patched
    patch.undo()


@pytest.mark.parametrize("backward", [False, True])
def test_an_interrupt_ends_the_call_after_the_blocks_that_have_begun(problem, slow_blocks, backward):
    y = problem.layer(problem.x).sum()
    begun, ended, undo = slow_blocks([0.1], 0.2)
    with pytest.raises(KeyboardInterrupt):
        y.backward() if backward else problem.layer(problem.x)
    assert threading.main_thread() not in begun
    assert 1 <= len(begun) == len(ended) <= 4  # of 16 experts
    undo()
    problem.check()


@pytest.mark.parametrize("backward", [False, True])
def test_a_second_interrupt_does_not_wait(problem, slow_blocks, backward):
    """Workers that still run write to what belongs to the interrupted call alone."""
    y = problem.layer(problem.x).sum()
    begun, ended, undo = slow_blocks([0.1, 0.3], 1)
    with pytest.raises(KeyboardInterrupt):
        y.backward() if backward else problem.layer(problem.x)
    assert begun
    assert not ended
    undo()
    while not ended:
        problem.check()
    problem.check()
