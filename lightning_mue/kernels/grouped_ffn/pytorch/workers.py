"""Worker threads for the CPU backend: one expert a thread beats all threads on one expert.

A GEMM of a few hundred rows does not scale over threads, but experts are independent of each other. Each worker runs
its operators single-threaded and takes the next largest expert until none is left.

The workers are PyTorch's own OpenMP threads where it has them. Threads beside those would have to share the cores with
them: after every threaded operator they spin for milliseconds, which costs two workers on two cores 4 ms a call.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_forked = threading.Event()
if hasattr(os, "register_at_fork"):  # absent on Windows, which does not fork
    # A forked child inherits the tables but none of the threads, OpenMP's included: it must start its own.
    os.register_at_fork(after_in_child=_pools.clear)
    os.register_at_fork(after_in_child=_forked.set)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let a Ctrl-C (SIGINT) take effect after the block, some milliseconds later.

    Python would raise KeyboardInterrupt between any two of its instructions. In a callback from OpenMP it cannot get out and
    would be lost; between entering a mode of PyTorch's (inference, no gradients) and the block that leaves it again, the
    main thread would stay in that mode.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    held: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[-1])


def run_over_experts(work: Callable[[Iterable[int]], None], rows: Sequence[int], *, parallel: bool) -> None:
    """Call `work` on every expert that has rows, each exactly once.

    Args:
        work: Called with the indices of some experts; writes its results to places that no other expert touches. It
            must produce the same values in whatever order and thread the experts come.
        rows: Rows of each expert.
        parallel: Allow worker threads. Experts too large to share out evenly still run in the calling thread, with
            threaded operators.
    """
    todo = sorted((e for e, n in enumerate(rows) if n), key=lambda e: -rows[e])
    n_threads = torch.get_num_threads() if parallel else 1
    fair_share = sum(rows) / (2 * n_threads)
    small = [e for e in todo if rows[e] <= fair_share]
    if n_threads == 1 or len(small) < 2 * n_threads:
        work(todo)
        return
    work([e for e in todo if rows[e] > fair_share])
    queue = deque(small)

    def drain() -> None:
        # Workers do not inherit the caller's grad or inference mode; in inference mode they may write to any tensor.
        with torch.inference_mode():
            work(_take(queue))

    run_in_threads(drain, n_threads)


def run_in_threads(body: Callable[[], None], n_threads: int) -> None:
    """Call `body` in up to `n_threads` threads at once, whose operators are single-threaded; return when all are done.

    Raises:
        BaseException: What `body` raised, in one of the threads.
    """
    region = None if _forked.is_set() else _openmp_region()
    if region is not None:
        region(body, n_threads)
        return
    for done in [_pool(n_threads).submit(body) for _ in range(n_threads)]:
        done.result()


@cache
def _openmp_region() -> Callable[[Callable[[], None], int], None] | None:
    """A function that runs a body as an OpenMP parallel region in PyTorch's threads; None where that cannot be had.

    GOMP_parallel is what GCC makes of ``#pragma omp parallel``; GNU's, LLVM's and Intel's libraries all have it. Looked
    up through PyTorch's library, it is that of the OpenMP which PyTorch itself uses, however many are loaded.
    """
    try:
        (library,) = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.[sd][oy]*")  # .so or .dylib
        gomp_parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (ValueError, OSError, AttributeError):
        return None
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    callback_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    gomp_parallel.argtypes = [callback_type, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    gomp_parallel.restype = None

    def region(body: Callable[[], None], n_threads: int) -> None:
        errors: list[BaseException] = []

        def run(_: Any) -> None:
            try:
                body()
            except BaseException as error:  # must not reach C; raised again below
                errors.append(error)

        gomp_parallel(callback_type(run), None, n_threads, 0)
        if errors:
            raise errors[0]

    return region


def _single_threaded(barrier: Barrier) -> None:
    torch.get_num_threads()  # a thread's first look at this number resets it to that of the process
    torch.set_num_threads(1)  # OpenMP and MKL keep it per thread
    barrier.wait()


def _pool(n_threads: int) -> ThreadPoolExecutor:
    """The pool of `n_threads` workers, each already set to run its operators single-threaded."""
    if n_threads not in _pools:
        barrier = Barrier(n_threads + 1)
        pool = ThreadPoolExecutor(n_threads, thread_name_prefix="lightning-mue-experts")
        starts = [pool.submit(_single_threaded, barrier) for _ in range(n_threads)]
        barrier.wait()
        for start in starts:
            start.result()
        torch.set_num_threads(n_threads)  # the default of threads that start later, which the workers have lowered
        _pools[n_threads] = pool
    return _pools[n_threads]


def _take(queue: deque[int]) -> Iterator[int]:
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return
