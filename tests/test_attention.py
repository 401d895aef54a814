"""Attention: the two paths agree, no token sees the future, and heads keep to themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_lib.attention import (
    Attention,
    attention_weights,
    causal_mask,
    explicit_attention,
    fused_attention,
    split_heads,
)
from neox_lib.config import NeoXConfig
from neox_lib.rotary import rotary_table

CONFIG = NeoXConfig(
    vocab_size=32,
    tokenizer_vocab_size=32,
    hidden_size=48,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=64,
    rotary_pct=0.25,
)
CPU = torch.device("cpu")


def heads(batch: int, num_heads: int, tokens: int, size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, num_heads, tokens, size, generator=generator)


def attention_layer(seed: int = 0) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return Attention(CONFIG, 0).eval(), *rotary_table(64, CONFIG.rotary_ndims, 10000, CPU, torch.float32)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(0, 40), st.integers(1, 32))


@settings(max_examples=100, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_explicit_equals_fused(shape, seed, scale):
    """The lesson reads one path and the model runs the other, also with cached tokens in front."""
    batch, num_heads, tokens, cached, size = shape
    query = heads(batch, num_heads, tokens, size, seed, scale)
    key = heads(batch, num_heads, cached + tokens, size, seed + 1, scale)
    value = heads(batch, num_heads, cached + tokens, size, seed + 2)
    fused = fused_attention(query, key, value)
    assert fused.shape == (batch, num_heads, tokens, size)
    torch.testing.assert_close(explicit_attention(query, key, value), fused, atol=2e-5, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_weights_are_shares_of_what_may_be_seen(shape, seed):
    """A row that sums to 1.1, or leaks above the diagonal, makes every attention map wrong."""
    batch, num_heads, tokens, cached, size = shape
    query = heads(batch, num_heads, tokens, size, seed)
    key = heads(batch, num_heads, cached + tokens, size, seed + 1)
    weights = attention_weights(query, key)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(batch, num_heads, tokens))
    for row in range(tokens):
        assert (weights[:, :, row, cached + row + 1 :] == 0).all()
        assert (weights[:, :, row, : cached + row + 1] > 0).all()


@settings(max_examples=50, deadline=None)
@given(queries=st.integers(1, 30), cached=st.integers(0, 30))
def test_mask_lets_each_query_see_itself_and_all_before(queries, cached):
    """With cached keys in front, the diagonal must move right by their number."""
    expected = [[key <= cached + query for key in range(cached + queries)] for query in range(queries)]
    assert causal_mask(queries, cached + queries, CPU).tolist() == expected


def test_split_follows_the_release_layout():
    """Rows of the projection are [q0 k0 v0 q1 k1 v1 ...]: numbered here, so that each lands where it must."""
    num_heads, size = 3, 2
    columns = torch.arange(num_heads * 3 * size, dtype=torch.float32).expand(1, 4, -1)
    query, key, value = split_heads(columns, num_heads)
    assert query.shape == key.shape == value.shape == (1, num_heads, 4, size)
    assert query[0, :, 0].tolist() == [[0, 1], [6, 7], [12, 13]]
    assert key[0, :, 0].tolist() == [[2, 3], [8, 9], [14, 15]]
    assert value[0, :, 0].tolist() == [[4, 5], [10, 11], [16, 17]]


@pytest.mark.parametrize("changed", [1, 7, 19])
@torch.inference_mode()
def test_a_later_token_never_changes_an_earlier_output(changed):
    """A model that sees the future scores wonderfully and writes rubbish."""
    attention, cos, sin = attention_layer()
    hidden = torch.randn(2, 20, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    other = hidden.clone()
    other[:, changed:] += 1
    before, after = attention(hidden, cos[:20], sin[:20]), attention(other, cos[:20], sin[:20])
    torch.testing.assert_close(before[:, :changed], after[:, :changed], atol=1e-6, rtol=1e-6)
    assert ((before - after).abs().amax(dim=-1)[:, changed:] > 1e-3).all()


@torch.inference_mode()
def test_positions_matter_only_by_distance():
    """The same tokens further along in the context attend in the same way: what a cache relies on."""
    attention, cos, sin = attention_layer()
    hidden = torch.randn(1, 12, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    here, later = attention(hidden, cos[:12], sin[:12]), attention(hidden, cos[50:62], sin[50:62])
    torch.testing.assert_close(here, later, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_order_matters():
    """Without rotary the last token could not tell the order of those before it."""
    attention, cos, sin = attention_layer()
    hidden = torch.randn(1, 12, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    shuffled = hidden.clone()
    shuffled[:, [2, 3]] = hidden[:, [3, 2]]
    last = [attention(x, cos[:12], sin[:12])[:, -1] for x in (hidden, shuffled)]
    assert (last[0] - last[1]).abs().max() > 1e-4


@torch.inference_mode()
def test_a_cache_gets_the_new_rows_and_its_rows_are_used():
    """The plug for the cache: turned keys go in under the layer's number, and what comes back is attended to."""
    attention, cos, sin = attention_layer()
    hidden = torch.randn(2, 10, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))

    class Growing:
        def __init__(self):
            self.rows, self.layers = None, []

        def update(self, layer_index, key, value):
            self.layers.append(layer_index)
            new = (key, value)
            self.rows = (
                new if self.rows is None else tuple(torch.cat(pair, 2) for pair in zip(self.rows, new, strict=True))
            )
            return self.rows

    cache = Growing()
    parts = [attention(hidden[:, a:b], cos[a:b], sin[a:b], cache) for a, b in ((0, 4), (4, 5), (5, 8), (8, 10))]
    torch.testing.assert_close(torch.cat(parts, 1), attention(hidden, cos[:10], sin[:10]), atol=1e-6, rtol=1e-5)
    assert cache.layers == [0] * 4


@torch.inference_mode()
def test_weights_are_those_of_the_forward_pass():
    """`weights` feeds the plots: applied to the values by hand, it must give what forward gives."""
    attention, cos, sin = attention_layer()
    hidden = torch.randn(2, 9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    _, _, value = attention.project(hidden, cos[:9], sin[:9])
    merged = (attention.weights(hidden, cos[:9], sin[:9]) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.dense(merged), attention(hidden, cos[:9], sin[:9]), atol=1e-5, rtol=1e-5)
