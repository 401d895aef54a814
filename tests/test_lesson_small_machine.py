"""Notebook 08: its exercises can be solved and failed, and the named checks catch its bug exhibits."""

import builtins

import numpy as np
import pytest
import torch
from torch import Tensor

from neox_lib.checkpoints.quantized import quantized_bytes
from neox_lib.config import NeoXConfig
from neox_lib.course.exercises import small_machine as exercises
from neox_lib.course.figures import small_machine as figures
from neox_lib.quantization.int8 import quantize_rows
from tests.lessons import Lesson

CHECKS = {
    "my_int8_row": exercises.int8_row,
    "my_quantize_rows": exercises.quantize_rows,
    "my_dequantize_groups": exercises.dequantize_groups,
    "my_int8_bytes": exercises.int8_bytes,
}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return Lesson("08_20b_on_a_small_machine")


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_that_it_is_one(lesson, name):
    lesson.stub_is_told(CHECKS[name], name)


@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_solution_passes(lesson, name):
    lesson.solution_passes(CHECKS[name], name, story=name != "my_int8_bytes")


def without_scale(numbers, scale, x):
    return sum(int(number) * one for number, one in zip(numbers, x, strict=True))


def returned_too_early(numbers, scale, x):
    total = np.float32(0)
    for i in range(len(x)):
        total += numbers[i] * x[i]
        return scale * total
    return total


def not_added_up(numbers, scale, x):
    total = np.float32(0)
    for i in range(len(x)):
        total = numbers[i] * x[i]
    return scale * total


def without_x(numbers, scale, x):
    total = np.float32(0)
    for i in range(len(x)):
        total += numbers[i]
    return scale * total


def scaled_each_time(numbers, scale, x):
    total = 0.0
    for i in range(len(x)):
        total += numbers[i] * x[i] * scale
    return total


def one_too_many(numbers, scale, x):
    total = np.float32(0)
    for i in range(len(x) + 1):
        total += numbers[i] * x[i]
    return scale * total


def all_products(numbers, scale, x):
    return numbers * x * scale


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (without_scale, "should be 12.7, but is 127: where is the scale?"),
        (returned_too_early, "is the return inside the loop?"),
        (not_added_up, "does += stand where the products are added"),
        (without_x, "where is x?"),
        (scaled_each_time, "the scale was used in 64 multiplications: apply it once"),
        (one_too_many, "my_int8_row([127, 0], 0.1, [1.0, 2.0]): your code raised IndexError"),
        (all_products, "should be one number, but is a ndarray"),
    ],
)
def test_a_wrong_loop_is_told_what_is_wrong(wrong, told):
    """Each mistake has its own message."""
    result = exercises.int8_row(wrong)
    assert not result.passed
    assert told in result.message, result.message


def test_a_loop_that_stops_at_64_numbers_writes_another_story():
    """The small inputs end there; the model's rows do not."""

    def first_64(numbers, scale, x):
        total = np.float32(0)
        for i in range(min(64, len(x))):
            total += np.float32(numbers[i]) * x[i]
        return scale * total

    result = exercises.int8_row(first_64)
    assert not result.passed and "another story with your loop" in result.message


def test_a_right_answer_passes_where_nothing_compiles_it(monkeypatch):
    """Numba refuses much that is right, and may be missing."""

    def with_sum(numbers, scale, x):
        return scale * sum(number * one for number, one in zip(numbers, x, strict=True))

    assert "in one of its matrices" in exercises.int8_row(with_sum).message
    importing = builtins.__import__

    def no_numba(name, *more, **named):
        if name.startswith("numba"):
            raise ImportError(name)
        return importing(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", no_numba)
    result = exercises.int8_row(with_sum)
    assert result.passed and "in one of its matrices" in result.message


def with_one_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().max() / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def with_128(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.float().abs().amax(dim=1) / 128).clamp(min=1e-30)
    return (weight.float() / scales[:, None]).round().clamp(-128, 127).to(torch.int8), scales


def without_rounding(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-30)
    return (weight.float() / (scales[:, None] * 0.99999)).clamp(-127, 127).to(torch.int8), scales


def zero_over_zero(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.float().abs().amax(dim=1)
    scales = torch.where(largest == 0, torch.nan, largest / 127)
    return (weight.float() / scales[:, None]).nan_to_num().round().to(torch.int8), scales


def in_its_own_precision(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30 if weight.dtype == torch.float32 else 6e-8)
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales.float()


def in_place(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-30)
    numbers = (weight.float() / scales[:, None]).round().to(torch.int8)
    weight.div_(2)
    return numbers, scales


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (with_one_scale, "should give scales of shape [1], but gives []"),
        (with_128, "should be the largest absolute value / 127"),
        (without_rounding, "so round first"),
        (zero_over_zero, "my_quantize_rows with a row of zeros gives a scale that is NaN"),
        (in_its_own_precision, "small weights in torch.float16"),
        (in_place, "changes its input"),
    ],
)
def test_a_wrong_quantization_is_told_what_is_wrong_and_writes_no_story(wrong, told):
    """A learner has to be told which property failed on which input, and a wrong try gets no story."""
    result = exercises.quantize_rows(wrong)
    assert not result.passed
    assert told in result.message, result.message
    assert "wrote this" not in result.message


