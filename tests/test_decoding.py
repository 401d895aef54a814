"""The compiled loops say what the modules say, whatever the model, and step back where the modules are wanted.

The first run compiles them, some ten seconds for each dtype; the results are kept on disk.
"""

import copy
import gc
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neox_lib.block import MLP
from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.decoding import step
from neox_lib.decoding.step import addresses_of, compiled_step, multiply_few, use_compiled_step
from neox_lib.generation import stream_generate
from neox_lib.loading import create_model
from neox_lib.model import NeoXModel
from neox_lib.padding import pad_left
from neox_lib.quantization.int4 import dequantize_groups, quantize_groups
from neox_lib.quantization.int8 import dequantize_rows, quantize_rows
from neox_lib.quantization.linear import QUANTIZED, use_cast_linear, use_quantized_linear
from tests.small_models import BASE, family, randomize

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# fp32 sums in another order; int8: the loops round activations to 2^-15 of a row's largest, and the modules don't.
EXACT, ROUNDED = 1e-5, 2e-3


def model_of(config: NeoXConfig, dtype: str = "float32", seed: int = 0) -> NeoXModel:
    """Random weights as `create_model` holds them on a CPU, with the loops plugged in."""
    model = NeoXModel(config).requires_grad_(False).eval()
    randomize(model, seed, gain=1.0)
    if dtype in QUANTIZED:
        use_quantized_linear(model, QUANTIZED[dtype])
    elif dtype != "float32":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype)) if parameter.dim() == 2 else parameter.data
        use_cast_linear(model)
    model.step = compiled_step
    return model


def cache_for(model: NeoXModel, batch: int, capacity: int) -> KVCache:
    return KVCache(model.config, batch, capacity, CPU, torch.float32)


