"""Int8 and int4: weights within half a step, the product of the right numbers, a model that still says the same."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.checkpoints.quantized import is_quantized, quantized_bytes
from neox_lib.config import neox_20b, tiny
from neox_lib.evaluation.corpus import stories_of, story_stream
from neox_lib.evaluation.likelihood import perplexity
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.precision import format_card, needs
from neox_lib.quantization import linear
from neox_lib.quantization.int4 import GROUP, dequantize_groups, quantize_groups
from neox_lib.quantization.int8 import dequantize_rows, quantize_rows
from neox_lib.quantization.linear import QUANTIZED, QuantizedLinear, quantize, use_quantized_linear

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


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    exponent=st.integers(-30, 37),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 999),
)
def test_every_weight_within_its_groups_range_comes_back_within_half_a_step_of_int4(
    rows, groups, exponent, dtype, seed
):
    weight = (matrix(rows, GROUP * groups, seed).clamp(-3, 3) * 10.0**exponent).to(dtype)
    weight = torch.where(weight.isfinite(), weight, torch.ones((), dtype=dtype))
    nibbles, scales = quantize_groups(weight)
    assert nibbles.dtype == torch.uint8 and nibbles.shape == (rows, groups, GROUP // 2)
    assert scales.dtype == torch.bfloat16 and scales.shape == (rows, groups)
    step = scales.double().repeat_interleave(GROUP, dim=1)
    place, error = (
        (weight.double() / step).nan_to_num(),
        (dequantize_groups(nibbles, scales).double() - weight.double()).abs(),
    )
    inside = (place >= -8.5) & (place <= 7.5)
    assert (error <= step.abs() * (0.5 + 1e-4))[inside].all()
    assert inside.double().mean() > 0.8 and (place.abs() < 10).all(), "steps are finer than need be"


def test_the_scale_of_a_group_beats_the_plain_one():
    """Squared error over many groups against the largest weight at -8, the rule of llama.cpp's Q4_0: 9 % less."""
    weight = matrix(64, 32 * GROUP)
    groups = weight.view(-1, GROUP)
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    plain = (groups / (largest / -8)).round().clamp(-8, 7) * (largest / -8)
    found = dequantize_groups(*quantize_groups(weight)).view(-1, GROUP)
    assert (found - groups).square().sum() < 0.92 * (plain - groups).square().sum()


def test_groups_have_scales_of_their_own_and_halves_keep_their_places():
    """One large weight, at each place in turn: it comes back there, and nothing beside it or in the next group."""
    weight = torch.cat([torch.eye(GROUP), torch.eye(GROUP) * -1e-3], dim=1)
    nibbles, scales = quantize_groups(weight)
    assert torch.allclose(dequantize_groups(nibbles, scales), weight, rtol=0.004, atol=0)
    assert torch.equal(dequantize_groups(*quantize_groups(torch.zeros(2, GROUP))), torch.zeros(2, GROUP))
    assert torch.equal(quantize_groups(weight.T.contiguous().T)[0], nibbles)


def test_the_largest_of_each_row_is_127_and_the_sign_is_kept():
    weight = torch.tensor([[1.0, -0.5], [-3e4, 1e4], [0.0, 0.0]])
    numbers, scales = quantize_rows(weight)
    assert numbers.tolist() == [[127, -64], [-127, 42], [0, 0]]
    assert torch.equal(dequantize_rows(numbers, scales)[2], torch.zeros(2))
    assert (scales > 0).all(), "a scale of 0 makes 0 / 0, and what int8 makes of NaN differs between machines"
    assert torch.equal(quantize_rows(-weight)[0], -numbers)


@pytest.mark.parametrize(("kind", "size"), [("int8", "BLOCK_NUMBERS"), ("int4", "BLOCK_WEIGHTS")])
def test_blocks_of_a_large_matrix_are_quantized_as_the_whole_and_it_is_left_alone(monkeypatch, kind, size):
    weight = matrix(50, 64)
    whole, before = quantize(weight, QUANTIZED[kind]), weight.clone()
    monkeypatch.setattr(f"neox_lib.quantization.{kind}.{size}", 200)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(weight, QUANTIZED[kind]), strict=True))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_are_refused_by_row(value, kind):
    weight = matrix(4, 64)
    weight[2, 35] = value
    with pytest.raises(ValueError, match="row 2 holds NaN or infinity"):
        quantize(weight, QUANTIZED[kind])


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(0, 3), torch.zeros(2, 2).double(), torch.ones(2, 2).int()],
)
def test_anything_but_a_matrix_of_weights_is_refused(weight):
    for dtype in QUANTIZED.values():
        with pytest.raises(ValueError, match="only a matrix"):
            quantize(weight, dtype)


def layer_of(inputs: int, outputs: int, kind: str = "int8", bias: bool = True) -> QuantizedLinear:
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return QuantizedLinear(*quantize(plain.weight, QUANTIZED[kind]), plain.bias)