def test_a_version_that_fits_the_checks_but_not_the_model_gets_no_story():
    """The story is a check too: it catches what was made for the small inputs only."""

    def small_inputs_only(weight: Tensor) -> tuple[Tensor, Tensor]:
        numbers, scales = exercises.library_quantize_rows(weight)
        return (numbers, scales) if len(weight) < 100 else (numbers.flip(0), scales)

    result = exercises.quantize_rows(small_inputs_only)
    assert not result.passed and "another story" in result.message


def values(nibbles: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    return (numbers * scales.float()[..., None]).flatten(1)


def without_eight(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values(nibbles, scales, torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float()).to(dtype)


def below_zero_in_uint8(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values(nibbles, scales, (torch.cat([nibbles & 15, nibbles >> 4], dim=-1) - 8).float()).to(dtype)


def high_one_first(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values(nibbles, scales, torch.cat([nibbles >> 4, nibbles & 15], dim=-1).float() - 8).to(dtype)


def neighbours(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(2).float() - 8
    return values(nibbles, scales, numbers).to(dtype)


def first_scale_for_all(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values(
        nibbles, scales[:, :1].expand_as(scales), torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float() - 8
    ).to(dtype)


def still_in_groups(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float() - 8
    return (numbers * scales.float()[..., None]).to(dtype)


def always_fp32(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values(nibbles, scales, torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float() - 8)


def scales_do_not_fit(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float() - 8) * scales[:, :, None, None]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (without_eight, "is 8 taken off each number?"),
        (below_zero_in_uint8, "uint8 has no negative numbers"),
        (high_one_first, "is the low nibble the first half of its group"),
        (neighbours, "cat, not stack"),
        (first_scale_for_all, "does each group have its own scale?"),
        (still_in_groups, "should have shape [1, 8], but has [1, 2, 4]"),
        (always_fp32, "should be in torch.float16"),
        (scales_do_not_fit, "should have shape [1, 8]"),
    ],
)
def test_a_wrong_reading_of_nibbles_is_told_what_is_wrong(wrong, told):
    result = exercises.dequantize_groups(wrong)
    assert not result.passed
    assert told in result.message, result.message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: -config.vocab_size * config.hidden_size, "1 byte per number instead of 2"),
        (lambda config: 4 * config.vocab_size, "scales counted for the embedding"),
        (lambda config: -2 * config.vocab_size * config.hidden_size, "the embedding, 2 bytes per number, left out"),
        (lambda config: -8 * config.hidden_size, "which is 1,536 too few: the last norm left out"),
        (lambda config: -3 * config.vocab_size, "one more token in the vocabulary should add 580 bytes, but adds 577"),
        (lambda config: 7 * config.num_hidden_layers, "one more layer should add"),
    ],
)
def test_a_wrong_count_is_told_which_part_is_off(change, told):
    """A bare difference of two large numbers helps nobody."""

    def wrong(config: NeoXConfig) -> int:
        return quantized_bytes(config) + change(config)

    result = exercises.int8_bytes(wrong)
    assert not result.passed
    assert told in result.message, result.message


@pytest.mark.parametrize(
    ("exhibit", "caught_by"),
    [
        ("cut_off", ["half_a_scale"]),
        ("wrapped_around", ["similar", "half_a_scale", "largest_keeps_its_sign"]),
        ("other_axis", ["half_a_scale", "a_scale_for_each_row"]),
    ],
)
def test_each_bug_exhibit_is_caught_by_the_checks_that_the_notebook_names(lesson, exhibit, caught_by):
    """The prose says who catches what; shape and dtype are blind to all three."""
    assert len(lesson.exhibits()) == 3
    caught = [check.__name__ for check in lesson.names["checks"] if not check(lesson.names[exhibit])]
    assert [name for name in caught if name != "similar"] == [name for name in caught_by if name != "similar"]
    assert "shape_and_dtype" not in caught
    if exhibit == "cut_off":
        assert "similar" not in caught


def test_what_the_figures_show_is_what_is_said_of_them():
    """Numbers that a learner checks by hand against the picture, and that a screen reader reads."""
    weights = torch.tensor([[1.27, -0.5], [0.0, 0.02]])
    assert "[1.27, -0.5] becomes [127, -50] times 0.01" in figures.int8_rows(weights, *quantize_rows(weights)).alt
    steps = figures.eight_at_once(list(range(16)), [1] * 16)
    assert list(steps.pictures) == ["1", "2", "the sum"]
    assert "[8, 10, 12, 14, 16, 18, 20, 22]" in steps.pictures["2"].alt and "gives 120" in steps.pictures["the sum"].alt
    assert "10011111" in figures.one_byte(7, 1).alt and "which is 159" in figures.one_byte(7, 1).alt
    curves = figures.bits_curve({"one scale": [0.2, 40.0]}, [8, 3])
    axes = curves.figure.axes[0]
    assert axes.get_yscale() == "log" and list(axes.lines[1].get_ydata()) == [1, 1]
    assert "8 bits +0.2, 3 bits +40.0" in curves.alt
    assert "Python 0.02, memory 25" in figures.reading_speeds({"Python": 2e7, "memory": 25e9}).alt
