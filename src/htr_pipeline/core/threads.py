"""Threads for compiled code that releases the interpreter lock."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def thread_pool() -> ThreadPoolExecutor:
    """One thread for every core, shared by all callers and started at the first call."""
    return ThreadPoolExecutor(num_cores(), thread_name_prefix="ctc")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=thread_pool.cache_clear)  # threads do not survive a fork
