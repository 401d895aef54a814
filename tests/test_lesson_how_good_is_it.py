"""Notebook 12: its checks help a learner, its solutions hold, and its figures say what they show."""

import math

import pytest
import torch

from neox_lib.course.exercises import how_good_is_it as exercises
from neox_lib.course.figures import how_good_is_it as figures
from neox_lib.evaluation.likelihood import token_log_probabilities
from neox_lib.tokenizer import encode_text
from tests.lessons import Lesson

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
CHECKS = {
    "my_token_log_probabilities": exercises.token_log_probabilities,
    "my_pair_ids": exercises.pair_ids,
    "my_windows": exercises.windows,
    "my_standard_error": exercises.standard_error,
}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    """The notebook as far as solutions need it: nothing that scores whole tests."""
    lesson = Lesson("12_how_good_is_it")
    heavy = ("two", "all2", "last", "slide", "verdicts", "held", "boot", "se", "law", "strips", "intervals")
    lesson.cells = [cell for cell in lesson.cells if cell.id.removeprefix("n12_") not in heavy]
    return lesson


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_that_it_is_one(lesson, name):
    lesson.stub_is_told(CHECKS[name], name)


@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_solution_passes(lesson, name):
    result = CHECKS[name](lesson.solution(name))
    assert result.passed, result.message
    assert (exercises.PROMPT in result.message) == (name == "my_token_log_probabilities"), "the heart ends with stories"


SOLUTIONS = {
    "my_token_log_probabilities": """
def my_token_log_probabilities(model, input_ids):
    logits = model(input_ids[:, :-1])[..., : model.config.tokenizer_vocab_size].float()
    return logits.log_softmax(dim=-1).gather(-1, input_ids[:, 1:, None].long()).squeeze(-1)
""",
    "my_pair_ids": """
def my_pair_ids(tokenizer, context, continuation, begin):
    before = encode_text(tokenizer, context.rstrip())
    whole = encode_text(tokenizer, context + continuation)
    if not before:
        return [begin], whole
    return before, whole[len(before) :]
""",
    "my_windows": """
def my_windows(tokens, length, stride):
    start = 1
    while start < len(tokens):
        end = min(start + (length if start == 1 else stride), len(tokens))
        yield tokens[max(0, end - length - 1) : start], tokens[start:end]
        start = end
""",
    "my_standard_error": """
def my_standard_error(scores):
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return math.sqrt(variance / len(scores))
""",
}
# For each exercise a word of what the check should say: what is changed in the solution, and into what.
WRONG = {
    "my_token_log_probabilities": {
        "the logits at its own place": ("input_ids[:, 1:, None].long()", "input_ids[:, :-1, None].long()"),
        "take the logarithm": ("log_softmax", "softmax"),
        "got a share; keep the first": ("[..., : model.config.tokenizer_vocab_size]", ""),
        "the sign is wrong": ("return logits", "return -logits"),
        "in nats": (".squeeze(-1)", ".squeeze(-1) / math.log(2)"),
        "running sums": (".squeeze(-1)", ".squeeze(-1).cumsum(dim=1)"),
        "has [1, 2, 1]": (".squeeze(-1)", ""),
        "should be a tensor, but is a float": (".squeeze(-1)", ".sum().item()"),
        "should be a tensor, but is None": ("return logits", "logits"),
        "your code raised RuntimeError": ("[:, 1:, None]", "[:, 1:]"),
        "dice reads 3 tokens at most, but was given 4": (
            "model(input_ids[:, :-1])[..., :",
            "model(input_ids)[:, :-1, :",
        ),
    },
    "my_pair_ids": {
        "should be two lists of ids, but is None": ("    return before, whole[len(before) :]\n", ""),
        "'Once upon ', 'a time', begin=0) should be": (".rstrip()", ""),
        "encoded as one text": (
            "whole[len(before) :]",
            "encode_text(tokenizer, context[len(context.rstrip()) :] + continuation)",
        ),
        "cut after those of the context": ("whole[len(before) :]", "whole"),
        "the token `begin` stands for it": ("    if not before:\n        return [begin], whole\n", ""),
        "should be two lists of ids, but is a tuple": ("[begin], whole", "begin, whole"),
        "nothing special here": ("return before,", "return [begin, *before],"),
        "space alone is no context": ("if not before", "if not context"),
        "your code raised NameError": ("encode_text(tokenizer, context.rstrip())", "encode(context.rstrip())"),
    },
    "my_windows": {
        "token 0 has nothing before it": ("start = 1", "start = 0"),
        "token 4 is scored more than once": ("start = end", "start = end - 1 if end < len(tokens) else end"),
        "is never scored": ("        start = end\n", "        start = end + 1\n"),
        "but 5 fit: begin its context further back": ("max(0, end - length - 1)", "start - 1"),
        "the model reads all but the last, so 5 at most": ("end - length - 1", "end - length - 2"),
        "goes on after 100 pairs": ("        start = end\n", ""),
        "should end, but goes on": ("start = end", "start = min(end, len(tokens) - 1)"),
        "more than 2": ("length if start == 1 else stride", "length"),
        "fewer than 4": ("length if start == 1 else stride", "stride"),
        "has no context": ("tokens[max(0, end - length - 1) : start]", "[]"),
        "should give pairs (context, continuation) of tokens, but gives [0]": ("        yield", "        return"),
    },
    "my_standard_error": {
        "divide the squares by n - 1, not by n": (" / (len(scores) - 1)", " / len(scores)"),
        "divide by the square root of n": ("variance / len(scores)", "variance"),
        "this is its square": ("math.sqrt(variance / len(scores))", "variance / len(scores)"),
        "the square root of n divides, not n": (
            "math.sqrt(variance / len(scores))",
            "math.sqrt(variance) / len(scores)",
        ),
        "right and wrong answers only": (
            "variance = sum((score - mean) ** 2 for score in scores)",
            "variance = len(scores) * abs(mean * (1 - mean))",
        ),
        "should be a number, but is None": ("    return math", "    math"),
        "your code raised NameError": ("math.sqrt", "sqrt"),
    },
}


