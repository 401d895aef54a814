"""Notebook 02: its exercises judge rightly, the named checks catch its bug exhibits, its slider turns."""

import functools
import math

import pytest
import torch

import neox_lib.rotary
from neox_lib.course import checks
from neox_lib.course.exercises import rotary as exercises
from neox_lib.course.figures.rotary import Clock, TurningPair, clock, cosines_by_position, hands
from tests.lessons import Lesson


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    """What the notebook's cells bind. Its stories are left out: they take most of the time, and no test needs them."""
    lesson = Lesson("02_rotary_embeddings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "story", lambda prompt="", tokens=0: "(a story)")
        assert lesson.names
    return lesson


def side_by_side_angles(positions, rotary_ndims, base=10000):
    """GPT-J's order of columns."""
    speeds = base ** (-torch.arange(0, rotary_ndims, 2).float() / rotary_ndims)
    return torch.outer(positions.float(), speeds).repeat_interleave(2, dim=-1)


def angles_with_half_the_exponent(positions, rotary_ndims, base=10000):
    """Forgets the 2 in -2i/n: right for one pair, so that the smallest example passes."""
    speeds = base ** (-torch.arange(rotary_ndims // 2).float() / rotary_ndims)
    return torch.outer(positions.float(), speeds).repeat(1, 2)


def angles_in_the_positions_dtype(positions, rotary_ndims, base=10000):
    """Right for whole numbers; in fp16 as soon as the positions are."""
    speeds = base ** (-torch.arange(0, rotary_ndims, 2).float() / rotary_ndims)
    dtype = positions.dtype if positions.is_floating_point() else torch.float32
    return torch.outer(positions.to(dtype), speeds.to(dtype)).repeat(1, 2)


def angles_of_any_base(positions, rotary_ndims, base=10000):
    """Ignores `base`: right for 20B, and for every model until one has another base."""
    return neox_lib.rotary.rotary_angles(positions, rotary_ndims)


def angles_once(positions, rotary_ndims, base=10000):
    """Each angle once: half as many columns as the heads' turning numbers."""
    return neox_lib.rotary.rotary_angles(positions, rotary_ndims, base)[:, : rotary_ndims // 2]


def angles_by_matrix_product(positions, rotary_ndims, base=10000):
    """Raises: a product of two vectors is one number, not a table."""
    return positions.float() @ (base ** (-torch.arange(0, rotary_ndims, 2).float() / rotary_ndims))


def angles_rounded_on_the_way(positions, rotary_ndims, base=10000):
    """Returns fp32, but was formed in fp16: only the far end of the context shows it."""
    speeds = base ** (-torch.arange(0, rotary_ndims, 2).float() / rotary_ndims)
    return torch.outer(positions.half(), speeds.half()).float().repeat(1, 2)


def rotate_neighbours(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def swap_halves(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def rotate_the_first_dimension(x):
    first, second = x.chunk(2)
    return torch.cat([-second, first])


def rotate_by_flipping(x):
    return -x.flip(-1)


def rotate_as_a_list(x):
    half = len(x) // 2
    return [-each for each in x[half:]] + list(x[:half])


def rotate_the_other_way(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, -first], dim=-1)


def apply_without_the_rest(x, cos, sin):
    turned = x[..., : cos.shape[-1]]
    return turned * cos + neox_lib.rotary.rotate_half(turned) * sin


def apply_backwards(x, cos, sin):
    return neox_lib.rotary.apply_rotary(x, cos, -sin)


def apply_to_the_end_of_the_head(x, cos, sin):
    passed, turned = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    return torch.cat([passed, turned * cos + neox_lib.rotary.rotate_half(turned) * sin], dim=-1)


def apply_to_all(x, cos, sin):
    return x * cos + neox_lib.rotary.rotate_half(x) * sin


def apply_in_place(x, cos, sin):
    x[..., : cos.shape[-1]] = apply_without_the_rest(x, cos, sin)
    return x


WRONG = {
    "rotary_angles": {
        side_by_side_angles: "each angle is next to its copy",
        angles_with_half_the_exponent: "[2.0, 0.2, 2.0, 0.2], but is [2.0, 0.6325, 2.0, 0.6325]",
        angles_in_the_positions_dtype: "should be in torch.float32 for positions in torch.float16",
        angles_rounded_on_the_way: "off by up to 0.33",
        angles_of_any_base: "base 100) should be [2.0, 0.2, 2.0, 0.2], but is",
        angles_once: "should have shape [2, 2], but has [2, 1]",
        angles_by_matrix_product: "my_rotary_angles(positions [0, 1], rotary_ndims 2): your code raised RuntimeError",
    },
    "rotate_half": {
        rotate_neighbours: "it turns neighbours",
        swap_halves: "be [-3.0, -4.0, 1.0, 2.0], but is [3.0, 4.0, 1.0, 2.0]",
        rotate_the_first_dimension: "only the last dimension is cut into halves",
        rotate_by_flipping: "but is [-4.0, -3.0, -2.0, -1.0]",
        rotate_as_a_list: "should be a tensor, but is a list",
        rotate_the_other_way: "be [-3.0, -4.0, 1.0, 2.0], but is [3.0, 4.0, -1.0, -2.0]",
    },
    "apply_rotary": {
        apply_without_the_rest: "Are the last 72 numbers of each head missing?",
        apply_to_the_end_of_the_head: "Dimensions 24 to 95 of a head should pass through",
        apply_backwards: "it is turned the wrong way",
        apply_to_all: "where only the first 24 numbers of a head turn: your code raised RuntimeError",
        apply_in_place: "has changed it: work on a copy",
    },
}
TRIES = [(name, wrong, message) for name, tries in WRONG.items() for wrong, message in tries.items()]


@pytest.mark.parametrize("name", WRONG)
def test_a_stub_is_told_kindly(lesson, name):
    result = getattr(exercises, name)(lesson.stub(f"my_{name}"))
    assert not result.passed and result.message.startswith("Not written yet")


@pytest.mark.parametrize("name", WRONG)
def test_the_folded_solution_passes(lesson, name, monkeypatch):
    """A learner who unfolds it must not be told that it is wrong; the heart's ends with a story, here a short one."""
    monkeypatch.setattr(checks, "story", functools.partial(checks.story, tokens=10))
    result = getattr(exercises, name)(lesson.solution(f"my_{name}"))
    assert result.passed, result.message
    assert (exercises.PROMPT in result.message) == (name == "apply_rotary")


@pytest.mark.parametrize(("name", "wrong", "message"), TRIES, ids=[wrong.__name__ for _, wrong, _ in TRIES])
def test_a_wrong_try_is_told_which_property_failed(name, wrong, message):
    result = getattr(exercises, name)(wrong)
    assert not result.passed and message in result.message
    assert exercises.PROMPT not in result.message


def test_the_wrong_partners_get_no_story(lesson):
    """The trap of this chapter, in the learner's own piece."""
    result = exercises.apply_rotary(lesson.names["neighbour_pairs"])
    assert not result.passed and "should show in dimensions [0, 12], but shows in [0, 1]" in result.message


def test_each_bug_exhibit_is_caught_by_the_one_check_that_the_notebook_names(lesson):
    """The prose says so; the checks are run here again, with the exhibits as they stand in the cells tagged museum."""
    names, exhibits = dict(lesson.names), {}
    for source in lesson.exhibits():
        before = set(exhibits)
        exec(source, names, exhibits)
        assert len(set(exhibits) - before) == 1
    turning_with, checks = names["turning_with"], names["checks"]
    versions = {
        "short_text_by_formula": turning_with(apply=exhibits["neighbour_pairs"]),
        "distance_only_to_the_end": turning_with(angles=exhibits["half_precision_angles"]),
        "in_parts_as_in_one": turning_with(positions=exhibits["forgotten_start"]),
    }
    for expected, turn in versions.items():
        assert [check.__name__ for check in checks if not check(turn)] == [expected]
    assert all(check(turning_with()) for check in checks)


def test_the_sliders_turn_the_hands():
    """Both moved by the same number, the angle between the hands stays; one moved alone, it changes."""
    box = TurningPair(frequency=0.5).widget()
    query, key, dial = box.children
    first = dial.value
    query.value, key.value = 8, 6
    assert "query at 8, key at 6: 1.0 radians between the hands, score 0.54" in dial.value and dial.value != first
    key.value = 8
    assert "query at 8, key at 8: 0.0 radians between the hands, score 1.00" in dial.value


def test_the_slider_reads_without_a_kernel():
    """On paper and on the web there is no slider: the same output holds a picture with its description."""
    bundle = TurningPair()._repr_mimebundle_()
    assert {"text/html", "text/plain", "application/vnd.jupyter.widget-view+json"} <= bundle.keys()
    assert "query at 3, key at 1" in bundle["text/html"] and "query at 8, key at 6" in bundle["text/plain"]


def test_the_hands_point_where_the_formula_says():
    """The picture teaches the formula; a hand that goes the other way would teach another one."""
    axes = hands(((3, 1),), frequency=0.5).figure.axes[0]
    tips = [patch._posA_posB[1] for patch in axes.patches if hasattr(patch, "_posA_posB")]
    assert tips == [pytest.approx((math.cos(angle), math.sin(angle))) for angle in (1.5, 0.5)]


def test_the_slider_of_the_clock_turns_each_hand_by_its_own_frequency():
    position, dials = Clock({0: 1.0, 3: 0.1}, 2048).widget().children
    assert position.max == 2047
    position.value = 10
    assert "position 10: pair 0 1.59, pair 3 0.16" in dials.value
    bundle = Clock({0: 1.0, 3: 0.1}, 2048)._repr_mimebundle_()
    assert "position 0: pair 0 0.00" in bundle["text/plain"] and "position 10: pair 0 1.59" in bundle["text/plain"]


def test_the_clocks_hands_point_where_the_formula_says():
    first, second = clock({0: 1.0, 3: 0.1}, (5,)).figure.axes
    for axes, angle in ((first, 5.0), (second, 0.5)):
        (tip,) = [patch._posA_posB[1] for patch in axes.patches if hasattr(patch, "_posA_posB")]
        assert tip == pytest.approx((math.cos(angle), math.sin(angle)))


def test_the_map_of_the_hands_says_when_each_one_first_points_back():
    positions = torch.arange(1, 100)
    cosines = neox_lib.rotary.rotary_angles(positions, 4, 10000)[:, :2].cos().T
    assert "pair 0 at 2, pair 1 at none of these positions" in cosines_by_position(cosines, positions).alt
