"""Notebook 08: its exercises can be solved and failed, and the named checks catch its bug exhibits."""

import pytest
import torch
from torch import Tensor

from neox_lib.checkpoints.quantized import quantized_bytes
from neox_lib.config import NeoXConfig
from neox_lib.course.exercises import small_machine as exercises
from tests.lessons import Lesson

CHECKS = {
    "my_int8_product": exercises.int8_product,
    "my_quantize_rows": exercises.quantize_rows,
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
    lesson.solution_passes(CHECKS[name], name, story=name == "my_quantize_rows")


def no_scales(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    return x @ numbers.float().T


def scales_on_the_matrix(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    return x @ (numbers.float() * scales[:, None]).T


def not_transposed(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    return (numbers.float() @ x.T) * scales[:, None]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (no_scales, "should be [12.7"),  # a small result is 6 numbers: they are shown
        (not_transposed, "should have shape [2, 3], but has [3, 2]"),
        (scales_on_the_matrix, "the scales were applied to the [48, 64] matrix"),
    ],
)
def test_a_wrong_product_is_told_what_is_wrong(wrong, told):
    """Each mistake has its own message."""
    result = exercises.int8_product(wrong)
    assert not result.passed
    assert told in result.message, result.message


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: -config.vocab_size * config.hidden_size, "1 byte per number instead of 2"),
        (lambda config: 4 * config.vocab_size, "scales counted for the embedding"),
        (lambda config: -2 * config.vocab_size * config.hidden_size, "the embedding, 2 bytes per number, left out"),
        (lambda config: -8 * config.hidden_size, "which is 1,536 too few: the last norm left out"),
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
