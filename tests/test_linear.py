"""Weights stored in fewer bits give the products of the numbers that they stand for, on any device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neox_lib.model import NeoXModel
from neox_lib.quantization import linear
from neox_lib.quantization.linear import CastLinear, use_cast_linear
from tests.small_models import BASE, family

EXACT = 2e-5  # fp32 sums in another order, relative to the size of a typical result


def layer(dtype: torch.dtype, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs * 1000 + outputs)
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    plain.weight.data = plain.weight.data.to(dtype)
    return plain


def check(plain: nn.Linear, x: torch.Tensor) -> None:
    """CastLinear against float64 arithmetic with the same weights."""
    bias = None if plain.bias is None else plain.bias.double()
    expected, found = F.linear(x.double(), plain.weight.double(), bias), CastLinear(plain)(x)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found - expected).abs().max()) <= EXACT * max(1.0, float(expected.abs().mean()))


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
)
def test_any_shape_gives_what_nn_linear_gives(dtype, rows, inputs, outputs, bias):
    """A wrong product for an odd shape or a certain number of rows would be a wrong model."""
    check(layer(dtype, inputs, outputs, bias), torch.randn(rows, inputs))


def test_several_blocks_join_into_one_result(monkeypatch):
    """A block boundary that loses or doubles output columns would only show in models too large for a test."""
    monkeypatch.setattr(linear, "BLOCK_BYTES", 7 * 4 * 48)
    for rows in (1, 40):
        check(layer(torch.float16, 48, 31), torch.randn(rows, 48))


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (2, 0, 64)])
def test_leading_dimensions_are_kept(shape):
    """Attention hands over [B, T, C], and a lesson may try a single vector."""
    assert CastLinear(layer(torch.float16, 64, 32))(torch.randn(shape)).shape == (*shape[:-1], 32)


def test_numbers_past_fp16_are_multiplied_in_fp32():
    """fp16 ends at 65504. A model with one such number wrote its prompt's token and then silently token 0."""
    plain, x = layer(torch.float16, 64, 32), torch.randn(2, 64)
    x[-1, 5], plain.weight[:, 5] = 2e3, 40.0
    assert CastLinear(plain)(x).isfinite().all() and CastLinear(plain)(x)[-1].abs().min() > 65504


def test_a_gradient_asked_for_is_the_plain_one():
    """Without it a training would silently stand still."""
    plain, x = layer(torch.float16, 64, 32), torch.randn(1, 64, requires_grad=True)
    (slope,) = torch.autograd.grad(CastLinear(plain)(x).sum(), x)
    torch.testing.assert_close(slope, plain.weight.float().sum(dim=0)[None])


def halved(**changes) -> NeoXModel:
    """Matrices in fp16, norms and biases in fp32."""
    torch.manual_seed(1)
    model = NeoXModel(family(BASE).get(changes.pop("member", ""), BASE)).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.half()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_swapping_layers_moves_and_copies_nothing(tied):
    """A second copy of the weights would double the memory of a 20B model; other names would break saving it."""
    model = halved(member="tied" if tied else "")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert use_cast_linear(model) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert (model.final_linear.weight is model.word_embeddings.weight) == tied
    assert all(type(module) is CastLinear for module in model.modules() if isinstance(module, nn.Linear))
    assert not any(module.training for module in model.modules())
    first = model.final_linear
    assert use_cast_linear(model).final_linear is first
    assert copy.deepcopy(model).final_linear.weight is not first.weight


def test_an_fp32_model_keeps_its_own_layers():
    """The shipped model runs the pieces that the notebooks build."""
    model = use_cast_linear(NeoXModel(BASE))
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))


def test_a_model_with_fp16_matrices_gives_the_fp32_logits():
    """Half the memory is worth having only if the model still says the same."""
    model = halved()
    exact = copy.deepcopy(model).float()
    ids = torch.randint(0, BASE.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = exact(ids), use_cast_linear(model)(ids)
    assert float((found - expected).abs().max()) <= EXACT * float(expected.abs().max())
