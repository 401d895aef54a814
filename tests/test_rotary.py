"""Rotary positions: properties that any correct version has, and numbers worked out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel
from neox_lib.rotary import RotaryTable, apply_rotary, rotary_angles, rotary_table, rotate_half

CPU = torch.device("cpu")
HEAD, ROTARY = 96, 24  # 20B's
SMALL = NeoXConfig(
    vocab_size=32,
    tokenizer_vocab_size=32,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=600,
)


def exact_angles(length: int, rotary_ndims: int, base: float = 10000) -> torch.Tensor:
    """The angles in float64, straight from the paper's formula."""
    turns = torch.tensor([base ** (-2 * pair / rotary_ndims) for pair in range(rotary_ndims // 2)], dtype=torch.float64)
    return torch.outer(torch.arange(length, dtype=torch.float64), turns.repeat(2))


@pytest.mark.parametrize("rotary_ndims", [2, 16, 24, 96])
def test_angles_follow_the_formula_over_the_whole_context(rotary_ndims):
    """Off by 0.001 rad near 2048 and far tokens sit at the wrong distance."""
    angles = rotary_angles(torch.arange(2048), rotary_ndims)
    assert angles.dtype == torch.float32
    assert (angles.double() - exact_angles(2048, rotary_ndims)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_table_is_the_exact_one_rounded_once(dtype):
    """The angle must be formed in fp32: cos and sin then lose one rounding, not a third of a radian."""
    cos, sin = rotary_table(2048, ROTARY, 10000, CPU, dtype)
    angles = exact_angles(2048, ROTARY)
    step = torch.finfo(dtype).eps
    assert cos.dtype == sin.dtype == dtype
    assert (cos.double() - angles.cos()).abs().max() < step
    assert (sin.double() - angles.sin()).abs().max() < step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_those_of_the_table_in_the_dtype_asked_for(dtype):
    """A token behind a cache would turn by another token's angle, or an fp16 model get fp32 queries."""
    cos, sin = rotary_table(64, ROTARY, 10000, CPU, dtype)
    found = RotaryTable(64, ROTARY, 10000).rows(60, 4, like=torch.zeros(1, dtype=dtype))
    assert torch.equal(found[0], cos[60:]) and torch.equal(found[1], sin[60:])
    assert found[0].dtype == found[1].dtype == dtype


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.float16),
        lambda model: model.half().float(),
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: nn.Sequential(model).half(),
    ],
)
def test_the_table_keeps_fp32_whatever_becomes_of_the_model(change):
    """Rounded to half and widened again, every later pass in fp32 would turn by angles a thousandth off."""
    model = NeoXModel(SMALL)
    exact = rotary_table(SMALL.max_position_embeddings, SMALL.rotary_ndims, SMALL.rotary_emb_base, CPU, torch.float32)
    change(model)
    for found, expected in zip((model.rotary.cos, model.rotary.sin), exact, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_a_model_built_without_memory_gets_its_table_filled():
    """All loaders build on the meta device; a table left there, or left as it was allocated, turns by nonsense."""
    with torch.device("meta"):
        model = NeoXModel(SMALL)
    assert model.rotary.cos.is_meta and model.rotary.sin.is_meta
    model.rotary.fill(CPU)
    assert torch.equal(model.rotary.cos, NeoXModel(SMALL).rotary.cos)
    assert torch.equal(model.rotary.sin, NeoXModel(SMALL).rotary.sin)


def test_a_loader_that_knows_nothing_of_the_table_gets_it_all_the_same():
    """A learner's own loader puts parameters into a meta model; what it has never heard of must not be missing."""
    whole, ids = NeoXModel(SMALL), torch.tensor([[3, 1, 4]])
    with torch.device("meta"):
        model = NeoXModel(SMALL)
    model.load_state_dict(whole.state_dict(), assign=True)
    with torch.inference_mode():
        assert torch.equal(model(ids), whole(ids))
    assert not model.rotary.cos.is_inference(), "autograd would refuse it in the next training step"


def test_the_table_is_a_buffer_that_no_checkpoint_holds():
    """A saved table would be an unexpected key for every other implementation, and for our own strict loaders."""
    model = NeoXModel(SMALL)
    assert {name for name, _ in model.named_buffers()} == {"rotary.cos", "rotary.sin"}
    assert not any("rotary" in name for name in model.state_dict())


def test_positions_past_the_context_are_refused():
    with pytest.raises(ValueError, match=r"60 cached \+ 5 new tokens exceed the context of 64 tokens"):
        RotaryTable(64, ROTARY, 10000).rows(60, 5, torch.zeros(1))


def test_each_text_of_a_batch_has_rows_of_its_own():
    """Padding is below 0, however far; the text that is furthest on meets the wall."""
    table, like = RotaryTable(64, ROTARY, 10000), torch.zeros(1, dtype=torch.float16)
    found = table.rows(torch.tensor([-2, 7, 60, -900]), 4, like)
    for each, alone, first in zip(found, table.rows(7, 4, like), table.rows(0, 2, like), strict=True):
        assert (each.shape, each.dtype) == ((4, 1, 4, ROTARY), torch.float16)
        assert torch.equal(each[1, 0], alone)
        assert torch.equal(each[0, 0, 2:], first)
    with pytest.raises(ValueError, match="61 cached \\+ 4 new tokens exceed the context of 64"):
        table.rows(torch.tensor([0, 61]), 4, like)


def test_positions_may_come_in_half_precision():
    """Whole numbers up to 2048 are exact in fp16; the angles must still be fp32."""
    half = rotary_angles(torch.arange(2048).half(), ROTARY)
    assert torch.equal(half, rotary_angles(torch.arange(2048), ROTARY))


def test_a_pair_is_half_the_rotary_dimensions_apart():
    """One input dimension lights up exactly itself and its partner, i + rotary_ndims / 2."""
    cos, sin = rotary_table(6, ROTARY, 10000, CPU, torch.float32)
    for dimension in range(ROTARY):
        x = torch.zeros(1, 1, 6, HEAD)
        x[..., dimension] = 1
        touched = apply_rotary(x, cos, sin)[0, 0, 5].nonzero().flatten().tolist()
        assert touched == sorted([dimension, (dimension + ROTARY // 2) % ROTARY])


def test_turning_by_a_right_angle_twice_is_turning_round():
    """rotate_half is a quarter turn: twice gives the opposite vector."""
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate_half(rotate_half(x)), -x)


def test_the_first_position_is_unchanged_and_the_last_dimensions_pass_through():
    """Position 0 has angle 0; with rotary_pct 0.25 three quarters of a head carry no position."""
    x = torch.randn(2, 3, 50, HEAD, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x, *rotary_table(50, ROTARY, 10000, CPU, torch.float32))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert torch.equal(turned[..., ROTARY:], x[..., ROTARY:])
    assert not torch.isclose(turned[:, :, 1:, :ROTARY], x[:, :, 1:, :ROTARY]).all(dim=-1).any()


@settings(max_examples=60, deadline=None)
@given(
    query_position=st.integers(0, 1000),
    key_position=st.integers(0, 1000),
    shift=st.integers(0, 1000),
    rotary_ndims=st.sampled_from([2, 8, 24, 64]),
    seed=st.integers(0, 2**16),
)
def test_a_product_depends_on_the_distance_alone(query_position, key_position, shift, rotary_ndims, seed):
    """The whole point of rotary: move both tokens, and the query-key product stays."""
    query, key = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    angles = exact_angles(2001, rotary_ndims)
    library = rotary_angles(torch.arange(2001), rotary_ndims)

    def product(angles: torch.Tensor, query_at: int, key_at: int) -> float:
        cos, sin = angles.cos().double(), angles.sin().double()
        turned_query = apply_rotary(query, cos[[query_at]], sin[[query_at]])
        turned_key = apply_rotary(key, cos[[key_at]], sin[[key_at]])
        return (turned_query * turned_key).sum().item()

    here = product(angles, query_position, key_position)
    moved = product(angles, query_position + shift, key_position + shift)
    assert moved == pytest.approx(here, abs=1e-9 * 64)
    assert product(library, query_position + shift, key_position + shift) == pytest.approx(here, abs=0.03)


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 2047), seed=st.integers(0, 2**16))
def test_turning_keeps_lengths(position, seed):
    """A rotation changes no norm, so attention scores stay in their range at every position."""
    x = torch.randn(1, 1, 1, HEAD, generator=torch.Generator().manual_seed(seed))
    cos, sin = rotary_table(2048, ROTARY, 10000, CPU, torch.float32)
    turned = apply_rotary(x, cos[[position]], sin[[position]])
    assert turned.norm().item() == pytest.approx(x.norm().item(), rel=1e-5)
