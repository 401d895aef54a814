"""The fast layers give what nn.Linear gives; a reader would lose speed silently, or exactness, if they did not."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neox_lib.config import NeoXConfig
from neox_lib.decoding import linear
from neox_lib.decoding import packing as packing_module
from neox_lib.decoding.linear import (
    BLOCK_BYTES,
    FEW_ROWS,
    HALF_ROWS,
    LARGE_WEIGHT,
    FastLinear,
    use_fast_linear,
)
from neox_lib.decoding.packing import PackedLinear, has_fbgemm, pack_half
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel

# Relative to the size of a typical result. fp32 and block products differ from nn.Linear in the order of sums only; the
# fp16 product rounds row and result to 11 bits (2^-11 = 0.0005 each, and a large result is a few times a typical one).
EXACT, HALF = 2e-5, 4e-3
# Logits of a mixed model against fp32 ones from the same fp16 weights, relative to the largest logit: 3 times what
# models of 4 to 12 layers with random weights showed (0.0007 to 0.0013); the roundings of 2^-11 largely cancel out.
MIXED_LOGITS = 3e-3


def layer(dtype: torch.dtype, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs * 1000 + outputs)
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    plain.weight.data = plain.weight.data.to(dtype)
    return plain


def reference(plain: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())


def check(plain: nn.Linear, x: torch.Tensor) -> None:
    """FastLinear against float64 arithmetic with the same weights, to the tolerance of the path that it takes."""
    expected, found = reference(plain, x), FastLinear(plain)(x)
    halved = plain.weight.dtype == torch.float16 and x.numel() <= HALF_ROWS * plain.in_features
    assert found.dtype == torch.float32 and found.shape == expected.shape
    typical = max(1.0, float(expected.abs().mean()))
    assert float((found - expected).abs().max()) <= (HALF if halved else EXACT) * typical


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, HALF_ROWS, HALF_ROWS + 1, FEW_ROWS, FEW_ROWS + 1])
def test_large_weights_agree_on_both_sides_of_every_threshold(dtype, rows):
    """Large weights take paths that small ones never reach."""
    plain = layer(dtype, 771, 1025)
    assert plain.weight.numel() >= LARGE_WEIGHT
    check(plain, torch.randn(rows, 771))


@pytest.mark.parametrize(
    ("row", "column"), [(1e5, 2.0), (2e3, 40.0), (-4e7, 0.0)], ids=["input", "result", "both, by 0"]
)
@pytest.mark.parametrize("rows", range(1, HALF_ROWS + 2))
def test_numbers_past_fp16_are_multiplied_as_in_fp32(rows, row, column):
    """fp16 ends at 65504. A model with one such number wrote its prompt's token and then silently token 0."""
    plain, x = layer(torch.float16, 64, 32), torch.randn(rows, 64)
    x[-1, 5], plain.weight[:, 5] = row, column
    expected, found = reference(plain, x), FastLinear(plain)(x)
    assert float(expected.abs().max()) > 65504 or column == 0
    torch.testing.assert_close(found, expected.float(), rtol=EXACT if rows <= HALF_ROWS else 1e-5, atol=EXACT * 1e4)


def test_several_blocks_join_into_one_result(monkeypatch):
    """A block boundary that loses or doubles output columns would only show in models too large for a test."""
    monkeypatch.setattr(linear, "BLOCK_BYTES", 7 * 4 * 48)
    plain = layer(torch.float16, 48, 31)
    for rows in (HALF_ROWS + 1, 40):
        check(plain, torch.randn(rows, 48))
    assert BLOCK_BYTES >= 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (2, 0, 64), (1, 1, 64)])
def test_leading_dimensions_are_kept(dtype, shape):
    """Attention hands over [B, T, C], and a lesson may try a single vector."""
    plain = layer(dtype, 64, 32)
    assert FastLinear(plain)(torch.randn(shape)).shape == (*shape[:-1], 32)


