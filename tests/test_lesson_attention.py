"""Notebook 03: its exercises can be solved and can be failed, and the named checks catch its bug exhibits."""

import functools

import pytest
import torch
import torch.nn.functional as F

from neox_lib.course.exercises import attention as exercises
from neox_lib.course.figures import attention as figures
from tests.lessons import Lesson

CHECKS = {
    "my_causal_mask": exercises.causal_mask,
    "my_multi_head": exercises.multi_head,
    "my_split_heads": exercises.split_heads,
    "my_attention": exercises.attention,
}
BLIND = ["shape", "weights_sum_to_one", "no_future", "equal_to_sdpa"]
OTHERS = ["writes_the_story", "numbered_rows", "chunks", "large_in_fp16"]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def lesson() -> Lesson:
    return Lesson("03_attention")


def mask_from_the_corner(queries, keys, device):
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def mask_of_what_is_hidden(queries, keys, device):
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)


def mask_without_itself(queries, keys, device):
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries - 1)


def mask_with_rows_and_columns_swapped(queries, keys, device):
    return torch.ones(keys, queries, dtype=torch.bool, device=device).tril()


def mask_for_as_many_queries_as_keys(queries, keys, device):
    return torch.arange(keys) <= torch.arange(keys)[:queries, None] + 0 * torch.ones(keys, keys, dtype=torch.long)


def multi_head(head_columns, attend, join, multiply=torch.matmul):
    """A try at the exercise: which columns are a head's, what a head does, and how the heads' outputs are joined."""

    def my_multi_head(x, w_query, w_key, w_value, w_dense, num_heads):
        size, outputs = x.shape[-1] // num_heads, []
        for head in range(num_heads):
            columns = head_columns(head, size, num_heads)
            query, key, value = (multiply(x, matrix)[:, columns] for matrix in (w_query, w_key, w_value))
            outputs.append(attend(query, key, value, x.shape[-1]))
        return join(outputs, w_dense)

    return my_multi_head


def side_by_side(outputs, dense):
    return torch.cat(outputs, dim=-1) @ dense


def own_columns(head, size, num_heads):
    return slice(head * size, (head + 1) * size)


def causal(query, key, value, width, scale=None):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


MULTI_HEAD = {
    "no mask": (own_columns, lambda q, k, v, c: F.scaled_dot_product_attention(q, k, v), side_by_side),
    "root of C": (own_columns, lambda q, k, v, c: causal(q, k, v, c, scale=c**-0.5), side_by_side),
    "not divided": (own_columns, lambda q, k, v, c: causal(q, k, v, c, scale=1.0), side_by_side),
    "no dense": (own_columns, causal, lambda outputs, dense: torch.cat(outputs, dim=-1)),
    "one head": (lambda head, size, num_heads: slice(head and size * num_heads, None), causal, side_by_side),
    "every second column": (lambda head, size, num_heads: slice(head, None, num_heads), causal, side_by_side),
    "w @ x": (own_columns, causal, lambda o, dense: torch.cat(o, dim=-1) @ dense.T, lambda x, w: x @ w.T),
    "heads added": (own_columns, causal, lambda outputs, dense: sum(outputs) @ dense),
    "heads below each other": (own_columns, causal, lambda outputs, dense: torch.cat(outputs, dim=0)),
}


def split_into_thirds(qkv, num_heads):
    return [third.unflatten(-1, (num_heads, -1)).transpose(1, 2) for third in qkv.chunk(3, dim=-1)]


def split_with_tokens_first(qkv, num_heads):
    return qkv.unflatten(-1, (num_heads, -1)).chunk(3, dim=-1)


def split_in_the_order_of_values_first(qkv, num_heads):
    query, key, value = exercises.library.split_heads(qkv, num_heads)
    return value, key, query