def message(name: str, source: str) -> str:
    names: dict = {"torch": torch, "math": math, "encode_text": encode_text}
    exec(source, names)
    result = CHECKS[name](names[name])
    assert not result.passed, source
    return result.message


@pytest.mark.parametrize(("name", "told"), [(name, told) for name, tries in WRONG.items() for told in tries])
def test_a_wrong_try_is_told_what_failed_and_on_which_input(name, told):
    old, new = WRONG[name][told]
    assert old in SOLUTIONS[name]
    said = message(name, SOLUTIONS[name].replace(old, new, 1))
    assert told in said and f"{name}(" in said, said


def test_the_story_is_chosen_by_the_learners_own_code():
    """Else it would be no reward."""
    said = [
        exercises.chosen_story(token_log_probabilities),
        exercises.chosen_story(lambda model, ids: -token_log_probabilities(model, ids)),
    ]
    arrows = [next(line for line in text.splitlines() if line.startswith("->"))[9:] for text in said]
    assert arrows[0] != arrows[1] and all(exercises.PROMPT in arrow for arrow in arrows)


def test_a_figure_says_what_it_shows():
    """What a reader sees, a screen reader tells."""
    picture = figures.strips(18, 8, 4)
    assert "18 tokens in 4 passes" in picture.alt and "reads at least 5 before them" in picture.alt
    hatched = [patch for patch in picture.figure.axes[0].patches if patch.get_hatch()]
    assert len(hatched) == 17, "every token but the first is scored once"
    two = {"a": {"x": (0.5, 0.01), "y": (0.51, 0.01)}, "b": {"x": (0.5, 0.01), "y": (0.6, 0.01)}}
    assert figures.intervals(two).alt.startswith("Some intervals do not overlap")
    assert figures.intervals({"a": two["a"]}).alt.startswith("All intervals overlap")
    assert "owl, in" not in figures.surprise_bars(["an", " owl"], [1.0, 3.0]).alt
    assert "The highest, 3.0, is that of owl" in figures.surprise_bars(["an", " owl"], [1.0, 3.0]).alt