def test_inputs_need_not_be_contiguous():
    """The product of a transposed view is that of its numbers, not of its memory."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(layer(dtype, 768, 1024), torch.randn(768, 2).t())
        check(layer(dtype, 768, 1024), torch.randn(768, 40).t())


def test_without_onednn_the_plain_product_serves(monkeypatch):
    """torch builds for some machines have no oneDNN."""
    monkeypatch.setattr(linear, "onednn_linear", None)
    check(layer(torch.float32, 771, 1025), torch.randn(1, 771))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_does_not_depend_on_the_rows_beside_it_beyond_rounding(dtype):
    """A batch must write what each of its prompts would write alone."""
    fast = FastLinear(layer(dtype, 768, 1024))
    x = torch.randn(6, 768)
    alone = torch.cat([fast(row[None]) for row in x])
    assert float((alone - fast(x)).abs().max()) <= HALF


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing_beyond_rounding(threads):
    """The same machine with another thread setting must give the same text."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check(layer(dtype, 768, 1024), torch.randn(1, 768))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gradient_asked_for_is_the_plain_one(dtype):
    """The fast paths know no gradient: without the fallback a training would silently stand still."""
    plain = layer(dtype, 768, 1024)
    x = torch.randn(1, 768, requires_grad=True)
    (slope,) = torch.autograd.grad(FastLinear(plain)(x).sum(), x)
    torch.testing.assert_close(slope, plain.weight.float().sum(dim=0)[None])

    fast = FastLinear(plain.requires_grad_(True))
    fast(torch.ones(1, 768)).sum().backward()
    assert fast.weight.grad is not None and bool((fast.weight.grad == 1).all())


def test_half_precision_activations_take_the_plain_path():
    """A model held in fp16 altogether, as on a GPU, still runs."""
    plain = layer(torch.float16, 64, 32).half()
    assert torch.equal(FastLinear(plain)(torch.ones(1, 64).half()), plain(torch.ones(1, 64).half()))


def small_config(**changes) -> NeoXConfig:
    return NeoXConfig(
        **{
            "vocab_size": 512,
            "tokenizer_vocab_size": 500,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "max_position_embeddings": 128,
            **changes,
        }
    )


