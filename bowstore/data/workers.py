"""Work beside other work: the same on many files, in this process or in spawned ones; and jobs in a thread ahead."""

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import TypeVar

from bowstore.errors import BowstoreError
from bowstore.plugins import Named, plugins_in_use, use_plugins

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int], None]
Work = Callable[[Job, Report], Result]  # one job; hears whom to report progress to
_POLL_SECONDS = 0.2


def worker_count(wanted: int | None, jobs: int, total_bytes: int, worth_bytes: int) -> int:
    """Processes for `jobs` files: as many as wanted, or one a core as long as each has `worth_bytes` to do."""
    most = wanted or min(len(os.sched_getaffinity(0)), total_bytes // worth_bytes)
    return max(1, min(most, jobs))


def run_jobs(
    work: Work[Job, Result], jobs: Sequence[Job], workers: int, advance: Report, *, kept: str = ""
) -> Iterator[Result]:
    """Yield `work(job, report)` of each job, in order.

    With more than one worker these are new processes. They know nothing of the caller's script (which is not run
    again), end with this process, and stop soon after an error or an interrupt here.

    Args:
        work: a function of a module, so that another process finds it; calls `report` with amounts done.
        jobs: what to do.
        workers: processes; 1 for none beside this one.
        advance: hears in this process what workers report.
        kept: what the message says of the work that is done, for example "finished shards are kept: ".

    Raises:
        BowstoreError: a worker died.
        Exception: the first that any job raises, whosever turn it is.
    """
    if workers == 1:
        yield from (work(job, advance) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads may hang
    done, stop = context.Value("q", 0), context.Event()
    start = partial(_start, done, stop, plugins_in_use())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start)
    heard = 0
    failed: list[Future[Result]] = []

    def note(future: Future[Result]) -> None:
        if not future.cancelled() and future.exception():
            failed.append(future)

    try:
        with _no_script():
            futures: list[Future[Result] | None] = [pool.submit(partial(_work, work), job) for job in jobs]
            for future in futures:
                assert future is not None
                future.add_done_callback(note)
        for place, future in enumerate(futures):
            assert future is not None
            while wait([future], timeout=_POLL_SECONDS).not_done or heard < done.value:
                if failed:
                    failed[0].result()
                now = done.value
                advance(now - heard)
                heard = now
            futures[place] = None  # so that a result's memory is its taker's
            yield future.result()
    except BrokenProcessPool as error:
        raise BowstoreError(
            f"a worker process died (out of memory, perhaps); {kept}run again with fewer workers than {workers}"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_script() -> Iterator[None]:
    """Hide the caller's script from new processes: they would run it again, and need nothing of it."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


class _Stopped(Exception):
    """The main process wants no more."""


_in_worker: tuple["Synchronized[int]", Event] | None = None


def _start(done: "Synchronized[int]", stop: Event, plugins: Named) -> None:
    global _in_worker
    _in_worker = done, stop
    use_plugins(plugins)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A worker whose parent was killed would wait for its next job for ever.
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _work(work: Work[Job, Result], job: Job) -> Result:
    assert _in_worker, "the pool's initializer has run"
    done, stop = _in_worker

    def report(amount: int) -> None:
        if stop.is_set():
            raise _Stopped
        with done.get_lock():
            done.value += amount

    return work(job, report)


def prefetched(jobs: Iterable[Callable[[], Result]], depth: int) -> Iterator[Result]:
    """Make and run the jobs in one background thread, keeping up to `depth` results ready, in order."""
    source = iter(jobs)

    def work() -> list[Result]:  # empty at the end
        return [job() for job in islice(source, 1)]

    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[list[Result]]] = deque()
        try:
            while True:
                while len(waiting) <= depth:
                    waiting.append(pool.submit(work))
                result = waiting.popleft().result()
                if not result:
                    return
                yield result[0]
        finally:
            for future in waiting:
                future.cancel()
