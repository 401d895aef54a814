"""The exercises of notebook 08: rows in int8, a product with int8 weights, and the bytes of a model in int8."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neox_lib.checkpoints.quantized import quantized_bytes as bytes_in_int8
from neox_lib.config import NeoXConfig, neox_20b, pythia, tiny
from neox_lib.course.checks import (
    describe,
    exercise,
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
from neox_lib.quantization.int8 import quantize_rows as library_quantize_rows
from neox_lib.quantization.linear import use_quantized_linear

PROMPT = "Once upon a time, there was a funny monkey"


class MatricesMade(TorchDispatchMode):
    """Counts the matrices of one shape that come out of an elementwise multiplication."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_) and tuple(result.shape) == self.shape:
            self.count += 1
        return result


@exercise("small_machine.int8_product")
def int8_product(yours: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """`yours(x, numbers, scales)` is x `[T, in]` times the weights that int8 numbers `[out, in]` and scales `[out]`
    stand for: `[T, out]`.
    """
    x = torch.tensor([[1.0, 2.0], [0.0, 10.0]])
    numbers, scales = torch.tensor([[127, 0], [-100, 50], [1, 1]], dtype=torch.int8), torch.tensor([0.1, 0.01, 1.0])
    expected = torch.tensor([[12.7, 0.0, 3.0], [0.0, 5.0, 10.0]])
    what = "my_int8_product([[1, 2], [0, 10]], [[127, 0], [-100, 50], [1, 1]], [0.1, 0.01, 1])"
    require_equal(yours(x, numbers, scales), expected, what, tolerance=1e-4)
    x, numbers = seeded(5, 64), torch.randint(-127, 128, (48, 64), generator=torch.Generator().manual_seed(1))
    numbers, scales = numbers.to(torch.int8), seeded(48, seed=2).abs() / 100
    with MatricesMade((48, 64)) as made:
        found = yours(x, numbers, scales)
    expected = x @ (numbers.float() * scales[:, None]).T
    require_equal(found, expected, "my_int8_product of x [5, 64], numbers [48, 64] and scales [48]", tolerance=1e-3)
    more = "multiply the [5, 48] product by them, which is far smaller"
    require(made.count == 0, f"The result is right, but the scales were applied to the [48, 64] matrix: {more}")
    return "Each output was scaled once; the matrix of weights was never formed."


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


def int8_story(tokens: int = 40) -> str:
    """The shipped model's greedy text in int8, quantized with whatever `quantize_rows` the library holds."""
    tokenizer = create_tokenizer()
    model = use_quantized_linear(create_model(device="cpu", dtype="float32"))
    return greedy_generate_text(model, tokenizer, PROMPT, prompt_ids(tokenizer, PROMPT).shape[1] + tokens)


@exercise("small_machine.quantize_rows")
def quantize_rows(yours: Callable[[Tensor], tuple[Tensor, Tensor]]) -> str:
    """`yours(weight)` gives int8 numbers and one scale per row; then the shipped model writes with them."""
    what, by_hand = "my_quantize_rows([[1.27, -0.5, 0.3, 0.004]])", torch.tensor([[1.27, -0.5, 0.3, 0.004]])
    numbers, scales = check_rows(yours(by_hand.clone()), by_hand, what)
    check_values(numbers, scales, by_hand, what)
    require_equal(numbers, torch.tensor([[127, -50, 30, 0]], dtype=torch.int8), f"the numbers of {what}")
    sizes = torch.tensor([1.0, 50.0, 1e-3, 1e-6, 1.0])
    weight = seeded(5, 64) * sizes[:, None]
    weight[4, 7] = -6.0  # a row whose largest is negative
    before, what = weight.clone(), "my_quantize_rows of five rows of very different sizes"
    numbers, scales = check_rows(yours(weight), weight, what)
    require(torch.equal(weight, before), f"{what} changes its input: work on a copy")
    check_values(numbers, scales, weight, what)
    mirrored, _ = check_rows(yours(-weight), weight, "my_quantize_rows(-weight)")
    mirror = torch.equal(mirrored, -numbers)
    require(
        mirror, "my_quantize_rows(-weight) should give the numbers of my_quantize_rows(weight) negated, but doesn't"
    )
    zero = torch.cat([weight[:1], torch.zeros(1, 64)])
    numbers, scales = check_rows(yours(zero), zero, "my_quantize_rows with a row of zeros")
    require(
        not numbers[1].any(),
        f"my_quantize_rows of a row of zeros should give zeros, but gives {numbers[1].unique().tolist()}",
    )
    for dtype in (torch.float16, torch.bfloat16):
        small = (1e-3 * seeded(3, 64)).to(dtype)
        what = f"my_quantize_rows of small weights in {dtype}"
        check_values(*check_rows(yours(small), small, what), small, what)
    expected = int8_story()
    with in_place_of(library_quantize_rows, yours):
        written = int8_story()
    require_same_story(written, expected, "in int8, quantized by your function")
    return f"The shipped model, quantized by your function in place of the library's, wrote this in int8:\n{written}"


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
        require_count(yours(config), bytes_in_int8(config), f"my_int8_bytes({argument})", reasons)
    return f"20B takes {bytes_in_int8(neox_20b()):,} bytes in int8."
