"""The exercises of notebook 08: a row times x, rows in int8, two weights in a byte, the bytes of a model in int8."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from neox_lib.checkpoints.quantized import quantized_bytes as bytes_in_int8
from neox_lib.config import NeoXConfig, neox_20b, pythia, tiny
from neox_lib.course.checks import (
    describe,
    exercise,
    given,
    in_place_of,
    left_out_or_twice,
    require,
    require_count,
    require_equal,
    require_same_story,
)
from neox_lib.course.figures.plots import seeded
from neox_lib.generation import greedy_generate_text, prompt_ids
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.quantization.int4 import dequantize_groups as library_dequantize_groups
from neox_lib.quantization.int4 import quantize_groups
from neox_lib.quantization.int8 import quantize_rows as library_quantize_rows
from neox_lib.quantization.linear import QuantizedLinear, use_quantized_linear

PROMPT = "Once upon a time, there was a funny monkey"


class Counted(float):
    """A scale that counts how often it is multiplied by a number."""

    __array_ufunc__ = None  # so that numpy's numbers leave the product to it
    times = 0

    def __mul__(self, other):
        Counted.times += 1
        return float(self) * float(other)

    __rmul__ = __mul__


def compiled_rows(row: Callable) -> Callable[..., np.ndarray] | None:
    """All rows by the learner's loop over one: numbers `[out, in]`, scales `[out]`, x `[T, in]` -> `[T, out]`.

    None where Numba is missing or can't compile it.
    """
    try:
        from numba import njit
        from numba.core.errors import NumbaError
    except ImportError:
        return None
    inner = njit(fastmath=True)(row)

    @njit
    def multiply(numbers, scales, x):
        out = np.empty((len(x), len(numbers)), np.float32)
        for t in range(len(x)):
            for r in range(len(numbers)):
                out[t, r] = inner(numbers[r], scales[r], x[t])
        return out

    try:
        multiply(np.ones((1, 2), np.int8), np.ones(1, np.float32), np.ones((1, 2), np.float32))
    except NumbaError:
        return None
    return multiply


def as_python(row: Callable, numbers: np.ndarray, scales: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What `compiled_rows` gives, slowly."""
    return np.array([[row(*each, one) for each in zip(numbers, scales, strict=True)] for one in x], np.float32)


class LoopLinear(nn.Module):
    """An int8 layer whose product is `multiply(numbers, scales, x)` on numpy's arrays: `[..., in]` -> `[..., out]`."""

    def __init__(self, linear: QuantizedLinear, multiply: Callable[..., np.ndarray]):
        super().__init__()
        self.linear, self.multiply = linear, multiply

    def forward(self, input: Tensor) -> Tensor:
        x = input.detach().reshape(-1, self.linear.in_features).numpy()
        product = torch.from_numpy(self.multiply(self.linear.weight.numpy(), self.linear.scale.numpy(), x))
        product = product.view(*input.shape[:-1], -1)
        return product if self.linear.bias is None else product + self.linear.bias


def story_by_loop(row: Callable) -> tuple[str, str]:
    """The shipped model's text in int8 with this loop over a row, and where the loop was used."""
    model, multiply = use_quantized_linear(create_model(device="cpu", dtype="float32")), compiled_rows(row)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    where = "compiled, for every row of every matrix"
    if multiply is None:
        layers = {name: layer for name, layer in layers.items() if name == "layers.0.attention.dense"}
        where = "in one of its matrices: as Python it is too slow for all, and Numba is missing or can't compile it"
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoopLinear(layer, multiply or functools.partial(as_python, row)))
    return write(model), where


