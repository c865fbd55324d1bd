"""One function over many jobs: on processes of this machine or on a Dask cluster, with the same results."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from htr_pipeline.core.config import UserError
from htr_pipeline.core.threads import num_cores

Job = TypeVar("Job")
Result = TypeVar("Result")

_CONNECT_SECONDS = 20.0
_CHECK_SECONDS = 10.0


def map_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    num_workers: int | None = None,
    dask_address: str | None = None,
) -> Iterator[Result]:
    """Results in the order of the jobs, of which at most two a worker are under way, so that memory stays bounded.

    Args:
        function: defined at the top of a module, which every worker can import.
        jobs: arguments; taken one by one as workers become free.
        num_workers: processes of this machine; None for all cores.
        dask_address: of a Dask scheduler, tcp://HOST:PORT; its workers do the jobs instead.

    Raises:
        UserError: the cluster cannot be reached or lost its workers, or a process died.
    """
    num_workers = num_workers or num_cores()
    if dask_address is None and num_workers == 1:
        yield from map(function, jobs)
        return
    with _dask_cluster(dask_address) if dask_address else _local_processes(num_workers) as (executor, size, check):
        pending: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                with _interrupts_later():  # a process that is started now shall not take Ctrl-C for itself
                    pending.append(executor.submit(function, job))
                if len(pending) == 2 * size:
                    yield _result(pending.popleft(), check)
            while pending:
                yield _result(pending.popleft(), check)
        finally:
            for future in pending:
                future.cancel()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Holds Ctrl-C back; processes that are started meanwhile never get it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(future: Future[Result], check: Callable[[], None]) -> Result:
    while not wait([future], timeout=_CHECK_SECONDS).done:
        check()
    return future.result()


@contextlib.contextmanager
def _local_processes(num_workers: int) -> Iterator[tuple[Executor, int, Callable[[], None]]]:
    # Spawned, not forked: TensorFlow in the parent does not survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_process) as pool:
            yield pool, num_workers, lambda: None
    except BrokenProcessPool as exc:
        raise UserError(
            f"One of {num_workers} processes was ended from outside, as happens where memory runs out. "
            "What was finished is kept: run again, with fewer processes (num_workers) if it happens again."
        ) from exc


def _start_process() -> None:
    import cv2

    cv2.setNumThreads(1)  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them: the parent ends the work, in order
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        if parent:
            parent.join()
            os._exit(1)

    # A parent that was killed cannot end its processes, and they would wait for jobs for ever.
    threading.Thread(target=follow_parent, daemon=True).start()


@contextlib.contextmanager
def _dask_cluster(address: str) -> Iterator[tuple[Executor, int, Callable[[], None]]]:
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError
    except ImportError as exc:
        raise UserError(
            f"dask_address = {address!r}: Dask is not installed here. `pip install distributed`, "
            "or dask_address: null for processes of this machine."
        ) from exc
    client: Any = None
    failure = ""
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as exc:
        failure = str(exc)
    if client is None:
        # Half a client, collected later in the thread that the next one starts, would stop that thread for ten seconds.
        gc.collect()
        raise UserError(
            f"dask_address = {address!r}: no Dask scheduler answers there ({failure}). Start one with "
            "`dask scheduler`, correct the address (tcp://HOST:PORT), or set null for processes of this machine."
        )

    def check_workers() -> None:
        if not client.nthreads():
            raise UserError(
                f"dask_address = {address!r}: the scheduler has no workers. Start some with `dask worker {address}`; "
                "what was finished is kept."
            )

    with client:
        with contextlib.suppress(TimeoutError):
            client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
        check_workers()
        try:
            yield client.get_executor(pure=False), sum(client.nthreads().values()), check_workers
        except (KilledWorker, CommClosedError, CancelledError) as exc:
            raise UserError(
                f"dask_address = {address!r}: the cluster lost a job ({exc}): its workers were ended from outside, as "
                "happens where memory runs out, or the scheduler went away. What was finished is kept: run again."
            ) from exc
        except ImportError as exc:
            raise UserError(
                f"dask_address = {address!r}: a worker cannot import what it needs ({exc}). Install this project on "
                "the workers, in the same version as here."
            ) from exc