@torch.inference_mode()
def both(model: NeoXModel, parts: list[Tensor], padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The logits of all parts one after another, through the loops and through the modules, whose caches must agree."""
    found, caches = [], []
    for plug in (compiled_step, None):
        model.step = plug
        cache = cache_for(model, len(parts[0]), sum(part.shape[1] for part in parts))
        found.append(torch.cat([model(part, cache, padding=padding) for part in parts], dim=1))
        caches.append(torch.stack([cache.keys, cache.values]))
    first = 0 if padding is None else int(padding.max())
    scale = float(caches[1].abs().max())
    assert (caches[0] - caches[1])[..., first:, :].abs().max() <= ROUNDED * scale
    return found[0][:, first:], found[1][:, first:]


def check(found: tuple[Tensor, Tensor], tolerance: float = EXACT) -> None:
    compiled, plain = found
    assert compiled.shape == plain.shape and compiled.dtype == torch.float32
    assert float((compiled - plain).abs().max()) <= tolerance * float(plain.abs().max())


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The rows of each pass that went through the loops."""
    from neox_lib.decoding import loops

    seen, real = [], loops.forward
    monkeypatch.setattr(loops, "forward", lambda *work: seen.append(len(work[6].hidden)) or real(*work))
    return seen


@st.composite
def configs(draw) -> NeoXConfig:
    heads, size = draw(st.integers(1, 4)), draw(st.integers(4, 9))
    return NeoXConfig(
        vocab_size=draw(st.integers(5, 90)),
        tokenizer_vocab_size=5,
        hidden_size=heads * size,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 50)),
        max_position_embeddings=36,
        rotary_pct=min(1.0, 2 * draw(st.integers(1, size // 2)) / size + 1e-9),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_fast"])),
        use_parallel_residual=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )


@torch.inference_mode()
def rounding_moves(model: NeoXModel, ids: Tensor) -> float:
    """How far the logits move with the weights' last digits: a norm over few, nearly equal numbers magnifies them."""
    exact, moves = model(ids), []
    for seed in range(4):
        nudged, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        for parameter in nudged.parameters():
            parameter.mul_(1 + (torch.rand(parameter.shape, generator=generator) - 0.5) * 2**-23)
        moves.append(float((nudged(ids) - exact).abs().max()))
    return max(moves)


@settings(max_examples=40, deadline=None)
@given(config=configs(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_model_in_any_pieces_says_what_its_modules_say(config, sizes, seed):
    """Odd head sizes, any rotary share, parallel or not, tied or not, biases or none, and any splitting of a text."""
    ids = torch.randint(5, (1, sum(sizes)), generator=torch.Generator().manual_seed(seed))
    model = model_of(config, seed=seed)
    found = both(model, list(ids.split(sizes, dim=1)))
    assume(rounding_moves(model, ids) <= EXACT / 2 * float(found[1].abs().max()))  # else fp32 holds no such digits
    check(found)


@pytest.mark.parametrize("dtype", ["float16", *QUANTIZED])
@pytest.mark.parametrize("member", ["20b rules", "sequential residual", "yarn"])
def test_weights_in_fewer_bits_say_what_their_modules_say(dtype, member):
    config = family(BASE)[member]
    ids = torch.randint(BASE.vocab_size, (1, 9), generator=torch.Generator().manual_seed(3))
    found = both(model_of(config, dtype), list(ids.split([1, 1, 3, 1, 3], dim=1)))
    check(found, ROUNDED if dtype in QUANTIZED else EXACT)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", *QUANTIZED])
def test_a_product_is_that_of_the_numbers_as_stored(dtype, rows):
    """Rows longer than a block, a length, rows and outputs that no vector divides, an odd number of int4's groups."""
    columns = 67 * 32 if dtype == "int4" else 8227
    x, weight = torch.randn(rows, columns), torch.randn(19, columns)
    if dtype in QUANTIZED:
        stored = (quantize_rows if dtype == "int8" else quantize_groups)(weight)
        exact = (dequantize_rows if dtype == "int8" else dequantize_groups)(*stored)
    else:
        stored = (exact := weight.to(getattr(torch, dtype)),)
    expected, size = x.double() @ exact.double().T, float(x.abs().max() * exact.norm(dim=1).max())
    tolerance = 2**-13 if dtype in QUANTIZED else 1e-6  # six standard deviations of the rounding of activations
    assert float((multiply_few(x, *stored) - expected).abs().max()) <= tolerance * size


def test_sums_of_the_largest_numbers_fit():
    """127 times the largest activation, for a whole row of one sign: 32 bits hold a block of it, not more."""
    numbers, scales = torch.full((2, 20000), 127, dtype=torch.int8), torch.ones(2)
    numbers[1] = -127
    found = multiply_few(torch.full((1, 20000), 3.0), numbers, scales)
    torch.testing.assert_close(found, torch.tensor([[127 * 60000.0, -127 * 60000.0]]))


def test_narrower_vectors_add_up_to_the_same(monkeypatch):
    """Other processors have other registers; a laptop's 8 lanes would else be compiled on none of our machines."""
    from neox_lib.decoding import loops, products

    lanes = 24 - products.LANES  # 8 where there are 16, and 16 where there are 8
    monkeypatch.setattr(products, "LANES", lanes)
    monkeypatch.setattr(loops, "OUTPUTS", lanes // 4)
    sum_products = loops.njit(**loops.OPTIONS)(loops.sum_products.py_func)
    weight = np.random.default_rng(0).integers(-127, 128, (9, 75)).astype(np.int8)
    numbers = np.random.default_rng(1).integers(-900, 900, (6, 75)).astype(np.int16)
    sums = np.empty((4, 8 + lanes // 4), np.float32)
    sum_products(weight, 1, 9, numbers, 4, sums)
    assert np.array_equal(sums[:2, :8], numbers[4:].astype(int) @ weight[1:].astype(int).T)


def test_the_exact_gelu_is_exact_to_fp32():
    """Pythia's own activation, far out on both sides too."""
    from neox_lib.decoding.loops import gelu

    x = torch.linspace(-12, 12, 4001)
    found = x.clone()
    gelu(found.numpy(), True)
    torch.testing.assert_close(found, nn.functional.gelu(x.double()).float(), atol=5e-7, rtol=0)


@torch.inference_mode()
def test_a_long_prompt_in_blocks_says_what_a_short_one_says(monkeypatch, passes):
    """Only the last block's last row is scored, and all of them where all are asked for; a batch shares the rows."""
    monkeypatch.setattr(step, "ROWS_AT_ONCE", 8)
    model, ids = model_of(BASE), torch.randint(BASE.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([0, 6])
    logits = model(ids, cache_for(model, 2, 11), padding=padding)
    last = model(ids, cache_for(model, 2, 11), padding=padding, last_only=True)
    assert passes == [8, 8, 6] * 2
    model.step = None
    expected = model(ids, cache_for(model, 2, 11), padding=padding)
    check((logits[:, 6:], expected[:, 6:]))
    check((last, expected[:, -1:]))


def test_the_exponential_is_exact_to_fp32():
    """Softmax and GELU lean on it; far below, e^x is as good as 0."""
    from neox_lib.decoding.loops import exponential

    x = np.linspace(-90, 80, 4001, dtype=np.float32)
    found, expected = np.array([exponential(each) for each in x]), np.exp(x.astype(np.float64))
    inside = x > -87
    assert np.max(np.abs(found[inside] / expected[inside] - 1)) < 1e-6 and np.max(found[~inside]) < 1e-37


def test_far_back_in_the_context_too():
    """Position 2000: its own rotary row, and a softmax over two thousand scores."""
    model = model_of(replace(BASE, max_position_embeddings=2048))
    ids = torch.randint(BASE.vocab_size, (1, 2004), generator=torch.Generator().manual_seed(0))
    check(tuple(each[:, -4:] for each in both(model, list(ids.split([2000, 1, 2, 1], dim=1)))))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_of_a_batch_see_no_padding_and_not_each_other(dtype):
    model = model_of(BASE, dtype)
    ids, padding = pad_left([list(range(9)), [7, 8, 9, 10]])
    found = both(model, list(ids.split([6, 1, 2], dim=1)), padding)
    check(found, ROUNDED if dtype == "int8" else EXACT)
    model.step = compiled_step
    with torch.inference_mode():
        cache = cache_for(model, 1, 4)
        alone = torch.cat([model(ids[1:, at : at + 1], cache) for at in range(5, 9)], dim=1)
    if dtype == "int8":  # all through the loops, which sum each row by itself
        assert torch.equal(alone, found[0][1:])
    check((alone, found[1][1:]), ROUNDED if dtype == "int8" else EXACT)


def test_a_row_that_has_ended_does_not_disturb_the_others(passes):
    """A finished row takes no new position: its padding grows with it."""
    model = model_of(BASE)
    prompts = [[1, 2, 3, 4], [5, 6]]
    together = [each.token_ids for each in stream_generate(model, prompts, [2, 9], stop_token_ids=())]
    assert passes, "the loops were not used"
    model.step = None
    assert together == [each.token_ids for each in stream_generate(model, prompts, [2, 9], stop_token_ids=())]


class Late:
    """Helpers that come when all is done, and do what they were called for."""

    def __init__(self):
        self.calls = []

    def submit(self, *call):
        self.calls.append(call)


@pytest.mark.parametrize("parallel", [True, False])
def test_threads_change_no_bit_and_late_ones_no_number(monkeypatch, parallel):
    """Which thread computes a number must not matter, nor one that the system wakes after the token is out."""
    model = model_of(replace(BASE, use_parallel_residual=parallel, num_hidden_layers=3), "int8")
    ids = torch.arange(12)[None]

    @torch.inference_mode()
    def write(model: NeoXModel) -> tuple[Tensor, Tensor]:
        cache = cache_for(model, 1, 12)
        logits = torch.cat([model(part, cache) for part in ids.split(1, dim=1)], dim=1)
        return logits, cache.keys

    alone = write(model)
    monkeypatch.setattr(step, "CHUNK_BYTES", 100)  # a few rows: many chunks in a model as small as this
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(*pair) for pair in zip(alone, write(model), strict=True))
    late = Late()
    monkeypatch.setattr(step, "helpers", lambda threads: late)
    logits, keys = write(model)
    before = logits.clone(), keys.clone()
    norm = weakref.ref(model.layers[0].input_layernorm.weight)
    del model
    gc.collect()
    assert norm() is not None, "a late thread reads the norms of a model that nobody holds any more"
    for function, *work in late.calls:
        function(*work)
    assert len(late.calls) == 24 and all(torch.equal(*pair) for pair in zip(before, (logits, keys), strict=True))


class OwnMLP(MLP):
    """A learner's."""


WANTS_MODULES = {
    "a hook": lambda model: model.layers[1].mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda model: model.layers[0].attention.dense.register_forward_pre_hook(lambda *_: None),
    "a replaced forward": lambda model: setattr(model.layers[0].mlp, "forward", model.layers[0].mlp.forward),
    "another piece": lambda model: setattr(model.layers[0], "mlp", OwnMLP(BASE)),
    "half precision": lambda model: model.half(),
    "a norm in double": lambda model: model.norm.double(),
    "matrices of two dtypes": lambda model: setattr(
        model.layers[0].mlp.dense_h_to_4h, "weight", nn.Parameter(model.layers[0].mlp.dense_h_to_4h.weight.half())
    ),
}


@pytest.mark.parametrize("wish", WANTS_MODULES)
def test_what_the_loops_can_not_do_is_left_to_the_modules(wish):
    model = model_of(BASE)
    assert addresses_of(model) is not None
    WANTS_MODULES[wish](model)
    assert addresses_of(model) is None


def test_passes_that_the_loops_leave(passes):
    """A look at the layers, a gradient, no cache: all through the modules."""
    model = model_of(BASE)
    one, cache = torch.tensor([[1]]), cache_for(model, 1, 50)
    with torch.inference_mode():
        model(one, cache, on_layer=lambda depth, hidden: None)
        model(one)
    model.norm.requires_grad_(True)
    model(one, cache_for(model, 1, 1)).sum().backward()
    assert model.norm.weight.grad is not None and passes == []
    with torch.inference_mode():
        model(one, cache)
    assert passes == [1] and cache.length == 2


def test_new_weights_are_noticed():
    """A weight changed in place, replaced, or moved: never the old one's result."""
    model, ids = model_of(BASE), torch.tensor([[3]])
    check(both(model, [ids]))
    model.layers[0].mlp.dense_h_to_4h.weight.mul_(2)
    check(both(model, [ids]))
    model.layers[1].attention.dense.weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    check(both(model, [ids]))
    model.norm.weight.data = model.norm.weight.data * 3
    check(both(model, [ids]))
    check(both(copy.deepcopy(model), [ids]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", *QUANTIZED])
def test_damaged_weights_show_in_the_scores(dtype, value):
    """A number that is none must not be rounded into one: generation refuses such scores."""
    model = model_of(BASE, dtype)
    model.layers[0].input_layernorm.bias[3] = value
    with torch.inference_mode():
        assert not model(torch.tensor([[3]]), cache_for(model, 1, 2)).isfinite().any()


def test_a_full_cache_is_refused_before_it_is_written_past():
    model = model_of(BASE)
    cache = cache_for(model, 1, 2)
    with torch.inference_mode(), pytest.raises(ValueError, match="the cache has room for 1 x 2 tokens"):
        model(torch.arange(3)[None], cache)
    assert cache.length == 0


def test_weights_stay_where_they_lie():
    """A memory-mapped file is read in place: a copy would take its size again."""
    model = model_of(BASE, "int8")
    found = addresses_of(model)
    block = model.layers[1]
    assert block.mlp.dense_4h_to_h.weight.data_ptr() in found.layers[1]
    assert found.final[2] == model.final_linear.weight.data_ptr()


def test_large_models_get_the_loops_and_the_shipped_one_runs_the_pieces(monkeypatch, caplog):
    """The learner's own attention must write the shipped model's story."""
    assert create_model(device="cpu").step is None
    monkeypatch.setattr(step, "SMALL_MODEL_PARAMETERS", 1)
    assert create_model(device="cpu").step is compiled_step
    monkeypatch.delitem(sys.modules, "neox_lib.decoding.loops")
    monkeypatch.setitem(sys.modules, "numba", None)
    model = use_compiled_step(model_of(BASE))
    assert model.step is None and "no Numba" in step.why_modules(BASE)
    row, stored = torch.randn(1, 8), quantize_rows(torch.randn(3, 8))
    torch.testing.assert_close(multiply_few(row, *stored), row @ dequantize_rows(*stored).T)


def test_without_a_place_to_keep_it_code_is_compiled_each_time(monkeypatch):
    """A read-only installation of a user without a home directory."""
    from neox_lib.decoding import loops

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(loops, "njit", njit)
    assert loops.compiled(len) is len