def split_without_transposing(qkv, num_heads):
    """The right shape by a view: the tokens of one head land in others."""
    batch, tokens, width = qkv.shape
    return qkv.reshape(batch, num_heads, tokens, width // num_heads).chunk(3, dim=-1)


def attention_without_mask(query, key, value):
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value


def attention_without_division(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)


def attention_divided_by_size(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1 / query.shape[-1])


def attention_from_the_corner(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def attention_in_half_precision(query, key, value):
    return lesson().names["half_scores"](query, key, value)


def attention_over_the_wrong_axis(query, key, value):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    allowed = exercises.library.causal_mask(query.shape[-2], key.shape[-2], query.device)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-2) @ value


def attention_that_fills_with_too_low_a_number(query, key, value):
    """Right in fp32; -1e9 does not fit into fp16."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    allowed = exercises.library.causal_mask(query.shape[-2], key.shape[-2], query.device)
    return scores.masked_fill(~allowed, -1e9).softmax(-1) @ value


def attention_in_fp32_out(query, key, value):
    return exercises.library.attention_weights(query, key) @ value.float()


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_kindly(name):
    result = CHECKS[name](lesson().stub(name))
    assert not result.passed and result.message.startswith(f"Not written yet: {name}")


@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_solution_passes(name):
    """A learner who gives up must find an answer that the check takes."""
    result = CHECKS[name](lesson().solution(name))
    assert result.passed, result.message


def test_the_heart_writes_a_story_and_only_when_it_is_right():
    """The story is the reward: it comes from the learner's own code, and never from a wrong one."""
    story = exercises.PROMPT
    assert story in exercises.attention(lesson().solution("my_attention")).message
    assert story not in exercises.attention(attention_from_the_corner).message


def test_the_library_passes_the_learners_check():
    """The notebook asks this of the spelled-out version; the model runs on the fused one."""
    assert exercises.attention(exercises.library.fused_attention).passed


def test_a_right_version_by_another_way_passes():
    """All heads at once, with PyTorch's attention, is as right as a loop over them."""

    def all_at_once(x, w_query, w_key, w_value, w_dense, num_heads):
        query, key, value = (
            (x @ each).unflatten(-1, (num_heads, -1)).transpose(0, 1) for each in (w_query, w_key, w_value)
        )
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1).flatten(1) @ w_dense

    assert exercises.multi_head(all_at_once).passed
    assert exercises.causal_mask(lambda t, s, device: ~torch.ones(t, s).triu(s - t + 1).bool()).passed


def test_the_walk_over_positions_draws_the_masked_weights_and_stands_still_without_a_kernel():
    """The figure that a class sees on the wall: three bars for the last token, one for the first."""
    query, key, value = (each[0, 0] for each in (exercises.QUERY, exercises.KEY, exercises.VALUE))
    walk = figures.attention_walk(["the", "fox", "ran"], query, key, value)
    assert "weight 1.00" in walk.pictures["0: the"].alt and "fox" not in walk.pictures["0: the"].alt
    assert "fox: score 2.00, weight 0.79" in walk.pictures[walk.still].alt
    slider, picture = walk.widget().children
    slider.value = "0: the"
    assert "weight 1.00" in picture.value and "weight 0.79" in walk._repr_mimebundle_()["text/html"]


