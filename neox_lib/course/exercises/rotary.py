"""The exercises of notebook 02: angles, the quarter turn, and heads turned by their positions."""

from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib import rotary
from neox_lib.course.checks import describe, exercise, given, numbers, require, require_equal, story_with
from neox_lib.course.figures.plots import seeded

HEAD, ROTARY = 96, 24  # 20B's
PROMPT = "One day, a girl named Mia"


@exercise("rotary.rotary_angles")
def rotary_angles(yours: Callable[..., Tensor]) -> None:
    """A few angles by hand, the order of the columns, fp32 for positions of any dtype, the formula over the context."""
    hand = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    with given(what := "my_rotary_angles(positions [0, 1], rotary_ndims 2)"):
        found = yours(torch.tensor([0, 1]), 2)
    require_equal(found, hand, what, 1e-6)
    with given(what := "my_rotary_angles(positions [2], rotary_ndims 4, base 100)"):
        found = yours(torch.tensor([2]), 4, 100)
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    side_by_side = shape == (1, 4) and torch.allclose(found.float(), torch.tensor([[2.0, 2.0, 0.2, 0.2]]), atol=1e-4)
    order = "each angle is next to its copy; the second half should repeat the first: [2.0, 0.2, 2.0, 0.2]"
    require(not side_by_side, f"{what} is {numbers(found)}: {order}")
    require_equal(found, torch.tensor([[2.0, 0.2, 2.0, 0.2]]), what, 1e-3)
    for dtype in (torch.int64, torch.float16):
        with given(what := f"my_rotary_angles(positions [0, 1, 2, 3] in {dtype}, rotary_ndims {ROTARY})"):
            found = yours(torch.arange(4, dtype=dtype), ROTARY)
        require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
        need = f"should be in torch.float32 for positions in {dtype}, but are in {found.dtype}"
        require(found.dtype == torch.float32, f"The angles of my_rotary_angles {need}")
    exponents = torch.arange(0, ROTARY, 2, dtype=torch.float64) / ROTARY
    exact = torch.outer(torch.arange(2048, dtype=torch.float64), 10000**-exponents).repeat(1, 2)
    what, why = f"my_rotary_angles(positions 0 to 2047, rotary_ndims {ROTARY})", "is every step of the formula in fp32?"
    require_equal(yours(torch.arange(2048), ROTARY), exact, what, 1e-3, why)


@exercise("rotary.rotate_half")
def rotate_half(yours: Callable[[Tensor], Tensor]) -> None:
    """A quarter turn of pairs half the width apart: of four numbers, twice in a row, and with leading dimensions."""
    with given(what := "my_rotate_half([1, 2, 3, 4])"):
        found = yours(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    neighbours = isinstance(found, Tensor) and found.shape == (4,) and found.tolist() == [-2.0, 1.0, -4.0, 3.0]
    reason = "it turns neighbours, (1, 2) and (3, 4), but the partners are (1, 3) and (2, 4)"
    require(not neighbours, f"{what} should be [-3, -4, 1, 2], but is [-2, 1, -4, 3]: {reason}")
    require_equal(found, torch.tensor([-3.0, -4.0, 1.0, 2.0]), what)
    x = seeded(2, 3, 10)
    with given(what := "my_rotate_half of a [2, 3, 10] tensor"):
        once = yours(x.clone())
        require_equal(once, rotary.rotate_half(x), what, why="only the last dimension is cut into halves")
        twice = yours(once)
    require_equal(twice, -x, "my_rotate_half applied twice, which is half a turn and negates a tensor,")


@exercise("rotary.apply_rotary")
def apply_rotary(yours: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Shape, the dimensions that pass through, partners, the direction of the turn, other sizes; then the story."""
    x = seeded(2, 3, 6, HEAD)
    cos, sin = rotary.rotary_table(6, ROTARY, 10000, x.device, x.dtype)
    x_given, what = x.clone(), f"my_apply_rotary(x [2, 3, 6, {HEAD}], cos and sin [6, {ROTARY}])"
    with given(f"{what}, where only the first {ROTARY} numbers of a head turn"):
        found = yours(x_given, cos, sin)
    require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
    same = found.shape == x.shape
    lost = "" if same else f" Are the last {HEAD - ROTARY} numbers of each head missing?"
    require(same, f"{what} should have shape {list(x.shape)}, but has {list(found.shape)}.{lost}")
    require(torch.equal(x_given, x), f"{what} should leave x unchanged, but has changed it: work on a copy")
    passed = torch.equal(found[..., ROTARY:], x[..., ROTARY:])
    require(passed, f"Dimensions {ROTARY} to {HEAD - 1} of a head should pass through unchanged, but some have changed")
    for dimension in (0, 5, 17):
        check_partner(yours, dimension, cos, sin)
    require_equal(found[:, :, 0], x[:, :, 0], "my_apply_rotary at position 0, where every angle is 0,", 1e-6)
    require_equal(found, rotary.apply_rotary(x, cos, sin), what, 1e-5)
    small, table = seeded(1, 2, 5, 32), rotary.rotary_table(5, 8, 10000, x.device, x.dtype)
    what = "my_apply_rotary(x [1, 2, 5, 32], cos and sin [5, 8])"
    with given(what):
        found = yours(small, *table)
    require_equal(found, rotary.apply_rotary(small, *table), what, 1e-5)
    return story_with(rotary.apply_rotary, yours, "apply_rotary", PROMPT)


def check_partner(yours: Callable, dimension: int, cos: Tensor, sin: Tensor) -> None:
    """A 1 in one dimension, turned at position 5, must reach its partner, as +sin or -sin, and no other dimension."""
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
    hint = ": it is turned the wrong way" if wrong_way else ""
    told = f"{what} should give {right:.4f} in dimension {partner}, but gives {value:.4f}{hint}"
    require(abs(value - right) < 1e-5, told)
