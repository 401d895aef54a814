"""The loop in a thread: Stop acts within one token in every round, nothing is lost, and no error goes unseen."""

import itertools
import threading
import time

import pytest

from neox_lib.generation import Step
from neox_lib.playground.streaming import Throttle, Worker, follow


def steps(count: int, seconds: float = 0.0):
    for number in range(count):
        time.sleep(seconds)
        yield Step([number], ["x"], [-1.0], seconds)


def test_every_step_is_taken_and_the_last_one_is_shown():
    """A throttle that swallows the last update leaves the page one word short."""
    taken, shown = [], []
    follow(steps(100), threading.Event(), lambda step: taken.append(step.token_id), lambda: shown.append(len(taken)))
    assert taken == list(range(100))
    assert shown[-1] == 100 and len(shown) < 20


def test_updates_come_at_a_pace_that_a_page_can_show():
    shown = []
    follow(steps(40, 0.005), threading.Event(), lambda step: None, lambda: shown.append(time.monotonic()))
    between = [later - earlier for earlier, later in itertools.pairwise(shown[:-1])]
    assert between and min(between) >= 0.049


def test_stop_ends_within_the_step_in_which_it_came():
    stopping, taken = threading.Event(), []

    def take(step):
        taken.append(step.token_id)
        if step.token_id == 3:
            stopping.set()

    follow(steps(1000), stopping, take, lambda: None)
    assert taken == [0, 1, 2, 3]


def test_what_was_written_is_shown_even_when_the_loop_breaks():
    def broken():
        yield from steps(2)
        raise RuntimeError("out of memory")

    shown = []
    with pytest.raises(RuntimeError):
        follow(broken(), threading.Event(), lambda step: None, lambda: shown.append(True))
    assert shown


def test_a_throttle_is_ready_at_once_and_then_after_its_pause():
    throttle = Throttle(per_second=20)
    assert throttle.ready() and not throttle.ready()
    time.sleep(0.06)
    assert throttle.ready()


def test_stop_works_in_the_second_and_in_the_tenth_round():
    """The famous bug: an event that is shared by all rounds, or one that is never cleared."""
    worker = Worker(lambda error: None)
    for _ in range(10):
        taken = []

        def job(stopping, taken=taken):
            follow(steps(10_000, 0.001), stopping, lambda step: taken.append(1), lambda: None)

        assert worker.start(job)
        while len(taken) < 2:
            time.sleep(0.001)
        worker.stop()
        assert worker.join(5)
        assert 2 <= len(taken) < 1000


def test_a_stop_that_comes_late_does_not_end_the_next_job():
    worker = Worker(lambda error: None)
    worker.start(lambda stopping: None)
    worker.join(5)
    worker.stop()
    seen = []
    worker.start(lambda stopping: seen.append(stopping.is_set()))
    worker.join(5)
    assert seen == [False]


def test_two_jobs_never_run_at_once():
    worker, go = Worker(lambda error: None), threading.Event()
    assert worker.start(lambda stopping: go.wait(5))
    assert not worker.start(lambda stopping: None)
    go.set()
    assert worker.join(5) and worker.start(lambda stopping: None)


def test_an_error_reaches_the_page_and_the_worker_is_free_again():
    errors = []
    worker = Worker(errors.append)

    def broken(stopping):
        raise RuntimeError("the disk is gone")

    worker.start(broken)
    worker.join(5)
    assert [str(error) for error in errors] == ["the disk is gone"]
    assert worker.start(lambda stopping: None)


def test_join_waits_for_the_job_that_the_end_of_another_starts():
    """Else a test, or a cell, reads the state before it is there."""
    done, more = [], [True]

    def second(stopping):
        time.sleep(0.05)
        done.append(True)

    worker = Worker(lambda error: None, lambda: more and more.pop() and worker.start(second))
    worker.start(lambda stopping: None)
    assert worker.join(5) and done == [True]