WRONG = [
    (exercises.causal_mask, mask_from_the_corner, "query 0 is at position 3 and may look at position 1"),
    (exercises.causal_mask, mask_of_what_is_hidden, "query 0 is at position 0 and may look at position 0"),
    (exercises.causal_mask, lambda *shape: mask_from_the_corner(*shape).float(), "torch.bool"),
    (
        exercises.causal_mask,
        mask_without_itself,
        "query 0 is at position 0 and may look at position 0, but your mask has",
    ),
    (exercises.causal_mask, mask_with_rows_and_columns_swapped, "should have shape [1, 4], but has [4, 1]"),
    (exercises.causal_mask, mask_for_as_many_queries_as_keys, "my_causal_mask(1, 4, cpu) should have shape [1, 4]"),
    (exercises.causal_mask, lambda queries, keys, device: queries < keys, "should be a tensor, but is a bool"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["no mask"]), "what comes out without a causal mask"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["root of C"]), "a head divides by the root of its own size"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["not divided"]), "when scores are not divided by the root of D"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["no dense"]), "side by side, not yet multiplied by w_dense"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["one head"]), "what one head of size 4 gives"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["every second column"]), "with 2 heads should be [1.0, 0.0"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["w @ x"]), "what w @ x gives; here it is x @ w"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["heads added"]), "2 heads: your code raised RuntimeError"),
    (exercises.multi_head, multi_head(*MULTI_HEAD["heads below each other"]), "shape [3, 4], but has [6, 2]"),
    (exercises.split_heads, split_into_thirds, "the key of head 0 should be columns [2, 3]"),
    (exercises.split_heads, split_with_tokens_first, "should have shape [B, H, T, D]"),
    (exercises.split_heads, lambda qkv, num_heads: qkv, "a tuple of query, key and value, but it returned a Tensor"),
    (exercises.split_heads, split_in_the_order_of_values_first, "the query of head 0 should be columns [0, 1]"),
    (
        exercises.split_heads,
        lambda qkv, num_heads: qkv.unflatten(-1, (num_heads, 4)).chunk(3, dim=-1),
        "my_split_heads of a [1, 3, 12] projection with 2 heads: your code raised RuntimeError",
    ),
    (exercises.split_heads, split_without_transposing, "the query of a random [2, 5, 36] projection"),
    (exercises.attention, attention_without_mask, "which sees only itself"),
    (exercises.attention, attention_over_the_wrong_axis, "which sees only itself"),
    (exercises.attention, attention_without_division, "are the scores divided by sqrt(D) = 2?"),
    (exercises.attention, attention_divided_by_size, "are the scores divided by sqrt(D) = 2?"),
    (exercises.attention, attention_from_the_corner, "the last 1 of 7 queries"),
    (exercises.attention, attention_in_half_precision, "are the scores in fp32?"),
    (
        exercises.attention,
        attention_that_fills_with_too_low_a_number,
        "queries and keys of 30s in fp16, head size 96, whose scores should be in fp32: your code raised RuntimeError",
    ),
    (exercises.attention, attention_in_fp32_out, "fp16 values should give an fp16 output"),
    (exercises.attention, lambda query, key, value: None, "is there a return?"),
]


@pytest.mark.parametrize(("check", "wrong", "says"), WRONG)
def test_a_wrong_try_is_told_which_property_failed(check, wrong, says):
    """A message that fits every fault helps with none."""
    result = check(wrong)
    assert not result.passed and says in result.message, result.message


def test_the_last_row_for_every_new_query_is_found_too():
    """It writes the right story, so the heart's check must not lean on the story alone."""
    result = exercises.attention(lesson().names["last_row_mask"])
    assert not result.passed and "the last 3 of 7 queries" in result.message, result.message


def notices(check: str, version: str) -> bool:
    """What a check of the notebook says of a version in the notebook's table."""
    names = lesson().names
    return not names[check](*names["versions"][version])


@pytest.mark.parametrize("check", [*BLIND, *OTHERS])
def test_no_check_of_the_bug_exhibits_refuses_the_right_version(check):
    assert not notices(check, "right")


@pytest.mark.parametrize("version", ["flat_split", "last_row_mask", "half_scores"])
@pytest.mark.parametrize("check", BLIND)
def test_the_blind_checks_are_blind(check, version):
    """The lesson says so; if one of them noticed, the lesson would be wrong."""
    assert not notices(check, version)


@pytest.mark.parametrize(
    ("version", "noticed_by"),
    [
        ("flat_split", ["writes_the_story", "numbered_rows"]),
        ("last_row_mask", ["chunks"]),
        ("half_scores", ["large_in_fp16"]),
    ],
)
def test_each_bug_exhibit_is_caught_where_the_lesson_says(version, noticed_by):
    assert [check for check in OTHERS if notices(check, version)] == noticed_by
    assert any(f"def {version}" in source for source in lesson().exhibits())


def test_the_row_by_row_reference_is_what_pytorch_computes():
    """The exercises are judged against it; it must not be wrong in the learner's stead."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(exercises.attention_by_rows(query, key, value).float(), expected, atol=1e-5)
    last_three = exercises.attention_by_rows(query[:, :, 6:], key, value).float()
    assert torch.allclose(last_three, expected[:, :, 6:], atol=1e-5)
