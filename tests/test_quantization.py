"""Int8: every weight within half a step, the product of the right numbers, and a model that still says the same."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.checkpoints.quantized import int8_bytes, is_quantized
from neox_lib.config import neox_20b, tiny
from neox_lib.evaluation.corpus import stories_of, story_stream
from neox_lib.evaluation.likelihood import perplexity
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.precision import format_card, needs
from neox_lib.quantization import int8 as quantization
from neox_lib.quantization import linear
from neox_lib.quantization.int8 import dequantize_rows, quantize_rows
from neox_lib.quantization.linear import Int8Linear, use_int8_linear

HALVES = (torch.float32, torch.float16, torch.bfloat16)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    exponent=st.integers(-44, 38),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 999),
)
def test_every_weight_comes_back_within_half_a_step(rows, columns, exponent, dtype, seed):
    """From the smallest fp32 numbers to the largest: what a step is, each row decides for itself."""
    weight = (matrix(rows, columns, seed).clamp(-3, 3) * 10.0**exponent).to(dtype)
    weight = torch.where(weight.isfinite(), weight, torch.ones((), dtype=dtype))
    numbers, scales = quantize_rows(weight)
    assert numbers.dtype == torch.int8 and scales.dtype == torch.float32
    assert numbers.shape == weight.shape and scales.shape == (rows,)
    assert int(numbers.abs().max()) <= 127 and int(numbers.min()) > -128
    error = (numbers.double() * scales.double()[:, None] - weight.double()).abs()
    assert (error <= scales.double()[:, None] * (0.5 + 1e-4)).all() and (scales > 0).all()
    largest = weight.float().abs().amax(dim=1)
    assert (scales[largest > 1e-35] <= largest[largest > 1e-35] / 127 * 1.0001).all(), "steps are wider than need be"


def test_the_largest_of_each_row_is_127_and_the_sign_is_kept():
    weight = torch.tensor([[1.0, -0.5], [-3e4, 1e4], [0.0, 0.0]])
    numbers, scales = quantize_rows(weight)
    assert numbers.tolist() == [[127, -64], [-127, 42], [0, 0]]
    assert torch.equal(dequantize_rows(numbers, scales)[2], torch.zeros(2))
    assert (scales > 0).all(), "a scale of 0 makes 0 / 0, and what int8 makes of NaN differs between machines"
    assert torch.equal(quantize_rows(-weight)[0], -numbers)


def test_blocks_of_a_large_matrix_are_quantized_as_the_whole(monkeypatch):
    weight = matrix(50, 30)
    whole = quantize_rows(weight)
    monkeypatch.setattr(quantization, "BLOCK_NUMBERS", 100)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_rows(weight), strict=True))


def test_the_weight_itself_is_left_alone():
    weight = matrix(5, 6)
    before = weight.clone()
    quantize_rows(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_are_refused_by_row(value):
    weight = matrix(4, 6)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="row 2 holds NaN or infinity"):
        quantize_rows(weight)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(0, 3), torch.zeros(2, 2).double(), torch.ones(2, 2).int()],
)
def test_anything_but_a_matrix_of_weights_is_refused(weight):
    with pytest.raises(ValueError, match="only a matrix"):
        quantize_rows(weight)


def int8_layer(inputs: int, outputs: int, bias: bool = True) -> Int8Linear:
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return Int8Linear(*quantize_rows(plain.weight), plain.bias)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(192, 576), (48, 33), (1, 4)])
def test_the_product_is_that_of_what_the_numbers_stand_for(monkeypatch, rows, inputs, outputs):
    """In several blocks, each with the scales of its own rows."""
    monkeypatch.setattr(linear, "BLOCK_BYTES", 4 * 192 * 100)
    layer, x = int8_layer(inputs, outputs), matrix(rows, inputs)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    expected = F.linear(x.double(), weight, layer.bias.double())
    found = layer(x[None])[0]
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().mean().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_take_the_plain_way(dtype):
    """The way of a GPU: dequantized, then multiplied. Results past 65504 before scaling must not become infinite."""
    layer = Int8Linear(torch.full((3, 4096), 127, dtype=torch.int8), torch.full((3,), 1e-3))
    found = layer(torch.ones(2, 4096, dtype=dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), torch.tensor(0.127 * 4096), rtol=1e-2)


@pytest.mark.gpu
def test_on_cuda_the_products_are_those_of_the_cpu():
    layer, x = int8_layer(192, 576), matrix(5, 192)
    expected = F.linear(x.double(), layer.weight.double() * layer.scale.double()[:, None], layer.bias.double())
    found = layer.cuda()(x.cuda())
    assert (found.cpu() - expected).abs().max() <= 1e-2


def test_a_gradient_reaches_the_input():
    layer, x = int8_layer(192, 8, bias=False), matrix(2, 192).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], dequantize_rows(layer.weight, layer.scale).sum(dim=0), atol=1e-5)


@pytest.mark.parametrize("scales", [torch.ones(6), torch.ones(4, 1), torch.ones(1, 4)])
def test_scales_of_the_wrong_axis_are_refused(scales):
    with pytest.raises(ValueError, match="one scale per row"):
        Int8Linear(torch.zeros(4, 6, dtype=torch.int8), scales)


def test_scales_of_columns_would_be_noticed():
    """A square matrix hides a wrong axis from every shape check; the numbers tell."""
    weight = matrix(64, 64) * torch.logspace(-2, 2, 64)[:, None]
    numbers, scales = quantize_rows(weight)
    assert ((dequantize_rows(numbers, scales) - weight).abs() <= scales[:, None] * 0.501).all()
    wrong = numbers.float() * scales  # along the columns: the same shape
    assert ((wrong - weight).abs() > scales[:, None]).float().mean() > 0.5
    x = matrix(2, 64)
    expected = x @ weight.T
    assert ((Int8Linear(numbers, scales)(x) - expected).abs() <= 0.3 * weight.norm(dim=1)).all()


@pytest.fixture(scope="module")
def models():
    return create_model(device="cpu", dtype="float32"), create_model(device="cpu", dtype="int8")


@torch.inference_mode()
def perplexity_ratio(exact, rounded, ids):
    return perplexity(rounded, ids) / perplexity(exact, ids)


@torch.inference_mode()
def test_the_shipped_model_is_as_good_in_int8(models):
    """On tales that it never saw: perplexity within 1 %, logits close, and nearly always the same likeliest token."""
    stories = stories_of((SHIPPED_MODEL.parent / "wilde_tales.txt").read_text("utf-8"))
    ids = story_stream(create_tokenizer(), stories)[None, :2048]
    assert abs(perplexity_ratio(*models, ids) - 1) < 0.01
    exact, rounded = (model(ids)[0] for model in models)
    errors = (exact - rounded).abs()
    assert errors.mean() < 0.01 * exact.std() and errors.max() < 0.15 * exact.std()
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.97


def test_the_cost_of_a_wrong_scale_shows(models):
    """The bound of 1 % means something: scales moved on by one row cost far more."""
    exact, rounded = models
    layer = rounded.layers[0].mlp.dense_h_to_4h
    with torch.no_grad():
        good = layer.scale.clone()
        layer.scale.copy_(good.roll(1))
        ratio = perplexity_ratio(exact, rounded, torch.arange(2, 400)[None])
        layer.scale.copy_(good)
    assert abs(ratio - 1) > 0.01


def test_what_becomes_int8_and_what_stays(models):
    found = {name: parameter.dtype for name, parameter in models[1].named_parameters()}
    assert found.pop("word_embeddings.weight") == torch.float16
    for name, dtype in found.items():
        matrix_weight = name.endswith(".weight") and "norm" not in name
        assert dtype == (torch.int8 if matrix_weight else torch.float32), name
    assert is_quantized("final_linear.weight", 2) and not is_quantized("word_embeddings.weight", 2)


def test_a_tied_output_matrix_stays_the_embedding(random_model, token_ids):
    config = dataclasses.replace(tiny(), tie_word_embeddings=True)
    model = random_model(config).requires_grad_(False)
    ids, before = token_ids(config, 1, 20), None
    before = model(ids)
    assert use_int8_linear(model).final_linear.weight is model.word_embeddings.weight
    assert model.word_embeddings.weight.dtype == torch.float32
    assert not any(type(module) is nn.Linear and module is not model.final_linear for module in model.modules())
    assert (model(ids) - before).abs().mean() < 0.05 * before.std()


def test_a_layer_that_can_not_be_quantized_is_named(random_model):
    model = random_model(tiny()).requires_grad_(False)
    model.layers[1].mlp.dense_h_to_4h.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.dense_h_to_4h: row 3 holds NaN"):
        use_int8_linear(model)


def test_the_calculator_counts_what_a_model_holds(models):
    """The bytes that it tells before loading are those of the loaded model, and a token reads all but the embedding."""
    held = sum(parameter.nbytes for parameter in models[1].parameters())
    assert int8_bytes(tiny()) == held
    by_name = {need.precision: need for need in needs(tiny(), 256)}
    assert by_name["int8"].weights == held
    assert by_name["int8"].read == held - models[1].word_embeddings.weight.nbytes
    assert by_name["float32"].weights == sum(parameter.nbytes for parameter in models[0].parameters())
    assert by_name["int8"].longest(held + 500_000_000 + by_name["int8"].cache // 2, 256) == 128
    assert by_name["int8"].longest(held, 256) == 0


def test_a_card_of_40_gb_has_room_for_a_cache_beside_int8_only():
    """20B's 41.1 GB of fp16 weights leave nothing; int8's 20.9 GB leave 18.6, at 1.08 MB of cache in fp16 per token."""
    rows = [line.split() for line in format_card(neox_20b(), 40 * 10**9).splitlines()[1:]]
    assert [(row[0], " ".join(row[3:])) for row in rows] == [
        ("float32", "none"),
        ("float16", "none"),
        ("int8", "17,214 tokens"),
    ]


def test_int8_is_taken_when_nothing_else_fits(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("neox_lib.precision.free_memory", lambda device: 5_000_000)
    model = create_model(device="cpu")
    assert isinstance(model.layers[0].attention.dense, Int8Linear) and isinstance(model, NeoXModel)
    (said,) = caplog.messages
    assert "do not fit" in said and "int8" in said
