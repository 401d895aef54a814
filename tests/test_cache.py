"""The KV cache: whatever way a text is split into passes, the model says the same as in one pass without a cache."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.quantization.linear import use_cast_linear

SMALL = NeoXConfig(
    vocab_size=64,
    tokenizer_vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=96,
)
SHAPES = {
    "parallel, rotary 25 %": SMALL,
    "parallel, rotary 100 %": replace(SMALL, rotary_pct=1.0),
    "sequential, rotary 25 %": replace(SMALL, use_parallel_residual=False),
    "sequential, rotary 100 %": replace(SMALL, use_parallel_residual=False, rotary_pct=1.0),
}
FP32_BOUND = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def random_model(random_model):
    """Weights under which logits spread by about 1: the rounding that fp32 itself brings then stays at a third of the
    bound, in every shape. With a gain of 1.5 the queries and keys meet in scores so large that it reached the bound."""
    return partial(random_model, gain=1.0)


def empty_cache(model: NeoXModel, batch: int, capacity: int) -> KVCache:
    return KVCache(model.config, batch, capacity, model.norm.weight.device, model.norm.weight.dtype)


def in_passes(model: NeoXModel, ids: Tensor, sizes: Sequence[int], cache: KVCache | None = None) -> Tensor:
    """Logits of ids `[B, T]` sent through the cache in passes of these sizes: `[B, T, V]`."""
    cache = cache if cache is not None else empty_cache(model, *ids.shape)
    return torch.cat([model(part, cache) for part in ids.split(list(sizes), dim=1)], dim=1)


@torch.inference_mode()
def largest_difference(model: NeoXModel, ids: Tensor, sizes: Sequence[int]) -> float:
    return (in_passes(model, ids, sizes) - model(ids)).abs().max().item()


@st.composite
def splittings(draw) -> list[int]:
    """Sizes of one or more passes that make up a text of 1 to 32 tokens."""
    tokens = draw(st.integers(1, 32))
    cuts = draw(st.sets(st.integers(1, tokens - 1), max_size=12)) if tokens > 1 else set()
    edges = [0, *sorted(cuts), tokens]
    return [end - start for start, end in pairwise(edges)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_splitting_gives_the_logits_of_one_pass(random_model, token_ids, shape):
    """Otherwise what a model writes would depend on how its prompt happened to be fed."""
    model = random_model(SHAPES[shape])

    @settings(max_examples=40, deadline=None)
    @example(sizes=[1] * 32, batch=2, seed=0)
    @given(sizes=splittings(), batch=st.integers(1, 3), seed=st.integers(0, 2**32))
    def check(sizes, batch, seed):
        assert largest_difference(model, token_ids(SMALL, batch, sum(sizes), seed), sizes) <= FP32_BOUND

    check()


@pytest.mark.parametrize("sizes", [[2047, 1], [1, 2047], [1000, 24, 1024], [700, 1, 1, 1345, 1]])
def test_the_whole_context_in_passes(random_model, token_ids, sizes):
    """The last positions of 2,048 are where a table or a mask that is one short would show."""
    model = random_model(replace(SMALL, num_hidden_layers=1, max_position_embeddings=2048))
    assert largest_difference(model, token_ids(SMALL, 1, 2048), sizes) <= FP32_BOUND


def square_mask(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=query.shape[-2] > 1)


def no_mask(query, key, value):
    return scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("wrong", [square_mask, no_mask])
def test_a_wrong_mask_for_a_later_chunk_is_noticed(random_model, token_ids, monkeypatch, wrong):
    """The reference implementation takes one new token at a time and breaks on more: the bound has to see that."""
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 12)
    monkeypatch.setattr("neox_lib.attention.fused_attention", wrong)
    assert largest_difference(model, ids, [5, 7]) > 1000 * FP32_BOUND


def test_positions_that_start_anew_with_each_pass_are_noticed(random_model, token_ids, monkeypatch):
    """A cache that forgets its length when it turns the queries and keys still gives fluent text."""
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 12)
    rows = model.rotary.rows
    monkeypatch.setattr(model.rotary, "rows", lambda start, tokens, like: rows(0, tokens, like))
    assert largest_difference(model, ids, [5, 7]) > 1000 * FP32_BOUND
    assert largest_difference(model, ids, [5] + [1] * 7) > 1000 * FP32_BOUND


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_truncated_cache_has_forgotten_the_rest(random_model, token_ids, shape):
    """A second prompt, or a second branch of a text, must not see what was there before."""
    model = random_model(SHAPES[shape])

    @settings(max_examples=25, deadline=None)
    @given(before=st.integers(1, 40), data=st.data(), after=splittings(), seed=st.integers(0, 2**32))
    def check(before, data, after, seed):
        kept = data.draw(st.integers(0, min(before, 96 - sum(after))))
        old, new = token_ids(SMALL, 2, before, seed), token_ids(SMALL, 2, sum(after), seed + 1)
        cache = empty_cache(model, 2, 96)
        model(old, cache)
        cache.truncate(kept)
        found = in_passes(model, new, after, cache)
        expected = model(torch.cat([old[:, :kept], new], dim=1))[:, kept:]
        assert (found - expected).abs().max() <= FP32_BOUND
        assert cache.length == kept + sum(after)

    check()


@torch.inference_mode()
def test_without_truncating_a_second_prompt_sees_the_first(random_model, token_ids):
    """The fault that the test above is there for, put in: its bound notices."""
    model = random_model(SMALL)
    first, second = token_ids(SMALL, 1, 8, seed=1), token_ids(SMALL, 1, 8, seed=2)
    cache = empty_cache(model, 1, 16)
    model(first, cache)
    assert (model(second, cache) - model(second)).abs().max() > 1000 * FP32_BOUND


@pytest.mark.parametrize("length", [-1, 6])
@torch.inference_mode()
def test_a_cache_keeps_no_more_than_it_holds(random_model, token_ids, length):
    model = random_model(SMALL)
    cache = empty_cache(model, 1, 16)
    model(token_ids(SMALL, 1, 5), cache)
    with pytest.raises(ValueError, match=rf"keep {length} tokens .* holds 5"):
        cache.truncate(length)
    assert cache.length == 5


@torch.inference_mode()
def test_a_cache_cannot_be_overfilled(random_model, token_ids):
    """One token too many is refused with both numbers, and what the cache held is still there."""
    model = random_model(SMALL)

    @settings(max_examples=40, deadline=None)
    @given(capacity=st.integers(1, 40), data=st.data())
    def check(capacity, data):
        held = data.draw(st.integers(0, capacity))
        more = data.draw(st.integers(capacity - held + 1, 50))
        ids = token_ids(SMALL, 1, capacity + 1)
        cache = empty_cache(model, 1, capacity)
        if held:
            model(ids[:, :held], cache)
        with pytest.raises(ValueError, match=rf"1 x {capacity} tokens .* 1 x {held + more} do not fit"):
            model(token_ids(SMALL, 1, more), cache)
        assert cache.length == held
        if held < capacity:
            found = model(ids[:, held:capacity], cache)
            assert (found - model(ids[:, :capacity])[:, held:]).abs().max() <= FP32_BOUND

    check()


def test_another_batch_size_is_refused(random_model, token_ids):
    """One row of keys would otherwise be spread over all rows of the cache, unnoticed."""
    model = random_model(SMALL)
    with pytest.raises(ValueError, match=r"3 x 16 tokens .* 1 x 4 do not fit"):
        model(token_ids(SMALL, 1, 4), empty_cache(model, 3, 16))


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (1, 0), (1, -3)])
def test_a_cache_without_room_is_refused(batch, capacity):
    with pytest.raises(ValueError, match=f"got {batch} x {capacity}"):
        KVCache(SMALL, batch, capacity, torch.device("cpu"), torch.float32)


def test_a_larger_cache_does_not_widen_the_context(random_model, token_ids):
    """Past its context the model has no angles to turn by: 2048 is a wall."""
    model = random_model(SMALL)
    cache = empty_cache(model, 1, 200)
    with torch.inference_mode():
        model(token_ids(SMALL, 1, 96), cache)
        with pytest.raises(ValueError, match="96 cached \\+ 1 new tokens exceed the context of 96"):
            model(token_ids(SMALL, 1, 1), cache)
    assert cache.length == 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_held_are_what_the_config_says(random_model, token_ids, dtype):
    """The memory figures that are shown before loading must be those of a real cache."""
    model = random_model(SMALL).to(dtype)
    cache = empty_cache(model, 3, 40)
    assert cache.nbytes == 0
    with torch.inference_mode():
        model(token_ids(SMALL, 3, 7), cache)
    assert cache.nbytes == 3 * SMALL.kv_cache_bytes(7, dtype)
    assert cache.keys.nbytes + cache.values.nbytes == 3 * SMALL.kv_cache_bytes(40, dtype)


@torch.inference_mode()
def test_a_pass_writes_its_own_positions_and_no_others(random_model, token_ids):
    """Nothing is allocated or moved while text grows: a decode step costs one token's work."""
    model = random_model(SMALL)
    cache = empty_cache(model, 1, 16)
    model(token_ids(SMALL, 1, 6), cache)
    where, before = cache.keys.data_ptr(), cache.keys.clone()
    cache.keys[..., 9:, :] = 7.0
    model(token_ids(SMALL, 1, 3, seed=1), cache)
    assert cache.keys.data_ptr() == where
    assert torch.equal(cache.keys[..., :6, :], before[..., :6, :])
    assert (cache.keys[..., 9:, :] == 7.0).all()


