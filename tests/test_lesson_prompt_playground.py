"""Notebook 07: every exercise is kind to a stub, fair to a solution, and tells wrong tries apart."""

import pytest

from neox_lib.course.checks import PropertyFailed
from neox_lib.course.exercises import prompt_playground as exercises
from neox_lib.playground.streaming import Throttle, follow
from tests.lessons import Lesson

CHECKS = {"my_follow": exercises.follow, "my_whole_characters": exercises.whole_characters}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return Lesson("07_prompt_playground")


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_kindly_and_the_solution_passes(lesson, name):
    assert "Not written yet" in CHECKS[name](lesson.stub(name)).message
    result = CHECKS[name](lesson.solution(name))
    assert result.passed, result.message


def test_the_heart_ends_with_a_story(lesson):
    assert "Once upon a time, there was a brave little mouse" in exercises.follow(lesson.solution("my_follow")).message


def takes_all_and_never_stops(steps, stopping, take, show):
    for step in steps:
        take(step)
    show()


def shows_every_step(steps, stopping, take, show):
    try:
        for step in steps:
            take(step)
            if stopping.is_set():
                break
            show()
    finally:
        show()


def test_wrong_tries_at_the_heart_fail_by_their_own_property_and_get_no_story():
    messages = [exercises.follow(wrong).message for wrong in (takes_all_and_never_stops, shows_every_step)]
    assert messages[0] != messages[1]
    assert "breaks after 5 steps" in messages[0] and "20 times per second" in messages[1]
    assert not any("Once upon" in message for message in messages)


def test_wrong_tries_at_whole_characters_fail_differently():
    replacing = exercises.whole_characters(lambda raw: (raw.decode("utf-8", "replace"), b""))
    ignoring = exercises.whole_characters(lambda raw: (raw.decode("utf-8", "ignore"), b""))
    assert "half a character" in replacing.message and "keeps for later" in ignoring.message
    assert not replacing.passed and not ignoring.passed


EXHIBITS = {
    "forgets_the_end": "the end is shown",
    "asks_before_it_takes": "stop acts within one step",
    "skips_between_updates": "every step is taken",
}


@pytest.mark.parametrize(("name", "caught_by"), EXHIBITS.items())
def test_each_bug_exhibit_is_caught_where_the_notebook_says(lesson, name, caught_by):
    names = {"Throttle": Throttle}
    (source,) = [source for source in lesson.exhibits() if f"def {name}(" in source]
    exec(source, names)
    with pytest.raises(PropertyFailed):
        exercises.FOLLOW_CHECKS[caught_by](names[name])
    exercises.FOLLOW_CHECKS["updates are few"](names[name])


@pytest.mark.parametrize("check", exercises.FOLLOW_CHECKS.values(), ids=exercises.FOLLOW_CHECKS)
def test_the_librarys_own_passes_every_check(check):
    check(follow)
