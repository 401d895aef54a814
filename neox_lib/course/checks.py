"""Exercises: checking a learner's piece property by property, and the story that the model then writes with it."""

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from neox_lib.course.progress import EXERCISES, record
from neox_lib.course.series import progress as progress  # re-exported for notebooks

PROMPT = "Once upon a time"


class PropertyFailed(Exception):
    """A property does not hold; the message says which, on which input, what was expected and what was found."""


@dataclass(frozen=True)
class Result:
    """The result of a check. As a cell's last expression it displays its message."""

    passed: bool
    message: str

    def __repr__(self) -> str:
        return self.message


def require(holds: bool, failure: str) -> None:
    """Raise PropertyFailed with `failure` unless the property holds."""
    if not holds:
        raise PropertyFailed(failure)


@contextlib.contextmanager
def given(what: str) -> Iterator[None]:
    """Within this context, what the learner's code raises is reported with `what`, the call and its input."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def require_equal(found, expected, what: str, tolerance: float = 0.0, why: str = "") -> None:
    """Raise PropertyFailed unless `found` equals `expected`: tensors in shape, then in values to within `tolerance`;
    anything else by ==.

    `what` names the property and the input, such as "rotate_half([1, 2, 3, 4])"; `why` says where to look.
    """
    why = f": {why}" if why else ""
    if isinstance(expected, torch.Tensor):
        require(isinstance(found, torch.Tensor), f"{what} should be a tensor, but is {describe(found)}")
        same = tuple(found.shape) == tuple(expected.shape)
        require(same, f"{what} should have shape {list(expected.shape)}, but has {list(found.shape)}")
        worst = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        if expected.numel() <= 12:
            require(worst <= tolerance, f"{what} should be {numbers(expected)}, but is {numbers(found)}{why}")
        else:
            near = f"be within {tolerance:g} of" if tolerance else "equal"
            told = f"{what} should {near} the expected values, but is off by up to {worst:.4g}"
            require(worst <= tolerance, f"{told}, {worst_place(found, expected)}{why}")
    else:
        require(found == expected, f"{what} should be {expected!r}, but is {found!r}{why}")


def worst_place(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Where two tensors of one shape differ most, and their values there."""
    place = (found.double() - expected.double()).abs().argmax()
    index = [int(each) for each in torch.unravel_index(place, expected.shape)]
    return f"at {index}: {found.flatten()[place].item():.4g}, not {expected.flatten()[place].item():.4g}"


def require_count(found, expected: int, what: str, reasons: Mapping[int, str]) -> None:
    """Raise PropertyFailed unless a count is right. `reasons` maps a difference, found less expected, to its cause."""
    require(isinstance(found, int | float), f"{what} should be a number, but is {describe(found)}")
    off = found - expected
    told = f"{what} should be {expected:,}, but is {found:,}, which is {abs(off):,} too {'many' if off > 0 else 'few'}"
    reason = reasons.get(off)
    require(off == 0, f"{told}: {reason}" if reason else told)


def left_out_or_twice(parts: Mapping[str, int]) -> dict[int, str]:
    """Reasons for `require_count`: each part (its name -> its size) left out, or counted twice; all parts of a size."""
    reasons: dict[int, str] = {}
    for name, size in parts.items():
        for off, what in ((-size, f"{name} left out"), (size, f"{name} counted twice")):
            reasons[off] = f"{reasons[off]}, or {what}" if off in reasons else what
    return reasons


def numbers(tensor: torch.Tensor) -> str:
    return str([round(value, 4) for value in tensor.double().flatten().tolist()])


def describe(value) -> str:
    name = type(value).__name__
    return "None (is there a return?)" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def exercise(key: str) -> Callable[[Callable], Callable[..., Result]]:
    """Make a check from a function that raises PropertyFailed, or returns a closing remark (a story, perhaps) or None.

    The check never raises: it tells a stub (NotImplementedError without arguments, which torch's own have) from a wrong
    try, names the property that failed, and reports any other error in the learner's code with its line and its input.
    The outcome is stored under `key`, but only for a learner's piece, whose name starts with `my`: the library's own
    pieces and bug exhibits are nobody's progress.
    """

    def decorate(check: Callable[..., str | None]) -> Callable[..., Result]:
        EXERCISES[key] = check.__module__

        @functools.wraps(check)
        def run(yours, *more) -> Result:
            try:
                remark = check(yours, *more)
            except PropertyFailed as failure:
                outcome, message = str(failure), f"Not yet. {failure}"
            except Exception as error:  # whatever the learner's code raises, the notebook continues
                if isinstance(error, NotImplementedError) and not error.args:
                    name = getattr(yours, "__name__", "your piece")
                    return Result(False, f"Not written yet: {name} is still a stub.")
                outcome, call = f"{type(error).__name__}: {error}", getattr(error, "__notes__", [])[:1]
                where = f"{call[0]}: your code" if call else "Your code"
                message = f"Not yet. {where} raised {outcome}{place_of_error(error)}"
            else:
                keep(key, yours, "passed")
                return Result(True, "Passed." + (f"\n\n{remark}" if remark else ""))
            keep(key, yours, outcome)
            return Result(False, message)

        return run

    return decorate


def keep(key: str, yours, outcome: str) -> None:
    if getattr(yours, "__name__", "").lower().startswith("my"):
        record("exercises", key, outcome)


def place_of_error(error: Exception) -> str:
    """Where an error arose in the learner's own code: the innermost line of it in the traceback, or nothing."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "ipykernel" in each.filename]
    return f" (line {frames[-1].lineno} of your cell: {frames[-1].line})" if frames else ""


@contextlib.contextmanager
def in_place_of(original: object, yours: object) -> Iterator[None]:
    """Within this context, every module of the library that holds `original` uses `yours`; then `original` is back."""
    places = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("neox_lib") and not module_name.startswith("neox_lib.course")
        for name, value in list(vars(module).items())
        if value is original
    ]
    for module, name in places:
        setattr(module, name, yours)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, original)


def story(prompt: str = PROMPT, tokens: int = 40) -> str:
    """The shipped model's greedy continuation, on the CPU in fp32, with whatever pieces the library holds."""
    from neox_lib.generation import greedy_generate_text, prompt_ids
    from neox_lib.loading import create_model, create_tokenizer

    tokenizer = create_tokenizer()
    model = create_model(device="cpu", dtype="float32")
    return greedy_generate_text(model, tokenizer, prompt, prompt_ids(tokenizer, prompt).shape[1] + tokens)


def require_same_story(written: str, expected: str, how: str) -> None:
    """Raise PropertyFailed, with both texts, unless the learner's version wrote what the library's writes."""
    told = (
        f"The shipped model wrote another story {how}:\n{written}\n\nWith the library's version it writes:\n{expected}"
    )
    require(written == expected, told)


def story_with(original: object, yours: object, what: str, prompt: str = PROMPT) -> str:
    """The closing remark for a piece: the story that the shipped model writes with the learner's version in place of
    the library's. Raises PropertyFailed if it differs from the story with the library's.
    """
    expected = story(prompt)
    with in_place_of(original, yours):
        written = story(prompt)
    require_same_story(written, expected, f"with your {what}")
    return f"The shipped model wrote this with your {what} in place of the library's:\n{written}"
