"""Work spread over processes, results in order; no worker outlives the run, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

AHEAD = 2
"""Items under way for each process: enough to keep it busy, few enough to keep memory flat."""


def map_in_order[T, R](work: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """The results of `work` in the order of the items, over so many processes; with 1, in this one.

    Raises ValueError where the system ends a worker.
    """
    if processes == 1:
        yield from map(work, items)
        return
    # A fresh interpreter: threads and locks of this one do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin_worker)
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) >= AHEAD * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of --processes {processes} was ended by the system, as when memory runs out; "
            "the same command goes on from here, with fewer processes if need be"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
