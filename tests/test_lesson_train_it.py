"""Notebook 10: its checks help a learner, its solutions hold, and each wrong training is caught where it says so."""

import json
import math
import re

import pytest
import torch

from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.course.exercises import train_it as exercises
from neox_lib.course.figures import train_it as figures
from tests.lessons import Lesson

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return Lesson("10_train_it")


CHECKS = {
    "my_next_token_loss": exercises.next_token_loss,
    "my_learning_rate_at": exercises.learning_rate,
    "my_adamw_step": exercises.adamw_step,
    "my_training_days": exercises.training_days,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_kindly_and_the_solution_passes(lesson, name):
    """Otherwise a learner would be stuck at a check that no one can pass, or the heart would end without its text."""
    assert CHECKS[name](lesson.stub(name)).message == f"Not written yet: {name} is still a stub."
    result = CHECKS[name](lesson.solution(name))
    assert result.passed, result.message
    assert (exercises.PROMPT in result.message) == (name == "my_adamw_step"), (
        "the heart ends with what its model writes"
    )


LOSS = """
def my_next_token_loss(logits, windows):
    targets = windows[:, 1:]
    logarithms = logits.float().log_softmax(dim=-1)
    return -logarithms.gather(-1, targets[..., None]).mean()
"""
WRONG_LOSSES = {  # a word of what the check should say: what is changed in LOSS, and into what
    "judged by the token that it has read": ("windows[:, 1:]", "windows[:, :-1]"),
    "the wrong way round": ("windows[:, 1:]", "windows[:, :-1].roll(1, 1)"),
    "this is the sum over the positions": (".mean()", ".sum()"),
    "should be one number, but has shape [1, 4, 1]": (".mean()", ""),
    "change the sign": ("return -", "return "),
    "these are the scores": ("log_softmax(dim=-1)", "mul(1)"),
    "this is in bits": ("log_softmax(dim=-1)", "log_softmax(dim=-1) / 0.6931472"),
    "log_softmax and cross_entropy take care of that": ("log_softmax(dim=-1)", "softmax(dim=-1).log()"),
    "has no gradient": ("logits.float()", "logits.detach()"),
    "should be a tensor, but is a float": (".mean()", ".mean().item()"),
    "should be a tensor, but is None (is there a return?)": ("    return -", "    -"),
    "your code raised RuntimeError": ("windows[:, 1:]", "windows[:, 1:].float()"),
    "five equal scores cost ln 5 each": ("dim=-1)\n", "dim=1)\n"),
}


@pytest.mark.parametrize("told", WRONG_LOSSES)
def test_a_wrong_loss_is_told_what_failed(told):
    """Each of these trains something, and most of them look like a loss."""
    old, new = WRONG_LOSSES[told]
    assert old in LOSS
    names: dict = {"torch": torch}
    exec(LOSS.replace(old, new, 1), names)
    result = exercises.next_token_loss(names["my_next_token_loss"])
    assert not result.passed and told in result.message and "my_next_token_loss" in result.message, result.message


RATE = """
def my_learning_rate_at(step, steps, warmup_steps, highest):
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return highest * (1 + math.cos(math.pi * progress)) / 2
"""
WRONG_RATES = {
    "the first step takes one part in ten": ("(step + 1) / warmup_steps", "step / warmup_steps"),
    "count its progress from the end of the warm-up": ("(step - warmup_steps) / max", "step / max"),
    "half of the way from step 10 to step 100": ("math.cos(math.pi * progress)", "1 - 2 * progress**2"),
    "the cosine begins at the highest rate": ("1 + math", "1 - math"),
    "at the last step the rate is nearly 0": ("/ max(1, steps - warmup_steps)", "/ 90 * (step <= 55)"),
    "the rate is a share of `highest`": ("return highest * (1 + m", "return 1.0 * (1 + m"),
    "your code raised ZeroDivisionError": ("if step < warmup_steps", "if step == 0 or step < warmup_steps"),
    "should be a number, but is None (is there a return?)": ("    return highest * (1", "    highest * (1"),
}


@pytest.mark.parametrize("told", WRONG_RATES)
def test_a_wrong_learning_rate_is_told_what_failed(told):
    old, new = WRONG_RATES[told]
    assert old in RATE
    names: dict = {"math": math}
    exec(RATE.replace(old, new, 1), names)
    result = exercises.learning_rate(names["my_learning_rate_at"])
    assert not result.passed and told in result.message, result.message
    assert re.search(r"my_learning_rate_at\(\d+, steps=\d+, warmup_steps=\d+, highest=", result.message)


ADAMW = """
def my_adamw_step(weight, gradient, mean, square, step, rate, decay):
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.95 * square + 0.05 * gradient**2
    m, s = mean / (1 - 0.9**step), square / (1 - 0.95**step)
    return weight - rate * decay * weight - rate * m / (s.sqrt() + 1e-8), mean, square
"""
WRONG_STEPS = {
    "it moves uphill": ("weight - rate * m", "weight + rate * m"),
    "neither average is corrected": ("mean / (1 - 0.9**step), square / (1 - 0.95**step)", "mean, square"),
    "the square's average is not corrected": ("square / (1 - 0.95**step)", "square"),
    "the gradient's average is not corrected": ("mean / (1 - 0.9**step)", "mean"),
    "the root of the square is missing": ("s.sqrt()", "s"),
    "the weight does not decay": (" - rate * decay * weight", ""),
    "decays by decay * weight": ("rate * decay", "decay"),
    "use the average of the gradients": ("rate * m /", "rate * gradient /"),
    "the step is that of SGD": (" / (s.sqrt() + 1e-8)", ""),
    "0.9 of the old one and 0.1 of the gradient": ("0.9 * mean + 0.1 * gradient", "0.9 * mean + gradient"),
    "0.05 of the gradient's square": ("gradient**2", "gradient"),
    "a division by 0: add 1e-8": (" + 1e-8", ""),
    "should be three tensors, weight, mean and square, but is a Tensor": (", mean, square\n", "\n"),
    "changes the mean that it was given": ("mean = 0.9 * mean + 0.1 * gradient", "mean.mul_(0.9).add_(0.1 * gradient)"),
    "your code raised NameError": ("rate * m /", "rate * moment /"),
    "the mean from my_adamw_step": ("mean, square\n", "m, s\n"),
}


@pytest.mark.parametrize("told", WRONG_STEPS)
def test_a_wrong_adamw_step_is_told_what_failed_and_trains_nothing(told):
    """Most of these train a model too, only worse: the loss alone would let them pass."""
    old, new = WRONG_STEPS[told]
    assert old in ADAMW
    names: dict = {"torch": torch}
    head, _, tail = ADAMW.rpartition(old) if old.endswith("\n") else ADAMW.partition(old)
    exec(head + new + tail, names)
    result = exercises.adamw_step(names["my_adamw_step"])
    assert not result.passed and told in result.message, result.message
    assert "my_adamw_step" in result.message and exercises.PROMPT not in result.message


def test_a_step_that_is_right_on_three_numbers_only_does_not_get_its_text():
    """The reward is for a step that trains: one that fails on matrices is told so."""

    def only_vectors(weight, gradient, mean, square, step, rate, decay):
        new = exercises.adamw(weight, gradient, mean, square, step, rate, decay)
        return new if weight.dim() == 1 else (weight, *new[1:])

    result = exercises.adamw_step(only_vectors)
    assert not result.passed and "40 steps of training with my_adamw_step should have the losses" in result.message


WRONG_DAYS = {
    "the 2 operations of a forward pass": "2 * n * t / (d * s) / 86_400",
    "backward alone": "4 * n * t / (d * s) / 86_400",
    "these are hours": "6 * n * t / (d * s) / 3600",
    "these are seconds": "6 * n * t / (d * s)",
    "the devices share the work": "6 * n * t / s / 86_400",
    "more devices take less time": "6 * n * t * d / s / 86_400",
    "6 operations per parameter and token, and": "6 * n + t / (d * s) / 86_400",
    "should be a number, but is None": "None",
    "your code raised ZeroDivisionError": "6 * n * t / (d // 2 * s) / 86_400",
}


@pytest.mark.parametrize("told", WRONG_DAYS)
def test_wrong_days_are_told_what_was_forgotten(told):
    result = exercises.training_days(eval(f"lambda n, t, d, s: {WRONG_DAYS[told]}"))
    assert not result.passed and told in result.message and "my_training_days(parameters=" in result.message


EXHIBITS = {
    "unshifted": {"held-out"},
    "leaking": {"no peeking"},
    "uncleared": {"clean"},
    "decaying": {"at rest"},
    "hot": {"never above"},
}


@pytest.mark.parametrize("name", EXHIBITS)
def test_a_wrong_training_is_caught_where_the_notebook_says_so(lesson, name):
    """The lesson of the museum is which check is blind: what the notebook's own table found has to be true."""
    assert any(re.search(rf"^(def )?{name}\b", source, re.MULTILINE) for source in lesson.exhibits())
    verdicts = lesson.names["verdicts"]
    assert {check for check, passed in verdicts.items() if not passed[name]} == EXHIBITS[name]
    assert all(passed["right"] for passed in verdicts.values())
    assert all(verdicts["falls"].values()), "the check that everybody looks at is blind to all of them"


def test_the_stored_run_is_that_of_the_command_in_the_notebook(lesson):
    """A reader compares their own run with it, row by row."""
    history = json.loads((SHIPPED_MODEL.parent / "five_minutes.json").read_text("utf-8"))
    (command,) = [cell.source for cell in lesson.cells if "neox_lib train notebooks/mine/my_run" in cell.source]
    assert [row["step"] for row in history] == list(range(0, 601, 100))
    assert f"--tokens {history[-1]['tokens']} " in command and f'--prompt "{exercises.PROMPT}"' in command
    assert all(row["sample"].startswith(exercises.PROMPT) for row in history)
    losses = [row["validation_loss"] for row in history]
    assert losses == sorted(losses, reverse=True)


def test_the_picture_of_samples_says_them_to_a_screen_reader():
    history = [{"step": step, "validation_loss": 7.5 - step / 100, "sample": f"Tim ran {step}"} for step in (0, 100)]
    assert "Step 0, loss 7.50: ran 0 Step 100, loss 6.50: ran 100" in figures.samples_over_time(history, "Tim").alt
