"""How much memory something needs while it runs."""

import threading
from collections.abc import Callable

import psutil


def own_bytes() -> int:
    """Memory that belongs to this process alone on Linux, mapped files left out; elsewhere, all that it has in use."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while `work` runs, looked at every 2 ms by another thread."""
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
