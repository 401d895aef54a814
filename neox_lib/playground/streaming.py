"""The loop in a thread: the page stays responsive while text is written, is updated at its own pace, and can stop it.

Built in notebook 07.
"""

import threading
import time
from collections.abc import Callable, Iterator

from neox_lib.generation import Step


class Throttle:
    """Says when it is time to show something again: at most `per_second` times per second."""

    def __init__(self, per_second: float = 20):
        self.pause = 1 / per_second  # seconds
        self.last = float("-inf")

    def ready(self) -> bool:
        """True for the first call, and then once the pause since the last True is over."""
        now = time.monotonic()
        if now - self.last < self.pause:
            return False
        self.last = now
        return True


def follow(
    steps: Iterator[Step], stopping: threading.Event, take: Callable[[Step], None], show: Callable[[], None]
) -> None:
    """Pass every step to `take`, and call `show` now and then and once at the end, whatever ends it.

    Returns after the step during which `stopping` was set: no further token is computed. Drawing takes longer than a
    token of a small model, so `show` is called at most 20 times per second, while no step is lost.
    """
    throttle = Throttle()
    try:
        for step in steps:
            take(step)
            if stopping.is_set():
                break
            if throttle.ready():
                show()
    finally:
        show()


class Worker:
    """Runs one job at a time in its own thread, so that the caller is free at once.

    A job gets the Event that asks it to stop. What it raises goes to `on_error`, since nobody else would see it;
    `on_end` is called when the worker is free for the next job.
    """

    def __init__(self, on_error: Callable[[Exception], None], on_end: Callable[[], None] = lambda: None):
        self.on_error, self.on_end = on_error, on_end
        self.lock = threading.Lock()
        self.busy = False
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, job: Callable[[threading.Event], None]) -> bool:
        """Run `job` in a new thread; False, and nothing happens, while another one runs."""
        with self.lock:
            if self.busy:
                return False
            self.busy = True
            self.stopping = threading.Event()  # each job has its own: a late Stop ends the job it was meant for
            self.thread = threading.Thread(target=self._run, args=(job, self.stopping), daemon=True)
            self.thread.start()
            return True

    def _run(self, job: Callable[[threading.Event], None], stopping: threading.Event) -> None:
        try:
            job(stopping)
        except Exception as error:  # a thread would print it where no page shows it
            self.on_error(error)
        finally:
            self.busy = False
            self.on_end()

    def stop(self) -> None:
        """Ask the running job to end; harmless when none runs."""
        self.stopping.set()

    def join(self, seconds: float | None = None) -> bool:
        """Wait until no job runs, not even one that `on_end` starts; False when `seconds` were not enough."""
        end = None if seconds is None else time.monotonic() + seconds
        while (thread := self.thread) is not None and thread.is_alive():
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            if end is not None and time.monotonic() >= end:
                return not self.busy
        return True