@exercise("small_machine.int8_row")
def int8_row(yours: Callable) -> str:
    """`yours(numbers, scale, x)` is a row's numbers `[in]` int8 times its scale, times x `[in]` fp32: one number."""
    for numbers, scale, x in (([127, 0], 0.1, [1.0, 2.0]), ([-100, 50, 3], 0.01, [0.0, 10.0, 2.0])):
        what, products = f"my_int8_row({numbers}, {scale}, {x})", [n * each for n, each in zip(numbers, x, strict=True)]
        with given(what):
            found = yours(np.array(numbers, np.int8), scale, np.array(x, np.float32))
        expected, reasons = scale * sum(products), {}
        reasons[sum(products)] = "where is the scale?"
        reasons[scale * products[0]] = "is the return inside the loop? Then it ends after the first product"
        reasons[scale * products[-1]] = "does += stand where the products are added, and not =?"
        reasons[scale * sum(numbers)] = "where is x?"
        require_number(found, expected, what, reasons)
    numbers = torch.randint(-127, 128, (64,), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    x, Counted.times = seeded(64), 0
    what = "my_int8_row of 64 random numbers, the scale 0.01 and 64 random x"
    with given(what):
        found = yours(numbers.numpy(), Counted(0.01), x.numpy())
    require_number(found, 0.01 * (numbers.float() @ x).item(), what, {})
    told = "The result is right, but the scale was used in"
    more = "apply it once, to the sum: all products of the row share it"
    require(Counted.times <= 1, f"{told} {Counted.times} multiplications: {more}")
    expected = int8_story()
    with given("my_int8_row for a row of the shipped model"):
        written, where = story_by_loop(yours)
    require_same_story(written, expected, "with your loop")
    return f"The shipped model wrote this with your loop, {where}:\n{written}"


def require_number(found, expected: float, what: str, reasons: dict[float, str]) -> None:
    """Raise PropertyFailed unless `found` is the expected number; `reasons` maps wrong ones to their causes."""
    one = isinstance(found, int | float | np.number) or (isinstance(found, Tensor | np.ndarray) and found.ndim == 0)
    require(one, f"{what} should be one number, but is {describe(found)}")
    told = f"{what} should be {expected:.4g}, but is {float(found):.4g}"
    why = next((reason for wrong, reason in reasons.items() if abs(float(found) - wrong) < 1e-4), "")
    require(abs(float(found) - expected) <= 1e-3 * max(1, abs(expected)), f"{told}: {why}" if why else told)


def rows_of(yours: Callable, weight: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """What the learner's function makes of a weight, checked for dtypes and shapes."""
    with given(what):
        found = yours(weight)
    return check_rows(found, weight, what)


def check_rows(found, weight: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The learner's numbers and scales for a weight. Raises PropertyFailed for a wrong dtype or shape, and for NaN."""
    given = f"{len(found)} values" if isinstance(found, tuple | list) and len(found) != 2 else describe(found)
    right = isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(each, Tensor) for each in found)
    require(right, f"{what} should give a pair of tensors, numbers and scales, but gives {given}")
    numbers, scales = found
    require(numbers.dtype == torch.int8, f"{what} should give numbers in torch.int8, but gives {numbers.dtype}")
    for name, tensor, shape in (("numbers", numbers, weight.shape), ("scales", scales, weight.shape[:1])):
        same = tensor.shape == shape
        require(same, f"{what} should give {name} of shape {list(shape)}, but gives {list(tensor.shape)}")
    require(scales.dtype == torch.float32, f"{what} should give scales in torch.float32, but gives {scales.dtype}")
    require(bool(scales.isfinite().all()), f"{what} gives a scale that is NaN or infinite: did you divide by 0?")
    return numbers, scales


def check_values(numbers: Tensor, scales: Tensor, weight: Tensor, what: str) -> None:
    """Scales from the largest absolute value of each row, its sign kept, and every weight within half a scale."""
    weight = weight.float()
    expected = weight.abs().amax(dim=1) / 127
    for row, scale in enumerate(scales.tolist()):
        close = abs(scale - expected[row].item()) <= 1e-4 * expected[row].item()
        told = f"{what}, row {row}: the scale should be the largest absolute value / 127 = {expected[row].item():.4g}"
        require(close, f"{told}, but is {scale:.4g}")
        at = int(weight[row].abs().argmax())
        number, sign = int(numbers[row, at]), 127 if weight[row, at] > 0 else -127
        require(number == sign, f"{what}, row {row}: the largest weight should become {sign}, but becomes {number}")
    off = (numbers.float() * scales[:, None] - weight).abs() / scales[:, None]
    worst = off.max().item()
    more = "a cast to int8 cuts off the decimals, so round first" if worst > 0.9 else "round to the nearest number"
    told = f"{what}: no weight should be off by more than half its scale, but one is off by {worst:.2f} of its scale"
    require(worst <= 0.501, f"{told}: {more}")


def write(model: NeoXModel, tokens: int = 40) -> str:
    """A model's greedy text after the notebook's prompt."""
    tokenizer = create_tokenizer()
    return greedy_generate_text(model, tokenizer, PROMPT, prompt_ids(tokenizer, PROMPT).shape[1] + tokens)


def int8_story() -> str:
    """The shipped model's greedy text in int8, quantized with whatever `quantize_rows` the library holds."""
    return write(use_quantized_linear(create_model(device="cpu", dtype="float32")))


@exercise("small_machine.quantize_rows")
def quantize_rows(yours: Callable[[Tensor], tuple[Tensor, Tensor]]) -> str:
    """`yours(weight)` gives int8 numbers and one scale per row; then the shipped model writes with them."""
    what, by_hand = "my_quantize_rows([[1.27, -0.5, 0.3, 0.004]])", torch.tensor([[1.27, -0.5, 0.3, 0.004]])
    numbers, scales = rows_of(yours, by_hand.clone(), what)
    check_values(numbers, scales, by_hand, what)
    require_equal(numbers, torch.tensor([[127, -50, 30, 0]], dtype=torch.int8), f"the numbers of {what}")
    sizes = torch.tensor([1.0, 50.0, 1e-3, 1e-6, 1.0])
    weight = seeded(5, 64) * sizes[:, None]
    weight[4, 7] = -6.0  # a row whose largest is negative
    before, what = weight.clone(), "my_quantize_rows of five rows of very different sizes"
    numbers, scales = rows_of(yours, weight, what)
    require(torch.equal(weight, before), f"{what} changes its input: work on a copy")
    check_values(numbers, scales, weight, what)
    mirrored, _ = rows_of(yours, -weight, "my_quantize_rows(-weight)")
    mirror = torch.equal(mirrored, -numbers)
    require(
        mirror, "my_quantize_rows(-weight) should give the numbers of my_quantize_rows(weight) negated, but doesn't"
    )
    zero = torch.cat([weight[:1], torch.zeros(1, 64)])
    numbers, scales = rows_of(yours, zero, "my_quantize_rows with a row of zeros")
    require(
        not numbers[1].any(),
        f"my_quantize_rows of a row of zeros should give zeros, but gives {numbers[1].unique().tolist()}",
    )
    for dtype in (torch.float16, torch.bfloat16):
        small = (1e-3 * seeded(3, 64)).to(dtype)
        what = f"my_quantize_rows of small weights in {dtype}"
        check_values(*rows_of(yours, small, what), small, what)
    expected = int8_story()
    with in_place_of(library_quantize_rows, yours), given("my_quantize_rows for a matrix of the shipped model"):
        written = int8_story()
    require_same_story(written, expected, "in int8, quantized by your function")
    return f"The shipped model, quantized by your function in place of the library's, wrote this in int8:\n{written}"


def from_nibbles(dequantize: Callable[..., Tensor]) -> str:
    """The shipped model's text from weights in int4, turned back by `dequantize`."""
    model = create_model(device="cpu", dtype="float32")
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(dequantize(*quantize_groups(layer.weight.detach())), requires_grad=False)
    return write(model)


@exercise("small_machine.dequantize_groups")
def dequantize_groups(yours: Callable[..., Tensor]) -> str:
    """`yours(nibbles, scales, dtype)` gives the weights that two numbers per byte and a scale per group stand for."""
    nibbles, scales = torch.tensor([[[159, 101], [127, 172]]], dtype=torch.uint8), torch.tensor([[0.1, 0.01]])
    what = "my_dequantize_groups([[[159, 101], [127, 172]]], [[0.1, 0.01]])"
    with given(what):
        found = yours(nibbles, scales)
    expected = torch.tensor([[0.7, -0.3, 0.1, -0.2, 0.07, 0.04, -0.01, 0.02]])
    wrong = {
        "is 8 taken off each number?": expected + torch.tensor([0.8] * 4 + [0.08] * 4),
        "uint8 has no negative numbers, 5 - 8 is 253 there: make it fp32 first": unsigned(expected),
        "is the low nibble the first half of its group, and the high one the second?": expected.view(2, 2, 2).flip(1),
        "a group's low nibbles all come before its high ones: cat, not stack": expected.view(2, 2, 2).transpose(1, 2),
        "does each group have its own scale?": torch.cat([expected[:, :4], 10 * expected[:, 4:]], dim=1),
    }
    told = ""
    if isinstance(found, Tensor) and found.shape == expected.shape:
        close = (why for why, each in wrong.items() if torch.allclose(found.float(), each.reshape(1, 8), atol=1e-4))
        told = next(close, "")
    require_equal(found, expected, what, tolerance=1e-4, why=told)
    weight = seeded(3, 64).half()
    stored = quantize_groups(weight)
    for dtype in (torch.float32, torch.float16):
        what = f"my_dequantize_groups of three rows of two groups of 32, as the library makes them, in {dtype}"
        with given(what):
            found = yours(*stored, dtype)
        require_equal(found, library_dequantize_groups(*stored, dtype), what, tolerance=1e-3)
        require(found.dtype == dtype, f"{what} should be in {dtype}, but is in {found.dtype}")
    with given("my_dequantize_groups for a matrix of the shipped model"):
        written = from_nibbles(yours)
    require_same_story(written, from_nibbles(library_dequantize_groups), "in int4, read by your function")
    return f"The shipped model wrote this from weights of 4 bits that your function read:\n{written}"


def unsigned(weights: Tensor) -> Tensor:
    """By-hand weights as they come out when 8 is taken off in uint8."""
    steps = torch.tensor([0.1] * 4 + [0.01] * 4)
    return (weights / steps).round() % 256 * steps


def require_parts(yours: Callable[[NeoXConfig], int], config: NeoXConfig, argument: str) -> None:
    """Raise PropertyFailed, naming the part, when a count grows wrongly with the vocabulary or with the layers."""
    larger = {
        "one more token in the vocabulary": (
            replace(config, vocab_size=config.vocab_size + 1),
            "a row of the output matrix, its scale, and a row of the embedding",
        ),
        "one more layer": (
            replace(config, num_hidden_layers=config.num_hidden_layers + 1),
            "four matrices with scales and biases, and two norms",
        ),
    }
    for what, (config_larger, parts) in larger.items():
        grows, expected = (count(config_larger) - count(config) for count in (yours, bytes_in_int8))
        told = f"in my_int8_bytes({argument}), {what} should add {expected:,} bytes, but adds {grows:,}"
        require(grows == expected, f"{told}: {parts}")


@exercise("small_machine.int8_bytes")
def int8_bytes(yours: Callable[[NeoXConfig], int]) -> str:
    """`yours(config)` is the number of bytes of a model in int8, scales and unquantized parameters included."""
    for argument, config in (("tiny()", tiny()), ('pythia("1.4b")', pythia("1.4b")), ("neox_20b()", neox_20b())):
        hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        embedding = config.vocab_size * hidden
        rows = layers * (5 * hidden + inner) + config.vocab_size
        vectors = layers * (9 * hidden + inner) + 2 * hidden
        parts = {
            "the scales, 4 bytes for each row of each matrix,": 4 * rows,
            "the scales of the output matrix": 4 * config.vocab_size,
            "the embedding, 2 bytes per number,": 2 * embedding,
            "all biases and norms, 4 bytes per number,": 4 * vectors,
            "the biases of the matrices in each block": 4 * layers * (5 * hidden + inner),
            "both norms in each block": 4 * layers * 4 * hidden,
            "one norm in each block": 4 * layers * 2 * hidden,
            "the last norm": 4 * 2 * hidden,
            "the matrices of the blocks": layers * (4 * hidden * hidden + 2 * hidden * inner),
        }
        reasons = left_out_or_twice(parts) | {
            -embedding: "the embedding counted with 1 byte per number instead of 2, or the output matrix left out",
            2 * embedding: "the embedding counted twice, or with 4 bytes per number instead of 2",
            -2 * rows: "the scales counted with 2 bytes instead of 4",
            -3 * vectors: "biases and norms counted with 1 byte per number instead of 4",
            -2 * vectors: "biases and norms counted with 2 bytes per number instead of 4",
            4 * config.vocab_size: "scales counted for the embedding, which is not quantized",
        }
        with given(f"my_int8_bytes({argument})"):
            found = yours(config)
        if isinstance(found, int | float) and found - bytes_in_int8(config) not in reasons | {0: ""}:
            require_parts(yours, config, argument)
        require_count(found, bytes_in_int8(config), f"my_int8_bytes({argument})", reasons)
    return f"20B takes {bytes_in_int8(neox_20b()):,} bytes in int8."
