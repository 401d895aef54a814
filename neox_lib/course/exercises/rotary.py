"""The checks of notebook 02: angles, the quarter turn, and a head that is turned by its position."""

from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib import rotary
from neox_lib.course.checks import describe, exercise, numbers, require, require_equal, story_with
from neox_lib.course.figures.plots import seeded

HEAD, ROTARY = 96, 24  # 20B's


@exercise("rotary.rotary_angles")
def rotary_angles(yours: Callable[..., Tensor]) -> None:
    """Angles by hand, the order of the columns, fp32 for any positions, and the formula over the whole context."""
    hand = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    require_equal(yours(torch.tensor([0, 1]), 2), hand, "my_rotary_angles(positions [0, 1], rotary_ndims 2)", 1e-6)
    found = yours(torch.tensor([2]), 4, 100)
    what = "my_rotary_angles(positions [2], rotary_ndims 4, base 100)"
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    side_by_side = shape == (1, 4) and torch.allclose(found.float(), torch.tensor([[2.0, 2.0, 0.2, 0.2]]), atol=1e-4)
    order = "each angle stands beside its double; the second half should repeat the first: [2.0, 0.2, 2.0, 0.2]"
    require(not side_by_side, f"{what} is {numbers(found)}: {order}")
    require_equal(found, torch.tensor([[2.0, 0.2, 2.0, 0.2]]), what, 1e-3)
    for dtype in (torch.int64, torch.float16):
        found = yours(torch.arange(4, dtype=dtype), ROTARY)
        need = f"should be torch.float32 for positions in {dtype}, but are {found.dtype}"
        require(found.dtype == torch.float32, f"The angles {need}")
    exponents = torch.arange(0, ROTARY, 2, dtype=torch.float64) / ROTARY
    exact = torch.outer(torch.arange(2048, dtype=torch.float64), 10000**-exponents).repeat(1, 2)
    what = f"my_rotary_angles(positions 0 to 2047, rotary_ndims {ROTARY}) and the formula in float64"
    require_equal(yours(torch.arange(2048), ROTARY), exact, what, 1e-3)


@exercise("rotary.rotate_half")
def rotate_half(yours: Callable[[Tensor], Tensor]) -> None:
    """A quarter turn of pairs that stand half the width apart: by hand, twice, and with leading dimensions."""
    four = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found, what = yours(four.clone()), "my_rotate_half([1, 2, 3, 4])"
    neighbours = isinstance(found, Tensor) and found.shape == (4,) and found.tolist() == [-2.0, 1.0, -4.0, 3.0]
    reason = "those are neighbours turned, (1, 2) and (3, 4); the partners here are (1, 3) and (2, 4): [-3, -4, 1, 2]"
    require(not neighbours, f"{what} is [-2, 1, -4, 3]: {reason}")
    require_equal(found, torch.tensor([-3.0, -4.0, 1.0, 2.0]), what)
    x = seeded(2, 3, 10)
    what = "my_rotate_half of my_rotate_half of a [2, 3, 10] tensor, half a turn and so its negative,"
    require_equal(yours(yours(x.clone())), -x, what)
    require_equal(yours(x.clone()), rotary.rotate_half(x), "my_rotate_half of a [2, 3, 10] tensor and the library's")


@exercise("rotary.apply_rotary")
def apply_rotary(yours: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """The heart: shape, what passes through, who is whose partner, which way round, other sizes; then the story."""
    x = seeded(2, 3, 6, HEAD)
    cos, sin = rotary.rotary_table(6, ROTARY, 10000, x.device, x.dtype)
    given = x.clone()
    found, what = yours(given, cos, sin), f"my_apply_rotary(x [2, 3, 6, {HEAD}], cos and sin [6, {ROTARY}])"
    require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
    same = found.shape == x.shape
    lost = "" if same else f" Do the last {HEAD - ROTARY} numbers of a head come along?"
    require(same, f"{what} should have shape {list(x.shape)}, but has {list(found.shape)}.{lost}")
    require(torch.equal(given, x), f"{what} should leave x as it was, but has changed it: work on a copy")
    passed = torch.equal(found[..., ROTARY:], x[..., ROTARY:])
    require(passed, f"Dimensions {ROTARY} to {HEAD - 1} of a head should pass through unchanged, but some have changed")
    for dimension in (0, 5, 17):
        check_partner(yours, dimension, cos, sin)
    require_equal(found[:, :, 0], x[:, :, 0], "Position 0, whose angles are 0, and what went in", 1e-6)
    require_equal(found, rotary.apply_rotary(x, cos, sin), f"{what} and the library's", 1e-5)
    small, table = seeded(1, 2, 5, 32), rotary.rotary_table(5, 8, 10000, x.device, x.dtype)
    what = "my_apply_rotary(x [1, 2, 5, 32], cos and sin [5, 8]) and the library's"
    require_equal(yours(small, *table), rotary.apply_rotary(small, *table), what, 1e-5)
    return story_with(rotary.apply_rotary, yours, "apply_rotary")


def check_partner(yours: Callable, dimension: int, cos: Tensor, sin: Tensor) -> None:
    """A 1 in one dimension at position 5 may light up that dimension and its partner, the latter by +sin or -sin."""
    one = torch.zeros(1, 1, 6, HEAD)
    one[..., dimension] = 1
    found = yours(one, cos, sin)[0, 0, 5]
    partner = (dimension + ROTARY // 2) % ROTARY
    touched = found.nonzero().flatten().tolist()
    what = f"A 1 in dimension {dimension}, turned at position 5,"
    expected = sorted([dimension, partner])
    require(touched == expected, f"{what} should show in dimensions {expected}, but shows in {touched}")
    sign = 1 if dimension < partner else -1
    right = sign * sin[5, dimension].item()
    value = found[partner].item()
    wrong_way = abs(value + right) < 1e-5
    hint = ": it is turned the other way round" if wrong_way else ""
    require(abs(value - right) < 1e-5, f"{what} should give {right:.4f} in dimension {partner}, not {value:.4f}{hint}")
