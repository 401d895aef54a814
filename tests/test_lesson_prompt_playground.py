"""Notebook 07: every exercise is kind to a stub, fair to a solution, and tells wrong tries apart."""

import ipywidgets
import pytest

from neox_lib.course.checks import PropertyFailed
from neox_lib.course.exercises import prompt_playground as exercises
from neox_lib.course.figures import prompt_playground as figures
from neox_lib.playground.streaming import Throttle, follow
from tests.lessons import Lesson

CHECKS = {
    "my_stream": exercises.stream,
    "my_follow": exercises.follow,
    "my_whole_characters": exercises.whole_characters,
}


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


def draws_pieces(steps, draw):
    text = ""
    for step in steps:
        text += step.text
        draw(step.text)
    return text


def makes_all_first(steps, draw):
    text = ""
    for step in list(steps):
        text += step.text
        draw(text)
    return text


def draws_at_the_end(steps, draw):
    text = "".join(step.text for step in steps)
    draw(text)
    return text


def draws_too_early(steps, draw):
    text = ""
    for step in steps:
        draw(text)
        text += step.text
    return text


def returns_nothing(steps, draw):
    text = ""
    for step in steps:
        text += step.text
        draw(text)


def leaves_no_text_unbound(steps, draw):
    for step in steps:
        text = step.text if step.token_id == 0 else text + step.text  # noqa: F821
        draw(text)
    return text


def adds_the_step(steps, draw):
    text = ""
    for step in steps:
        text += step
    return text


def loop(after="stop show", end=True, swallow=False, top=False, throttled=True):
    """A follower from parts: what it does after `take`, and whether it shows at the end."""

    def following(steps, stopping, take, show):
        throttle = Throttle()
        try:
            for step in steps:
                if top and stopping.is_set():
                    break
                take(step)
                if "stop" in after and stopping.is_set():
                    break
                if "show" in after and (not throttled or throttle.ready()):
                    show()
        except MemoryError:
            if not swallow:
                raise
        finally:
            if end:
                show()

    return following


def takes_all_and_never_stops(steps, stopping, take, show):
    for step in steps:
        take(step)
    show()


def takes_ids(steps, stopping, take, show):
    for step in steps:
        take(step.token_id)
    show()


def first_byte(raw):
    return raw[:1].decode("utf-8"), raw[1:]


def waits_for_three(raw):
    cut = max(0, len(raw) - 3)
    return raw[:cut].decode("utf-8", "ignore"), raw[cut:]


def forgets_the_empty(raw):
    start = len(raw) - 1
    while 0x80 <= raw[start] <= 0xBF:
        start -= 1
    needed = 1 + (raw[start] >= 0xC0) + (raw[start] >= 0xE0) + (raw[start] >= 0xF0)
    cut = start if len(raw) - start < needed else len(raw)
    return raw[:cut].decode("utf-8"), raw[cut:]


def replaces(raw):
    return raw.decode("utf-8", "replace"), b""


def ignores(raw):
    return raw.decode("utf-8", "ignore"), b""


def text_alone(raw):
    return raw.decode("utf-8", "ignore")


def decodes_at_once(raw):
    return raw.decode("utf-8"), b""


WRONG = [
    ("my_stream", draws_pieces, "draws each piece alone"),
    ("my_stream", makes_all_first, "asks for 3 steps before it draws the first"),
    ("my_stream", draws_at_the_end, "but draws [' 0 1 2']"),
    ("my_stream", draws_too_early, "add first, then draw"),
    ("my_stream", returns_nothing, "what my_stream on steps ' 0', ' 1', ' 2' returns should be"),
    ("my_stream", leaves_no_text_unbound, "my_stream on no steps at all: your code raised UnboundLocalError"),
    ("my_stream", adds_the_step, "my_stream on steps ' 0', ' 1', ' 2': your code raised TypeError"),
    ("my_follow", takes_all_and_never_stops, "breaks after 5 steps"),
    ("my_follow", loop(throttled=False), "20 times per second"),
    ("my_follow", loop(end=False), "the last show came after 1"),
    ("my_follow", loop(after="show"), "no further step should be computed, but 46 were"),
    ("my_follow", loop(after="show", top=True), "no further step should be computed, but 1 were"),
    ("my_follow", loop(swallow=True), "should reach the caller"),
    ("my_follow", takes_ids, "On the steps of the check 'every step is taken': your code raised AttributeError"),
    ("my_whole_characters", replaces, "half a character"),
    ("my_whole_characters", ignores, "keeps for later"),
    ("my_whole_characters", text_alone, "should be a pair"),
    ("my_whole_characters", decodes_at_once, "raised UnicodeDecodeError"),
    ("my_whole_characters", first_byte, "the text of my_whole_characters(b'fo')"),
    ("my_whole_characters", waits_for_three, "the text of my_whole_characters(b'f')"),
    ("my_whole_characters", forgets_the_empty, "my_whole_characters(b''): your code raised IndexError"),
]


@pytest.mark.parametrize(("name", "wrong", "says"), WRONG)
def test_a_wrong_try_hears_which_property_failed_and_gets_no_story(name, wrong, says):
    result = CHECKS[name](wrong)
    assert not result.passed and says in result.message and "Once upon" not in result.message, result.message


def test_the_page_of_ten_lines_streams_also_after_the_whole_notebook_was_run(lesson, monkeypatch):
    """Its function reads names of the notebook: a later cell that takes one of them would silence the button."""
    names = lesson.names
    monkeypatch.setitem(names, "my_stream", lesson.solution("my_stream"))
    names["button"].click()
    prompt, shown = names["box"].value, names["page"]
    assert isinstance(shown, ipywidgets.HTML) and shown.value.startswith(prompt) and len(shown.value) > len(prompt) + 40


def test_the_timelines_show_what_the_text_says():
    """Stop waits only where the loop runs in the callback, and the last draw comes after the last token."""
    above, below = figures.who_waits().figure.axes
    assert [text.get_text() for text in above.texts].count("Stop waits") == 1
    assert not [text for text in below.texts if "waits" in text.get_text()]
    assert "The last 3 tokens come after" in figures.updates(token_ms=6, tokens=40, pause_ms=50).alt


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