def mixed_model(config: NeoXConfig, dtype: torch.dtype) -> NeoXModel:
    """Random weights about as large as trained ones, matrices in `dtype`, norms and biases in fp32."""
    torch.manual_seed(1)
    model = NeoXModel(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data = (0.05 * torch.randn_like(parameter)).to(dtype)
        elif name.endswith("bias"):
            parameter.data = 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_swapping_layers_moves_and_copies_nothing(tied):
    """A second copy of the weights would double the memory of a 20B model; other names would break saving it."""
    model = NeoXModel(small_config(tie_word_embeddings=tied))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    assert use_fast_linear(model) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert (model.final_linear.weight is model.word_embeddings.weight) == tied
    assert all(isinstance(module, FastLinear) for module in model.modules() if isinstance(module, nn.Linear))


def test_swapping_twice_changes_nothing_more():
    """Loading may be asked twice for the same model."""
    model = use_fast_linear(NeoXModel(small_config()))
    first = model.final_linear
    assert use_fast_linear(model).final_linear is first


def test_a_swapped_model_keeps_its_mode_and_can_be_copied():
    """`eval()` before the swap must hold after it, and a lesson copies models to change them."""
    model = use_fast_linear(NeoXModel(small_config()).eval())
    assert not any(module.training for module in model.modules())
    twin = copy.deepcopy(model)
    assert twin.final_linear.weight is not model.final_linear.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mixed_model_gives_the_fp32_logits_to_the_stated_tolerance(dtype):
    """Half the memory and twice the speed are worth having only if the model still says the same."""
    model = mixed_model(small_config(), dtype)
    exact = copy.deepcopy(model).float()
    use_fast_linear(model)
    ids = torch.randint(0, 500, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, expected = model(ids), exact(ids)
        single = torch.cat([model(ids[:, :1]), model(ids[:, :2])[:, 1:], model(ids[:, :3])[:, 2:]], dim=1)
    tolerance = MIXED_LOGITS * float(expected.abs().max())
    assert float((whole - expected).abs().max()) <= EXACT * float(expected.abs().max())  # many rows: fp32 arithmetic
    assert float((single - expected[:, :3]).abs().max()) <= tolerance


def test_greedy_tokens_of_a_mixed_model_differ_only_in_near_ties():
    """Text from fp16 weights may part from fp32's only where two tokens were as good as equal."""
    model = mixed_model(small_config(), torch.float16)
    exact = copy.deepcopy(model).float()
    use_fast_linear(model)
    ids = torch.randint(0, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    written = [step.token_id for step in stream_generate(model, ids, 80, stop_token_ids=())]
    with torch.inference_mode():
        logits = exact(torch.cat([ids, torch.tensor([written])], dim=1))[0, 19:-1, :500]
    tolerance = 2 * MIXED_LOGITS * float(logits.abs().max())  # each of the two may be off
    chosen = logits[torch.arange(80), torch.tensor(written)]
    assert float((logits.amax(dim=-1) - chosen).max()) <= tolerance


packing = pytest.mark.skipif(not has_fbgemm(), reason="this torch has no FBGEMM to pack for")


@packing
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), inputs=st.integers(1, 70), outputs=st.integers(1, 70), bias=st.booleans())
def test_packed_layers_are_as_exact_as_fp32(rows, inputs, outputs, bias):
    """Unlike the fp16 product, packing must cost no exactness, for any shape."""
    plain = layer(torch.float16, inputs, outputs, bias)
    x = torch.randn(rows, inputs)
    expected = reference(plain, x)
    found = PackedLinear(FastLinear(plain))(x)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= EXACT * max(1.0, float(expected.abs().mean()))


@packing
def test_a_weight_packed_in_several_parts_gives_one_result(monkeypatch):
    """Only 20B's matrices are packed in parts, too large for a test: a lost column there would go unseen."""
    monkeypatch.setattr(packing_module, "PACK_NUMBERS", 7 * 48)
    for bias in (False, True):
        plain = layer(torch.float16, 48, 31, bias)
        packed, x = PackedLinear(plain), torch.randn(2, 3, 48)
        assert len(packed.packed) == 5 and torch.equal(packed.weight, plain.weight)
        torch.testing.assert_close(packed(x), reference(plain, x).float(), rtol=EXACT, atol=EXACT)


@packing
def test_every_fp16_number_survives_packing():
    """Subnormals too: a packed model must save the weights that it was given."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(256, 256)
    plain = nn.Linear(256, 256, bias=False).requires_grad_(False)
    plain.weight.data = torch.where(bits.isfinite(), bits, torch.zeros_like(bits))
    assert torch.equal(PackedLinear(plain).weight, plain.weight)


@packing
@pytest.mark.parametrize("tied", [False, True])
def test_packing_frees_the_old_weights_and_saves_the_same(tied):
    """A second copy of 20B's weights would not fit; a tied output matrix shares the embedding's memory and stays."""
    model = use_fast_linear(mixed_model(small_config(tie_word_embeddings=tied), torch.float16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = [weakref.ref(m.weight) for name, m in model.named_modules() if type(m) is FastLinear and "final" not in name]
    assert pack_half(model) is model
    assert len(old) == 16 and all(reference() is None for reference in old)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert type(model.final_linear) is (FastLinear if tied else PackedLinear)


@packing
def test_packing_frees_each_weight_before_the_next(monkeypatch):
    """At its peak, packing holds one model and one matrix, not two models."""
    model = use_fast_linear(mixed_model(small_config(), torch.float16))
    old = [weakref.ref(module.weight) for module in model.modules() if type(module) is FastLinear]
    alive = []

    def pack_one(child):
        alive.append(sum(reference() is not None for reference in old))
        return PackedLinear(child)

    monkeypatch.setattr(packing_module, "PackedLinear", pack_one)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pack_half(model)
    assert alive == list(range(len(old), 0, -1))


@packing
def test_a_packed_model_gives_the_fp32_logits():
    """The whole model, prefill and single tokens, to the order of sums."""
    model = mixed_model(small_config(), torch.float16)
    exact = copy.deepcopy(model).float()
    pack_half(use_fast_linear(model))
    ids = torch.randint(0, 500, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = exact(ids)
        for tokens in (1, 2, 60):
            difference = float((model(ids[:, :tokens]) - expected[:, :tokens]).abs().max())
            assert difference <= EXACT * float(expected.abs().max()), tokens


@packing
def test_packed_layers_take_the_plain_formula_for_what_they_cannot_do():
    """A gradient, half-precision activations and a single vector give what the plain layer gives."""
    plain = layer(torch.float16, 64, 32)
    packed = PackedLinear(plain)
    x = torch.randn(1, 64, requires_grad=True)
    (slope,) = torch.autograd.grad(packed(x).sum(), x)
    torch.testing.assert_close(slope, plain.weight.float().sum(dim=0)[None])
    assert packed(torch.ones(1, 64).half()).dtype == torch.float16
    assert packed(torch.ones(64)).shape == (32,) and packed(torch.ones(2, 0, 64)).shape == (2, 0, 32)


@packing
def test_only_fp16_is_packed():
    """fp32 weights rounded to fp16 without a word would be another model."""
    model = use_fast_linear(mixed_model(small_config(), torch.float32))
    assert not any(isinstance(module, PackedLinear) for module in pack_half(model).modules())
    with pytest.raises(TypeError, match="only fp16"):
        PackedLinear(layer(torch.float32, 8, 8))


def test_without_fbgemm_packing_leaves_the_model_as_it_is(monkeypatch):
    """On a CPU of another kind the call must do no harm."""
    monkeypatch.setattr(packing_module, "has_fbgemm", lambda: False)
    model = use_fast_linear(mixed_model(small_config(), torch.float16))
    assert not any(isinstance(module, PackedLinear) for module in pack_half(model).modules())
