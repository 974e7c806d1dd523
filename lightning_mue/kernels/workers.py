"""Worker threads for the CPU backend: experts side by side, each with single-threaded operators.

A GEMM of a few hundred rows does not scale over many threads, but experts are independent of each other. Each worker takes the
next largest expert until none is left.

Ctrl-C: Python raises KeyboardInterrupt in the main thread between any two instructions. The main thread therefore changes
neither its grad mode nor its number of threads, and it waits on primitives written in C, which an interrupt cannot leave half
acquired. Workers, which no interrupt reaches, set their own modes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread

import torch

Task = Callable[[], None]

_teams: dict[int, SimpleQueue[Task | None]] = {}  # by number of workers, the queue that they read from
_starting = Lock()  # held by the thread that starts a team, for it changes the process's default number of threads


def _forget_teams() -> None:
    """In a forked child, which has none of its parent's threads; one of them may hold the lock."""
    global _starting
    _starting = Lock()
    _teams.clear()


if hasattr(os, "register_at_fork"):  # absent on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget_teams)


def run_over_experts(work: Callable[[Iterable[int]], None], rows: Sequence[int], *, parallel: bool) -> None:
    """Call `work` with the indices of all experts that have rows, each exactly once; in worker threads if `parallel`.

    `work` writes its results to places that no other expert touches, and produces the same values for every order of the
    experts and in every thread. Experts too large for an even split run in the calling thread, with threaded operators.
    """
    todo = sorted((e for e, n in enumerate(rows) if n), key=lambda e: -rows[e])
    n_threads = torch.get_num_threads() if parallel else 1
    fair_share = sum(rows) / (2 * n_threads)
    small = [e for e in todo if rows[e] <= fair_share]
    if n_threads == 1 or len(small) < 2 * n_threads:
        work(todo)
        return
    work([e for e in todo if rows[e] > fair_share])
    run_in_threads(work, small, n_threads)


def run_in_threads(work: Callable[[Iterable[int]], None], items: Sequence[int], n_threads: int) -> None:
    """Call `work` in `n_threads` threads at once, each with an iterator that takes the next item until none is left.

    Operators in these threads are single-threaded and run in inference mode. Returns, or raises, when no thread is at work any
    more; only a second interrupt ends the wait for the items that had begun.

    Raises:
        BaseException: What `work` raised in one of the threads, or KeyboardInterrupt.
    """
    queue, finished = deque(items), SimpleQueue[BaseException | None]()
    busy = [Lock() for _ in range(n_threads)]
    tasks = _team(n_threads)
    try:
        for lock in busy:
            tasks.put(partial(_run, work, queue, lock, finished))
        for _ in busy:
            error = finished.get()
            if error is not None:
                raise error
    except BaseException:
        queue.clear()
        for lock in busy:
            lock.acquire()  # waits for a worker that is busy, and keeps one that is not from beginning
        raise


def _run(
    work: Callable[[Iterable[int]], None], queue: deque[int], busy: Lock, finished: SimpleQueue[BaseException | None]
) -> None:
    """One worker's part of a call."""
    if not busy.acquire(blocking=False):
        return  # the caller was interrupted before this had begun
    error = None
    try:
        # In inference mode a worker may write to the tensors of a caller in any mode.
        with torch.inference_mode():
            work(_take(queue))
    except BaseException as raised:
        error = raised
    finally:
        busy.release()
    finished.put(error)


def _take(queue: deque[int]) -> Iterator[int]:
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return


def _team(n_threads: int) -> SimpleQueue[Task | None]:
    """The queue of a team of `n_threads` workers, which is started if there is none."""
    if n_threads not in _teams:
        ready = SimpleQueue[BaseException | None]()
        Thread(target=_start, args=(n_threads, ready), daemon=True).start()
        error = ready.get()
        if error is not None:
            raise error
    return _teams[n_threads]


def _start(n_threads: int, ready: SimpleQueue[BaseException | None]) -> None:
    """Start a team; in a thread of its own, so that no interrupt leaves the process with another default of threads."""
    error = None
    try:
        with _starting:
            if n_threads not in _teams:
                _start_workers(n_threads)
    except BaseException as raised:  # such as a limit on threads
        error = raised
    ready.put(error)


def _start_workers(n_threads: int) -> None:
    before, tasks, started = torch.get_num_threads(), SimpleQueue[Task | None](), SimpleQueue[None]()
    names = [f"lightning-mue-experts-{i}" for i in range(n_threads)]
    workers = [Thread(target=_serve, args=(tasks, started), name=name, daemon=True) for name in names]
    try:
        for worker in workers:
            worker.start()
    except BaseException:
        for _ in workers:
            tasks.put(None)  # ends a worker
        raise
    finally:
        for worker in workers:
            if worker.ident is not None:  # it was started
                started.get()
        torch.set_num_threads(before)  # the default for threads that start later, which the workers have lowered
    _teams[n_threads] = tasks


def _serve(tasks: SimpleQueue[Task | None], started: SimpleQueue[None]) -> None:
    """A worker's life."""
    torch.get_num_threads()  # a thread's first call resets its number of threads to the default
    # A threaded operator gives this worker OpenMP threads of its own, more in all than there are cores. OpenMP's threads, the
    # caller's too, then sleep soon after an operator, where they would spin for milliseconds and take cores from the workers
    # (libgomp's manual, GOMP_SPINCOUNT).
    torch.zeros(1 << 18)
    torch.set_num_threads(1)  # OpenMP and MKL keep it per thread
    started.put(None)
    for task in iter(tasks.get, None):
        task()
        del task  # which holds tensors of the call