# Half precision. A result that is rounded to fp16 is off by at most 2^-11 of itself. Passes of other lengths sum in
# other orders or take other paths, so these errors fall independently and add up like a random walk: n of them to at
# most sqrt(n) * 2^-11 of the logits' width, and the largest of thousands of logits lies within 4 such shares. The
# results that are rounded one after another, on both sides together:
# - all in fp16: 12 a layer (two norms, qkv, rotary's product and sum, attention, dense, two sums, the MLP's three) and
#   the last norm and the logits; in the cached and in the uncached pass.
# - mixed, fp16 matrices on fp32 activations: only where a few rows are multiplied in fp16, the rows and the product of
#   each of four matrices a layer and of the output matrix; more rows are multiplied in fp32.
ROUNDINGS = {"fp16": lambda layers: 2 * (12 * layers + 2), "mixed": lambda layers: 8 * layers + 2}


def half_tolerance(form: str, config: NeoXConfig, logits: Tensor) -> float:
    """How far a logit may move between a cached and an uncached pass of a model in half precision."""
    return 4 * ROUNDINGS[form](config.num_hidden_layers) ** 0.5 * 2**-11 * logits.float().std().item()


def halved(model: NeoXModel, form: str) -> NeoXModel:
    """The model in fp16 altogether, or its matrices alone, as `create_model` has it on a CPU."""
    if form == "fp16":
        return model.half()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.half()
    return use_cast_linear(model)