def dequantized(layer: QuantizedLinear) -> torch.Tensor:
    return (dequantize_rows if layer.weight.dtype == torch.int8 else dequantize_groups)(layer.weight, layer.scale)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize(
    ("inputs", "outputs", "kind"),
    [(192, 576, "int8"), (48, 33, "int8"), (1, 4, "int8"), (192, 576, "int4"), (32, 33, "int4")],
)
def test_the_product_is_that_of_what_the_numbers_stand_for(monkeypatch, rows, inputs, outputs, kind):
    """In several blocks, each with the scales of its own rows."""
    monkeypatch.setattr(linear, "BLOCK_BYTES", 4 * 192 * 100)
    layer, x = layer_of(inputs, outputs, kind), matrix(rows, inputs)
    assert f"in_features={inputs}, out_features={outputs}" in repr(layer)
    expected = F.linear(x.double(), dequantized(layer).double(), layer.bias.double())
    found = layer(x[None])[0]
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().mean().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_take_the_plain_way(dtype):
    """The way of a GPU: dequantized, then multiplied. Results past 65504 before scaling must not become infinite."""
    layer = QuantizedLinear(torch.full((3, 4096), 127, dtype=torch.int8), torch.full((3,), 1e-3))
    found = layer(torch.ones(2, 4096, dtype=dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), torch.tensor(0.127 * 4096), rtol=1e-2)
    layer = layer_of(64, 5, "int4")
    expected = layer(torch.ones(2, 64))
    assert torch.allclose(layer(torch.ones(2, 64, dtype=dtype)).float(), expected, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTIZED)
def test_on_cuda_the_products_are_those_of_the_cpu(kind):
    layer, x = layer_of(192, 576, kind), matrix(5, 192)
    expected = F.linear(x.double(), dequantized(layer).double(), layer.bias.double())
    found = layer.cuda()(x.cuda())
    assert (found.cpu() - expected).abs().max() <= 1e-2


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_gradient_reaches_the_input(kind):
    layer, x = layer_of(192, 8, kind, bias=False), matrix(2, 192).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], dequantized(layer).sum(dim=0), atol=1e-5)


