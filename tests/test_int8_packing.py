"""Packed int8 layers multiply whole numbers; what they add to the rounding of the weights must stay next to nothing."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neox_lib.bench.candidates import our_model, random_model
from neox_lib.config import NeoXConfig
from neox_lib.decoding import int8_packing
from neox_lib.decoding.int8_packing import BASE, BLOCK_ROWS, PackedInt8Linear, pack_int8, to_digits
from neox_lib.decoding.packing import has_fbgemm
from neox_lib.quantization.int8 import quantize_rows
from neox_lib.quantization.int8_linear import Int8Linear, use_int8_linear

MLP = ("dense_h_to_4h", "dense_4h_to_h")
packing = pytest.mark.skipif(not has_fbgemm(), reason="this torch has no FBGEMM to pack for")
CONFIG = NeoXConfig(
    num_hidden_layers=3, hidden_size=128, num_attention_heads=4, vocab_size=512, tokenizer_vocab_size=500
)


def int8_layer(inputs: int, outputs: int, bias: bool = True) -> Int8Linear:
    torch.manual_seed(inputs * 1000 + outputs)
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return Int8Linear(*quantize_rows(plain.weight), plain.bias)


def reference(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight.double() * layer.scale.double()[:, None]
    return F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())


def allowed(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """How far a result may be off: half a second digit in every activation, all in the weight's direction, and the
    rounding of the sums in fp32.
    """
    weight = layer.weight.double() * layer.scale.double()[:, None]
    digit = x.double().abs().amax(dim=-1, keepdim=True) / (63 * BASE)
    return 0.51 * digit * weight.abs().sum(dim=1) + 1e-6 * (x.double().abs() @ weight.abs().T + 1)


rows_of_any_size = st.builds(
    lambda rows, inputs, seed, powers: (
        torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
        * 10.0 ** torch.tensor((powers * rows)[:rows])[:, None]
    ),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(0, 99),
    st.lists(st.integers(-20, 20), min_size=1, max_size=9),
)


@settings(deadline=None)
@given(rows_of_any_size)
def test_two_digits_give_any_row_back_to_14_bits(rows):
    """Rows of very different sizes side by side, each with a step of its own; no digit may pass 63."""
    digits, step = to_digits(rows)
    assert digits.abs().max() <= 63.001 and torch.equal(digits[0], digits[0].round())
    back = step.double() * (digits[0].double() + digits[1].double().round() / BASE)
    error = (back - rows).abs()
    assert (error <= rows.double().abs().amax(dim=-1, keepdim=True) * 2**-13.9).all()


@packing
@settings(max_examples=60, deadline=None)
@given(rows_of_any_size, st.integers(1, 70), st.booleans())
def test_products_are_off_by_the_second_digit_alone(rows, outputs, bias):
    layer = int8_layer(rows.shape[1], outputs, bias)
    found = PackedInt8Linear(layer)(rows)
    assert found.dtype == torch.float32 and found.shape == (len(rows), outputs)
    assert ((found - reference(layer, rows)).abs() <= allowed(layer, rows)).all()


@packing
@pytest.mark.parametrize("rows", [1, BLOCK_ROWS, BLOCK_ROWS + 1, 3 * BLOCK_ROWS])
def test_the_largest_numbers_do_not_overflow(rows):
    """AVX2 adds pairs of products in 16 bits: with a larger digit or zero these sums come out wrong."""
    layer = Int8Linear(torch.full((40, 4096), 127, dtype=torch.int8), torch.full((40,), 1e-2))
    for sign in (1.0, -1.0):
        x = torch.full((rows, 4096), sign)
        torch.testing.assert_close(PackedInt8Linear(layer)(x), reference(layer, x).float(), rtol=1e-5, atol=0)


@packing
def test_rows_of_zeros_and_damaged_rows_stay_by_themselves():
    """0 / 0 would make a row of zeros NaN; a NaN must not be quantized to a number, nor reach the rows beside it."""
    layer = int8_layer(64, 8)
    x = torch.randn(4, 64)
    x[0], x[1, 5], x[2, 7] = 0, torch.nan, torch.inf
    assert not to_digits(x)[0][:, 0].any()
    found = PackedInt8Linear(layer)(x)
    assert torch.equal(found[0], layer.bias)
    assert not found[1].isfinite().any() and not found[2].isfinite().any()
    torch.testing.assert_close(found[3], PackedInt8Linear(layer)(x[3:])[0])


@pytest.fixture
def every_size(monkeypatch):
    """Small matrices are packed too."""
    monkeypatch.setattr(int8_packing, "LARGE_WEIGHT", 0)


@packing
@pytest.mark.parametrize("tied", [False, True])
def test_packing_frees_the_old_weights_and_saves_the_same(tied, every_size):
    """A second copy of 20B's numbers would not fit."""
    model = use_int8_linear(random_model(NeoXConfig(**vars(CONFIG) | {"tie_word_embeddings": tied})))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(old) == 12 + (not tied)
    assert pack_int8(model) is model
    assert all(reference() is None for reference in old)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert sum(isinstance(module, PackedInt8Linear) for module in model.modules()) == len(old)


@packing
def test_a_packed_model_adds_next_to_nothing_to_the_rounding_of_its_weights(every_size):
    """Against fp32 arithmetic with the same int8 numbers: a fortieth of what the numbers themselves cost, measured."""
    exact = random_model(CONFIG)
    packed = our_model(exact, "packed-int8")
    same_numbers = copy.deepcopy(exact)
    for name, module in packed.named_modules():
        if isinstance(module, PackedInt8Linear):
            weight = module.weight.float() * module.scale[:, None]
            same_numbers.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    same_numbers.word_embeddings.weight = nn.Parameter(packed.word_embeddings.weight.float(), requires_grad=False)
    ids = torch.randint(0, 500, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = same_numbers(ids)
        cost = (wanted - exact(ids)).abs().mean()
        for tokens in (1, 2, 150):
            assert (packed(ids[:, :tokens]) - wanted[:, :tokens]).abs().mean() <= cost / 20, tokens


@packing
def test_packed_layers_take_the_plain_formula_for_what_they_cannot_do():
    """A gradient, half-precision activations, a single vector and no row at all."""
    layer = int8_layer(64, 32)
    packed = PackedInt8Linear(layer)
    x = torch.randn(1, 64, requires_grad=True)
    (slope,) = torch.autograd.grad(packed(x).sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(slope, expected)
    assert packed(torch.ones(1, 64).half()).dtype == torch.float16
    assert packed(torch.ones(64)).shape == (32,) and packed(torch.ones(2, 0, 64)).shape == (2, 0, 32)


@packing
def test_only_large_matrices_are_packed(monkeypatch):
    """A small one would become slower."""
    monkeypatch.setattr(int8_packing, "LARGE_WEIGHT", 512 * 128)
    model = pack_int8(use_int8_linear(random_model(CONFIG)))
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedInt8Linear)}
    assert packed == {"final_linear"} | {f"layers.{n}.mlp.{m}" for n in range(3) for m in MLP}


def test_without_fbgemm_packing_leaves_the_model_as_it_is(monkeypatch, every_size):
    """On a CPU of another kind the call must do no harm."""
    monkeypatch.setattr(int8_packing, "has_fbgemm", lambda: False)
    model = pack_int8(use_int8_linear(random_model(CONFIG)))
    assert not any(isinstance(module, PackedInt8Linear) for module in model.modules())