HALF = replace(
    SMALL,
    vocab_size=1024,
    tokenizer_vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=256,
    max_position_embeddings=640,
)
SIZES = {"ones": [1] * 40, "uneven": [7, 1, 1, 31], "fives": [5] * 60, "long": [600, 1, 1, 1]}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
@pytest.mark.parametrize("form", ROUNDINGS)
@torch.inference_mode()
def test_half_precision_moves_a_logit_by_no_more_than_is_stated(
    random_model, token_ids, form, rotary_pct, batch, sizes
):
    """Half precision may blur a logit by what rounding explains, past 500 tokens too; no more.

    A greedy token may be another one only where the best logit led by less than two can move.
    """
    config = replace(HALF, rotary_pct=rotary_pct)
    model, ids = halved(random_model(config), form), token_ids(config, batch, sum(SIZES[sizes]))
    whole, parts = model(ids).float(), in_passes(model, ids, SIZES[sizes]).float()
    tolerance = half_tolerance(form, config, whole)
    assert (parts - whole).abs().max() <= tolerance
    best, second = whole.topk(2).values.unbind(-1)
    certain = best - second > 2 * tolerance
    assert certain.float().mean() > 0.8, "a tolerance that leaves many tokens open says nothing"
    assert torch.equal(parts.argmax(-1)[certain], whole.argmax(-1)[certain])


@pytest.mark.parametrize("form", ROUNDINGS)
@torch.inference_mode()
def test_half_precision_texts_part_only_between_two_tokens_as_good_as_equal(random_model, token_ids, form):
    """Every token here has a twin that scores almost the same, so that texts do part; nothing else may part them."""
    model = random_model(HALF)
    noise = torch.randn(500, HALF.hidden_size, generator=torch.Generator().manual_seed(0))
    model.final_linear.weight[500:1000] = model.final_linear.weight[:500] + 1e-4 * noise
    model = halved(model, form)
    for seed in range(4):
        ids = token_ids(HALF, 1, 12, seed)
        with_cache, without = (
            [step.token_id for step in stream_generate(model, ids, 20, use_cache=use_cache, stop_token_ids=())]
            for use_cache in (True, False)
        )
        same = next((n for n in range(20) if with_cache[n] != without[n]), None)
        if same is not None:
            logits = model(torch.cat([ids, torch.tensor([without[:same]], dtype=torch.long)], dim=1)).float()
            gap = logits[0, -1, without[same]] - logits[0, -1, with_cache[same]]
            assert gap.abs() < 2 * half_tolerance(form, HALF, logits)


@pytest.mark.parametrize("fault", ["mask", "positions"])
@pytest.mark.parametrize("form", ROUNDINGS)
@torch.inference_mode()
def test_the_stated_tolerance_sees_a_fault(random_model, token_ids, monkeypatch, form, fault):
    """A tolerance that a wrong mask, or positions off by one, would pass proves nothing."""
    model, ids = halved(random_model(HALF), form), token_ids(HALF, 1, 40)
    whole, rows = model(ids).float(), model.rotary.rows
    if fault == "mask":
        monkeypatch.setattr("neox_lib.attention.fused_attention", square_mask)
    else:
        monkeypatch.setattr(model.rotary, "rows", lambda start, tokens, like: rows(max(0, start - 1), tokens, like))
    assert (in_passes(model, ids, [20, 20]).float() - whole).abs().max() > 10 * half_tolerance(form, HALF, whole)
