"""Worker threads for the CPU backend: one expert a thread beats all threads on one expert.

A GEMM of a few hundred rows does not scale over threads, but experts are independent of each other. Each worker runs
its operators single-threaded and takes the next largest expert until none is left.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):  # absent on Windows, which does not fork
    # A forked child inherits the table but none of the threads: it must start its own.
    os.register_at_fork(after_in_child=_pools.clear)


def _single_threaded(barrier: Barrier) -> None:
    torch.set_num_threads(1)  # OpenMP and MKL keep this number per thread
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

    for done in [_pool(n_threads).submit(drain) for _ in range(n_threads)]:
        done.result()
