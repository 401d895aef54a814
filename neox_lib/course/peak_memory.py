"""How much memory something needs while it runs."""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable

import psutil


def own_bytes() -> int:
    """Memory that belongs to this process alone on Linux, mapped files left out; elsewhere, all that it has in use."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def hand_back_free_memory() -> None:
    """Let the C library return what it keeps for later, where it can: else new numbers would fill it unseen."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while `work` runs, looked at every 2 ms by another thread."""
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
