"""The exercises of notebook 07: drawing a stream, following one, and showing whole characters."""

import threading
import time
from collections.abc import Callable, Iterator

from neox_lib.course.checks import exercise, given, require, require_equal, require_same_story, story
from neox_lib.generation import Step, prompt_ids, stream_generate
from neox_lib.loading import create_model, create_tokenizer

PROMPT = "Once upon a time, there was a brave little mouse"
TEXTS = ["fox", "né", "a 🦊!", "狐狸", ""]


def counting_steps(count: int, seconds: float = 0.0, read: list[int] | None = None) -> Iterator[Step]:
    """Steps with token ids 0, 1, 2 and so on; each takes `seconds`, and `read` collects those that were asked for."""
    for number in range(count):
        time.sleep(seconds)
        if read is not None:
            read.append(number)
        yield Step([number], [f" {number}"], [-1.0], seconds)


@exercise("prompt_playground.stream")
def stream(yours: Callable[[Iterator[Step], Callable[[str], None]], str]) -> str:
    """`yours(steps, draw)` draws all text so far after each step, before it asks for the next, and returns the text."""
    what, words = "my_stream on steps ' 0', ' 1', ' 2'", [" 0", " 0 1", " 0 1 2"]
    drawn, read = [], []

    def draw(text: str) -> None:
        drawn.append((text, len(read)))

    with given(what):
        found = yours(counting_steps(3, read=read), draw)
    texts = [text for text, _ in drawn]
    require(texts != [" 0", " 1", " 2"], f"{what} draws each piece alone: draw all the text so far")
    require(texts != ["", " 0", " 0 1"], f"{what} draws before it adds the new piece: add first, then draw")
    require(texts == words, f"{what} should draw {words}, one after the other, but draws {texts}")
    early = [count for _, count in drawn]
    told = f"{what} should draw after each step, but asks for {early[0]} steps before it draws the first"
    require(early == [1, 2, 3], f"{told}: a reader waits for them all")
    require_equal(found, words[-1], f"what {what} returns")
    with given("my_stream on no steps at all"):
        require_equal(yours(iter([]), draw), "", "what my_stream returns for no steps at all")
    return "Each token is drawn before the next one is made. Run the cell below, and press Generate."


def every_step_is_taken(follow: Callable) -> None:
    """200 steps go in, 200 tokens must come out, in order."""
    taken: list[int] = []
    follow(counting_steps(200), threading.Event(), lambda step: taken.append(step.token_id), lambda: None)
    require(len(taken) == 200, f"take should be called with each of 200 steps, but was called {len(taken)} times")
    wrong = next((place for place, token_id in enumerate(taken) if token_id != place), 0)
    told = f"take should get the 200 steps in order, but call {wrong} got step {taken[wrong]}"
    require(taken == list(range(200)), told)


def the_end_is_shown(follow: Callable) -> None:
    """Whatever ends the stream, even an error, the page must then show every step that was taken."""
    taken, shown = [], []
    follow(counting_steps(30), threading.Event(), lambda step: taken.append(1), lambda: shown.append(len(taken)))
    last = shown[-1] if shown else 0
    require(last == 30, f"after a stream of 30 steps the page should show all 30, but the last show came after {last}")

    def breaks() -> Iterator[Step]:
        yield from counting_steps(5)
        raise MemoryError

    taken.clear()
    shown.clear()
    try:
        follow(breaks(), threading.Event(), lambda step: taken.append(1), lambda: shown.append(len(taken)))
    except MemoryError:
        last = shown[-1] if shown else 0
        require(last == 5, f"a stream that breaks after 5 steps should leave all 5 on the page, but it shows {last}")
    else:
        require(False, "a MemoryError in the stream should reach the caller, but was swallowed")


def stop_acts_within_one_step(follow: Callable) -> None:
    """Stop is pressed during step 3: that step is kept, and no further one is computed."""
    stopping, taken, read = threading.Event(), [], []

    def take(step: Step) -> None:
        taken.append(step.token_id)
        if step.token_id == 3:
            stopping.set()

    follow(counting_steps(50, read=read), stopping, take, lambda: None)
    require(len(taken) >= 4, f"Stop came during step 3, which had been computed: take should get it, but got {taken}")
    require(len(read) == 4, f"Stop came during step 3: no further step should be computed, but {len(read) - 4} were")


def updates_are_few(follow: Callable) -> None:
    """3,000 quick steps are not shown 3,000 times, but at most 20 times per second, and a few more at start and end."""
    shown: list[int] = []
    started = time.monotonic()
    follow(counting_steps(3000), threading.Event(), lambda step: None, lambda: shown.append(1))
    allowed = 3 + 20 * (time.monotonic() - started)
    told = f"3,000 quick steps should be shown at most 20 times per second, here {allowed:.0f} times"
    require(len(shown) <= allowed, f"{told}, but show was called {len(shown)} times")


FOLLOW_CHECKS = {
    "every step is taken": every_step_is_taken,
    "the end is shown": the_end_is_shown,
    "stop acts within one step": stop_acts_within_one_step,
    "updates are few": updates_are_few,
}


@exercise("prompt_playground.follow")
def follow(yours: Callable) -> str:
    """The four properties, then a story of the shipped model that streams through the learner's version."""
    for name, check in FOLLOW_CHECKS.items():
        with given(f"On the steps of the check {name!r}"):
            check(yours)
    model, tokenizer = create_model(device="cpu", dtype="float32"), create_tokenizer()
    texts: list[str] = [PROMPT]
    steps = stream_generate(model, prompt_ids(tokenizer, PROMPT), 40, tokenizer=tokenizer)
    yours(steps, threading.Event(), lambda step: texts.append(step.text), lambda: None)
    written = "".join(texts)
    require_same_story(written, story(PROMPT, 40), "through your follow")
    return f"The shipped model's story, streamed through your follow:\n{written}"


@exercise("prompt_playground.whole_characters")
def whole_characters(yours: Callable[[bytes], tuple[str, bytes]]) -> None:
    """UTF-8 texts, cut after each of their bytes: whole characters are returned, and the bytes of a part of one."""
    for text in TEXTS:
        raw = text.encode("utf-8")
        for cut in range(len(raw) + 1):
            expected = raw[:cut].decode("utf-8", "ignore")
            rest = raw[len(expected.encode("utf-8")) : cut]
            what = f"my_whole_characters({raw[:cut]!r})"
            with given(what):
                found = yours(raw[:cut])
            require(
                type(found) is tuple and len(found) == 2, f"{what} should be a pair, text and bytes, but is {found!r}"
            )
            require(
                "\ufffd" not in str(found[0]),
                f"{what} should show whole characters only, but shows half a character: {found[0]!r}",
            )
            require_equal(found[0], expected, f"the text of {what}")
            require_equal(found[1], rest, f"the bytes that {what} keeps for later")
