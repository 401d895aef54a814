"""Peak memory of a function call."""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable

import psutil


def own_bytes() -> int:
    """On Linux the memory private to this process, without mapped files; elsewhere all that it uses."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def hand_back_free_memory() -> None:
    """Make the C library return free memory where it can; new allocations would otherwise reuse it unnoticed."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(work: Callable[[], object]) -> int:
    """Peak growth of this process in bytes while `work` runs, sampled every 2 ms by another thread."""
    hand_back_free_memory()
    start, peak, done = own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak
