"""How this package's Numba code is compiled."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba

# What is private to Numba here was checked with the version in requirements.lock.
# For functions that allocate nothing: without reference counts, calls with many arrays take half the time.
WITHOUT_COUNTS = {"_nrt": False}


def compiled(**options: Any) -> Callable[[Callable], Any]:
    """Decorator: compiled at the first call, without the interpreter lock, and kept on disk, if it can be written to.

    Args:
        options: further ones of numba.njit.
    """
    common: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True}  # C calls none of these functions

    def decorate(function: Callable) -> Any:
        try:
            dispatcher = numba.njit(**common, cache=True, **options)(function)
        except RuntimeError:  # neither the package nor the home folder can be written to
            return numba.njit(**common, **options)(function)
        keep = dispatcher._cache.save_overload

        def keep_if_possible(signature: Any, code: Any) -> None:
            with suppress(OSError):  # the disk is full
                keep(signature, code)

        dispatcher._cache.save_overload = keep_if_possible
        return dispatcher

    return decorate


@contextmanager
def without_collection() -> Iterator[None]:
    """For a first call: collecting garbage takes a tenth of the time to compile, and nearly all of the objects stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
