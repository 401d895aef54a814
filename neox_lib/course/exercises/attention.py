"""The exercises of notebook 03: the mask, two heads by hand, the split into heads, and attention itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib import attention as library
from neox_lib.course.checks import describe, exercise, given, require, require_equal, story_with
from neox_lib.course.figures.plots import seeded

CPU = torch.device("cpu")

# The notebook's three tokens: the, fox, ran. "fox" looks for an article, "ran" for an animal.
QUERY = torch.tensor([[[[0.0, 0, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0]]]])
KEY = torch.tensor([[[[0.0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]]])
VALUE = torch.tensor([[[[1.0, 0, 0, 0], [0, 10, 0, 0], [0, 0, 5, 0]]]])

# The notebook's small model: what each token has, [T, C], and the four matrices, [C, C], of two heads of size 2
X = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
W_QUERY = torch.tensor([[0.0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
W_KEY = torch.tensor([[2.0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
W_VALUE = torch.tensor([[1.0, 0, 0, 0], [0, 2, 5, 0], [0, 0, 0, 7], [0, 0, 0, 0]])
W_DENSE = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])

PROMPT = "Once upon a time, a little mouse"  # no other notebook's


def attention_by_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in fp64, one query at a time, without a mask: the reference for the learner's version.

    Written independently of the library's, so that a fault promoted into the library is found too.
    """
    query, key, value = query.double(), key.double(), value.double()
    before = key.shape[-2] - query.shape[-2]
    rows = []
    for index in range(query.shape[-2]):
        seen = before + index + 1
        scores = (key[..., :seen, :] * query[..., index : index + 1, :]).sum(-1) / query.shape[-1] ** 0.5
        rows.append((scores.softmax(-1).unsqueeze(-1) * value[..., :seen, :]).sum(-2))
    return torch.stack(rows, dim=-2)


@exercise("attention.causal_mask")
def causal_mask(yours: Callable[[int, int, torch.device], Tensor]) -> None:
    """True where a query may look: with as many queries as keys, and with fewer."""
    for queries, keys in [(3, 3), (1, 4), (2, 5), (4, 9)]:
        what = f"my_causal_mask({queries}, {keys}, cpu)"
        with given(what):
            found = yours(queries, keys, CPU)
        require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
        require(found.dtype == torch.bool, f"{what} should hold True and False (torch.bool), but holds {found.dtype}")
        shape = tuple(found.shape)
        require(shape == (queries, keys), f"{what} should have shape {[queries, keys]}, but has {list(shape)}")
        for query in range(queries):
            for key in range(keys):
                place = keys - queries + query
                says, right = bool(found[query, key]), key <= place
                require(
                    says == right,
                    f"{what}: query {query} is at position {place} and {'may' if right else 'must not'} look at "
                    f"position {key}, but your mask has {says} there",
                )


def two_heads(x: Tensor, matrices: tuple[Tensor, ...], num_heads: int, causal: bool = True, root: int = 0) -> Tensor:
    """Attention by projections, `[T, C]` -> `[T, C]`, head by head, before the dense matrix; `root` replaces D."""
    size = x.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        query, key, value = (x @ each[:, head * size : (head + 1) * size] for each in matrices)
        query = query * (size / (root or size)) ** 0.5
        if causal:
            heads.append(attention_by_rows(query, key, value).float())
        else:
            heads.append((query @ key.T / size**0.5).softmax(-1) @ value)
    return torch.cat(heads, dim=-1)


@exercise("attention.multi_head")
@torch.no_grad()
def multi_head(yours: Callable[..., Tensor]) -> None:
    """`yours(x, w_query, w_key, w_value, w_dense, num_heads)`: first the notebook's numbers, then random ones."""
    matrices = (W_QUERY, W_KEY, W_VALUE)
    what = "my_multi_head on the notebook's three tokens and its matrices, with 2 heads"
    with given(what):
        found = yours(X, *matrices, W_DENSE, 2)
    expected = two_heads(X, matrices, 2) @ W_DENSE
    if isinstance(found, Tensor) and found.shape == expected.shape:
        transposed = tuple(each.T for each in matrices)
        wrong = {
            "the heads' outputs side by side, not yet multiplied by w_dense": two_heads(X, matrices, 2),
            "what comes out without a causal mask": two_heads(X, matrices, 2, causal=False) @ W_DENSE,
            "what comes out when scores are divided by the root of C: a head divides by the root of its own size, "
            "D = C / num_heads": two_heads(X, matrices, 2, root=4) @ W_DENSE,
            "what comes out when scores are not divided by the root of D": two_heads(X, matrices, 2, root=1) @ W_DENSE,
            "what one head of size 4 gives: cut the columns into num_heads parts": two_heads(X, matrices, 1) @ W_DENSE,
            "what w @ x gives; here it is x @ w": two_heads(X, transposed, 2) @ W_DENSE.T,
        }
        for name, output in wrong.items():
            require((found - output).abs().max().item() > 1e-4, f"{what} is wrong: it is {name}")
    require_equal(found, expected, what, tolerance=1e-3)
    for heads in (1, 2, 3):
        x, *more = seeded(5, 12), *(seeded(12, 12, seed=seed) / 4 for seed in range(1, 5))
        what = f"my_multi_head on 5 random tokens with C = 12, {heads} head{'s' if heads > 1 else ''} of {12 // heads}"
        with given(what):
            found = yours(x, *more, heads)
        require_equal(found, two_heads(x, tuple(more[:3]), heads) @ more[3], what, tolerance=1e-4)