@pytest.mark.parametrize("scales", [torch.ones(6), torch.ones(4, 1), torch.ones(1, 4)])
def test_scales_of_the_wrong_axis_are_refused(scales):
    with pytest.raises(ValueError, match="one scale per row"):
        QuantizedLinear(torch.zeros(4, 6, dtype=torch.int8), scales)
    with pytest.raises(ValueError, match="one per group"):
        QuantizedLinear(torch.zeros(4, 2, GROUP // 2, dtype=torch.uint8), scales)


def test_scales_of_columns_would_be_noticed():
    """A square matrix hides a wrong axis from every shape check; the numbers tell."""
    weight = matrix(64, 64) * torch.logspace(-2, 2, 64)[:, None]
    numbers, scales = quantize_rows(weight)
    assert ((dequantize_rows(numbers, scales) - weight).abs() <= scales[:, None] * 0.501).all()
    wrong = numbers.float() * scales  # along the columns: the same shape
    assert ((wrong - weight).abs() > scales[:, None]).float().mean() > 0.5
    x = matrix(2, 64)
    expected = x @ weight.T
    assert ((QuantizedLinear(numbers, scales)(x) - expected).abs() <= 0.3 * weight.norm(dim=1)).all()


@pytest.fixture(scope="module")
def models():
    """The shipped model by precision."""
    return {dtype: create_model(device="cpu", dtype=dtype) for dtype in ("float32", *QUANTIZED)}


@torch.inference_mode()
def perplexity_ratio(exact, rounded, ids):
    return perplexity(rounded, ids) / perplexity(exact, ids)


@pytest.fixture(scope="module")
def held_out():
    """2048 tokens of tales that the model never saw."""
    stories = stories_of((SHIPPED_MODEL.parent / "wilde_tales.txt").read_text("utf-8"))
    return story_stream(create_tokenizer(), stories)[None, :2048]


@pytest.mark.parametrize(
    ("kind", "perplexity", "mean", "most", "same"), [("int8", 0.01, 0.01, 0.15, 0.97), ("int4", 0.02, 0.05, 0.8, 0.9)]
)
@torch.inference_mode()
def test_the_shipped_model_is_as_good(models, held_out, kind, perplexity, mean, most, same):
    """Perplexity within 1 % in int8 and 2 % in int4, logits close, and mostly the same likeliest token."""
    exact, rounded = models["float32"], models[kind]
    assert abs(perplexity_ratio(exact, rounded, held_out) - 1) < perplexity
    exact, rounded = exact(held_out)[0], rounded(held_out)[0]
    errors = (exact - rounded).abs()
    print(
        errors.mean() / exact.std(), errors.max() / exact.std(), (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
    )
    assert errors.mean() < mean * exact.std() and errors.max() < most * exact.std()
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > same


@torch.inference_mode()
def test_int4_moves_the_logits_less_than_the_plain_scale(models, held_out):
    """Beside Q4_0 of llama.cpp, whose scale puts the largest weight of 32 at -8, in the same layers."""
    exact, plain = models["float32"], copy.deepcopy(models["float32"])
    for layer in plain.layers.modules():
        if isinstance(layer, nn.Linear):
            groups = layer.weight.view(-1, GROUP)
            scale = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True)) / -8
            groups.copy_((groups / scale).round().clamp(-8, 7) * scale)
    plain.final_linear = models["int8"].final_linear
    errors = [(model(held_out) - exact(held_out)).square().mean() for model in (models["int4"], plain)]
    assert errors[0] < 0.97 * errors[1]


def test_the_cost_of_a_wrong_scale_shows(models):
    """The bound of 1 % means something: scales moved on by one row cost far more."""
    exact, rounded = models["float32"], models["int8"]
    layer = rounded.layers[0].mlp.dense_h_to_4h
    with torch.no_grad():
        good = layer.scale.clone()
        layer.scale.copy_(good.roll(1))
        ratio = perplexity_ratio(exact, rounded, torch.arange(2, 400)[None])
        layer.scale.copy_(good)
    assert abs(ratio - 1) > 0.01


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_is_quantized_and_what_stays(models, kind):
    found = {name: parameter.dtype for name, parameter in models[kind].named_parameters()}
    assert found.pop("word_embeddings.weight") == torch.float16
    assert found.pop("final_linear.weight") == torch.int8 and found.pop("final_linear.scale") == torch.float32
    for name, dtype in found.items():
        if name.endswith(".weight") and "norm" not in name:
            assert dtype == QUANTIZED[kind], name
        else:
            assert dtype == (torch.bfloat16 if kind == "int4" and name.endswith("scale") else torch.float32), name
    assert is_quantized("final_linear.weight", 2) and not is_quantized("word_embeddings.weight", 2)


def test_a_tied_output_matrix_stays_the_embedding(random_model, token_ids):
    config = dataclasses.replace(tiny(), tie_word_embeddings=True)
    model = random_model(config).requires_grad_(False)
    ids, before = token_ids(config, 1, 20), None
    before = model(ids)
    assert use_quantized_linear(model).final_linear.weight is model.word_embeddings.weight
    assert model.word_embeddings.weight.dtype == torch.float32
    assert not any(type(module) is nn.Linear and module is not model.final_linear for module in model.modules())
    assert (model(ids) - before).abs().mean() < 0.05 * before.std()


def test_a_layer_that_can_not_be_quantized_is_named(random_model):
    model = random_model(tiny()).requires_grad_(False)
    model.layers[1].mlp.dense_h_to_4h.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.dense_h_to_4h: row 3 holds NaN"):
        use_quantized_linear(model)


def test_the_calculator_counts_what_a_model_holds(models):
    """The bytes that it tells before loading are those of the loaded model, and a token reads all but the embedding."""
    by_name = {need.precision: need for need in needs(tiny(), 256)}
    for kind, model in models.items():
        held = sum(parameter.nbytes for parameter in model.parameters())
        assert by_name[kind].weights == held
        assert by_name[kind].read == held - model.word_embeddings.weight.nbytes
    held = quantized_bytes(tiny())
    assert by_name["int8"].longest(held + 500_000_000 + by_name["int8"].cache // 2, 256) == 128
    assert by_name["int8"].longest(held, 256) == 0


def test_a_card_of_40_gb_has_room_for_a_cache_beside_rounded_weights_only():
    """20B's 41.1 GB of fp16 weights leave nothing; int8's 20.9 GB leave 18.6, at 1.08 MB of cache in fp16 per token;
    int4's 12.2 GB leave 27.3.
    """
    rows = [line.split() for line in format_card(neox_20b(), 40 * 10**9).splitlines()[1:]]
    assert [(row[0], " ".join(row[3:])) for row in rows] == [
        ("float32", "none"),
        ("float16", "none"),
        ("int8", "17,214 tokens"),
        ("int4", "25,287 tokens"),
    ]


@pytest.mark.parametrize(("free", "kind"), [(5_000_000, "int8"), (3_000_000, "int4")])
def test_fewer_bits_are_taken_when_nothing_else_fits(monkeypatch, caplog, free, kind):
    caplog.set_level("INFO")
    monkeypatch.setattr("neox_lib.precision.free_memory", lambda device: free)
    model = create_model(device="cpu")
    assert model.layers[0].attention.dense.weight.dtype == QUANTIZED[kind] and isinstance(model, NeoXModel)
    (said,) = caplog.messages
    assert "do not fit" in said and kind in said


def test_20b_in_int4_fits_beside_a_laptops_other_programs():
    """13 GiB with a cache of 512 tokens in fp32, what is left of 16 GB."""
    need = next(need for need in needs(neox_20b(), 512) if need.precision == "int4")
    assert need.weights + need.cache < 12.4 * 2**30 and need.fits(13 * 2**30)
