"""The KV cache: whatever way a text is split into passes, the model says the same as in one pass without a cache."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel

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


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small cost more to share out between cores than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    rows = model.rotary_rows
    monkeypatch.setattr(model, "rotary_rows", lambda start, tokens: rows(0, tokens))
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


# Half precision. A result stored in fp16 is off by half a unit in its last place at most: by up to 2^-11 of itself, by
# 0.42 * 2^-11 in root mean square. A layer stores about 12 results in a row (two norms, qkv, rotary's product and sum,
# attention, dense, two sums, the MLP's three), then come the last norm and the logits. Passes of other lengths sum in
# other orders, so these errors fall independently on both sides and add up like a random walk, to a share of
# sqrt(2 * (12 L + 2)) * 0.42 * 2^-11 of the logits' width. The largest of thousands lies within 5 such shares.
def fp16_tolerance(config: NeoXConfig, logits: Tensor) -> float:
    """How far a logit may move between a cached and an uncached fp16 pass."""
    roundings = 2 * (12 * config.num_hidden_layers + 2)
    return 5 * roundings**0.5 * 0.42 * 2**-11 * logits.float().std().item()


HALF = replace(
    SMALL,
    vocab_size=1024,
    tokenizer_vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=256,
    max_position_embeddings=640,
)


@pytest.mark.parametrize(
    "sizes", [[1] * 40, [7, 1, 1, 31], [5] * 60, [600, 1, 1, 1]], ids=["ones", "mixed", "fives", "long"]
)
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
@torch.inference_mode()
def test_fp16_logits_are_within_the_stated_tolerance_in_any_passes(random_model, token_ids, rotary_pct, sizes):
    """Half precision may blur a logit by what rounding explains, past 500 tokens too; no more.

    A greedy token may be another one only where the best logit led by less than both moved.
    """
    config = replace(HALF, rotary_pct=rotary_pct)
    model, ids = random_model(config).half(), token_ids(config, 2, sum(sizes))
    whole, parts = model(ids).float(), in_passes(model, ids, sizes).float()
    tolerance = fp16_tolerance(config, whole)
    assert (parts - whole).abs().max() <= tolerance
    best, second = whole.topk(2).values.unbind(-1)
    certain = best - second > 2 * tolerance
    assert certain.float().mean() > 0.5, "a tolerance that leaves most tokens open says nothing"
    assert torch.equal(parts.argmax(-1)[certain], whole.argmax(-1)[certain])


@pytest.mark.parametrize("fault", ["mask", "positions"])
@torch.inference_mode()
def test_the_fp16_tolerance_sees_a_fault(random_model, token_ids, monkeypatch, fault):
    """A tolerance that a wrong mask, or positions off by one, would pass proves nothing."""
    model, ids = random_model(HALF).half(), token_ids(HALF, 2, 40)
    whole, rows = model(ids).float(), model.rotary_rows
    if fault == "mask":
        monkeypatch.setattr("neox_lib.attention.fused_attention", square_mask)
    else:
        monkeypatch.setattr(model, "rotary_rows", lambda start, tokens: rows(max(0, start - 1), tokens))
    assert (in_passes(model, ids, [20, 20]).float() - whole).abs().max() > 10 * fp16_tolerance(HALF, whole)