@exercise("attention.split_heads")
def split_heads(yours: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Numbered columns land in the head and the role that the layout gives them; texts and tokens stay apart."""
    numbered = torch.arange(12.0).expand(1, 3, 12)
    with given("my_split_heads of a [1, 3, 12] projection with 2 heads"):
        found = yours(numbered, 2)
    three = isinstance(found, tuple | list) and len(found) == 3
    what = f"{len(found)} values" if isinstance(found, tuple | list) else describe(found)
    require(three, f"my_split_heads should return a tuple of query, key and value, but it returned {what}")
    for part, name in zip(found, ("query", "key", "value"), strict=True):
        what = f"the {name} of my_split_heads on a [1, 3, 12] projection with 2 heads"
        require(isinstance(part, Tensor), f"{what} should be a tensor, but is {describe(part)}")
        shape = list(part.shape)
        require(shape == [1, 2, 3, 2], f"{what} should have shape [B, H, T, D] = [1, 2, 3, 2], but has {shape}")
    for head in range(2):
        for role, name in enumerate(("query", "key", "value")):
            first = (3 * head + role) * 2
            columns = [int(number) for number in found[role][0, head, 0].tolist()]
            require(
                columns == [first, first + 1],
                f"with 2 heads of size 2, the {name} of head {head} should be columns {[first, first + 1]} of the "
                f"projection, but is columns {columns}",
            )
    qkv = seeded(2, 5, 36)
    with given("my_split_heads of a random [2, 5, 36] projection with 3 heads"):
        found = yours(qkv, 3)
    for role, name in enumerate(("query", "key", "value")):
        expected = torch.stack([qkv[:, :, (3 * head + role) * 4 :][:, :, :4] for head in range(3)], dim=1)
        require_equal(found[role], expected, f"the {name} of a random [2, 5, 36] projection with 3 heads")


@exercise("attention.attention")
def attention(yours: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Attention for every text and head, for any number of queries, in any precision; then the story."""
    with given("my_attention of the notebook's three tokens, [1, 1, 3, 4]"):
        found = yours(QUERY, KEY, VALUE)
    require(isinstance(found, Tensor), f"my_attention should return a tensor, but it returned {describe(found)}")
    require_equal(
        found[..., :1, :],
        VALUE[..., :1, :],
        "my_attention's output for the first of the notebook's three tokens, which sees only itself,",
    )
    expected = attention_by_rows(QUERY, KEY, VALUE)
    what, why = 'my_attention\'s output for "ran", the third token,', "are the scores divided by sqrt(D) = 2?"
    require_equal(found[0, 0, 2], expected[0, 0, 2], what, 1e-4, why)

    query, key, value = (seeded(2, 3, 7, 16, seed=seed) for seed in range(3))
    with given("my_attention of a random [2, 3, 7, 16] batch"):
        whole = yours(query, key, value)
    require_equal(whole, attention_by_rows(query, key, value), "my_attention on a random [2, 3, 7, 16] batch", 1e-4)
    for new in (1, 3):
        what = f"my_attention of the last {new} of 7 queries against all 7 keys"
        why = "expected is what one pass over all 7 queries gives; is the mask's last row the last query's?"
        with given(what):
            found = yours(query[:, :, -new:], key, value)
        require_equal(found, whole[:, :, -new:], what, 1e-4, why)

    large = 30 * torch.ones(1, 1, 4, 96, dtype=torch.float16)
    small = value[:1, :1, :4].half()
    what = "my_attention of queries and keys of 30s in fp16, head size 96,"
    with given(f"{what} whose scores should be in fp32"):
        mixed = yours(large, large, small)
    require(mixed.dtype == torch.float16, f"fp16 values should give an fp16 output, but yours gives {mixed.dtype}")
    finite = bool(mixed.isfinite().all())
    require(finite, f"{what} should be finite, but holds NaN or infinity: are the scores in fp32?")
    require_equal(mixed, attention_by_rows(large, large, small), what, 2e-3)
    return story_with(library.fused_attention, yours, "my_attention", PROMPT)
