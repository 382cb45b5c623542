"""Work spread over processes, each with a simulator of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar('Result')


def in_workers(
    work: Callable[..., Result], jobs: Iterable[tuple], workers: int
) -> Iterator[Result]:
    """`work(*job)` for every job; can be pickled where there are workers.

    Args:
        work: what each does.
        jobs: its arguments.
        workers: processes; 0 works in this one.

    Yields:
        results: in order without workers, else as they come.
    """
    jobs = list(jobs)
    if not workers or not jobs:
        yield from (work(*job) for job in jobs)
        return
    # A forked renderer would share its parent's GL context, hence new interpreters.
    pool = ProcessPoolExecutor(workers, get_context('spawn'), initializer=_begin)
    try:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """One thread per worker, and Ctrl-C is the parent's: it lets started episodes end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ['OMP_NUM_THREADS'] = '1'
