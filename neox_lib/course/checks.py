"""Exercises: checking a learner's piece property by property, and the story that the model then writes with it."""

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from neox_lib.course.progress import EXERCISES, record
from neox_lib.course.series import progress as progress  # re-exported for notebooks


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


def require_equal(found, expected, what: str, tolerance: float = 0.0) -> None:
    """Raise PropertyFailed unless `found` is `expected`: tensors to within `tolerance`, shapes first; else by ==.

    `what` names property and input, such as "rotate_half([1, 2, 3, 4])".
    """
    if isinstance(expected, torch.Tensor):
        require(isinstance(found, torch.Tensor), f"{what} should be a tensor, but is {describe(found)}")
        same = tuple(found.shape) == tuple(expected.shape)
        require(same, f"{what} should have shape {list(expected.shape)}, but has {list(found.shape)}")
        worst = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        few = expected.numel() <= 12
        detail = (
            f"be {numbers(expected)}, but is {numbers(found)}" if few else f"agree, but is off by up to {worst:.4g}"
        )
        require(worst <= tolerance, f"{what} should {detail}")
    else:
        require(found == expected, f"{what} should be {expected!r}, but is {found!r}")


def numbers(tensor: torch.Tensor) -> str:
    return str([round(value, 4) for value in tensor.double().flatten().tolist()])


def describe(value) -> str:
    return "None (is there a return?)" if value is None else f"a {type(value).__name__}"


def exercise(key: str) -> Callable[[Callable], Callable[..., Result]]:
    """Make a check from a function that raises PropertyFailed, or returns a closing remark (a story, perhaps) or None.

    The check never raises: for a stub (NotImplementedError) it says what is missing, for a wrong try which property
    failed, and any other error in the learner's code is reported with its line. The outcome is stored under `key`, but
    only for a learner's piece, whose name starts with `my`: the library's or a bug exhibit's result is nobody's
    progress.
    """

    def decorate(check: Callable[..., str | None]) -> Callable[..., Result]:
        EXERCISES[key] = check.__module__

        @functools.wraps(check)
        def run(yours, *more) -> Result:
            try:
                remark = check(yours, *more)
            except NotImplementedError:
                return Result(False, f"Not written yet: {getattr(yours, '__name__', 'your piece')} is still a stub.")
            except PropertyFailed as failure:
                outcome, message = str(failure), f"Not yet. {failure}"
            except Exception as error:  # whatever the learner's code raises, the notebook continues
                outcome = f"{type(error).__name__}: {error}"
                message = f"Not yet. Your code raised {outcome}{place_of_error(error)}"
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
    """Where an error arose in the learner's own code: the innermost of its lines in the traceback."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "ipykernel" in each.filename]
    return f" (line {frames[-1].lineno} of your cell: {frames[-1].line})" if frames else ""


@contextlib.contextmanager
def in_place_of(original: object, yours: object) -> Iterator[None]:
    """Within this context, every module of the library that holds `original` uses `yours`; afterwards all is
    restored.
    """
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


def story(prompt: str = "Once upon a time, a fox", tokens: int = 40) -> str:
    """The shipped model's greedy continuation, on the CPU in fp32, with the pieces now in the library."""
    from neox_lib.generation import greedy_generate_text, prompt_ids
    from neox_lib.loading import create_model, create_tokenizer

    tokenizer = create_tokenizer()
    model = create_model(device="cpu", dtype="float32")
    return greedy_generate_text(model, tokenizer, prompt, prompt_ids(tokenizer, prompt).shape[1] + tokens)


def story_with(original: object, yours: object, what: str) -> str:
    """The closing remark for a piece: the shipped model tells a story with the learner's version in place of the
    library's.

    Raises PropertyFailed when the story differs from the library's.
    """
    expected = story()
    with in_place_of(original, yours):
        written = story()
    require(written == expected, f"The shipped model wrote another story with your {what}:\n{written}")
    return f"The shipped model wrote this with your {what} in place of the library's:\n{written}"
