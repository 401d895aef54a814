"""The exercises of notebook 08: rows in int8, a product with their scales, and the bytes of a model in int8."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neox_lib.checkpoints.quantized import int8_bytes as bytes_in_int8
from neox_lib.config import NeoXConfig, neox_20b, pythia, tiny
from neox_lib.course.checks import exercise, in_place_of, require, require_equal
from neox_lib.course.figures.plots import seeded
from neox_lib.generation import greedy_generate_text, prompt_ids
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.quantization.int8 import quantize_rows as library_quantize_rows
from neox_lib.quantization.int8_linear import use_int8_linear

PROMPT = "Once upon a time, a fox"


class MatricesMade(TorchDispatchMode):
    """Notes the matrices of one shape that a product of numbers, element by element, makes."""

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
    """`yours(x, numbers, scales)` is x `[T, in]` times the weights that numbers `[out, in]` and scales stand for."""
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
    require_equal(found, expected, "my_int8_product of [5, 64], [48, 64] and [48]", tolerance=1e-3)
    more = "apply the scales to the product, which is far smaller"
    require(made.count == 0, f"The numbers are right, but the scales were applied to the [48, 64] matrix: {more}")
    return "Each output was scaled once; the matrix of weights was never formed."


def check_rows(found, weight: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The numbers and scales found for a weight, if they are what every row needs."""
    right = isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(each, Tensor) for each in found)
    require(right, f"{what} should give two tensors, numbers and scales")
    numbers, scales = found
    require(numbers.dtype == torch.int8, f"{what} should give numbers in torch.int8, not {numbers.dtype}")
    for name, tensor, shape in (("numbers", numbers, weight.shape), ("scales", scales, weight.shape[:1])):
        same = tensor.shape == shape
        require(same, f"{what} should give {name} of shape {list(shape)}, but they have {list(tensor.shape)}")
    require(scales.dtype == torch.float32, f"{what} should give scales in torch.float32, not {scales.dtype}")
    require(bool(scales.isfinite().all()), f"{what} gives a scale that is NaN or infinite")
    return numbers, scales


def check_values(numbers: Tensor, scales: Tensor, weight: Tensor, what: str) -> None:
    """Scales by the largest value of a row, its sign kept, and every weight within half a scale."""
    weight = weight.float()
    expected = weight.abs().amax(dim=1) / 127
    for row, scale in enumerate(scales.tolist()):
        close = abs(scale - expected[row].item()) <= 1e-4 * expected[row].item()
        told = f"{what}, row {row}: the scale is {scale:.4g}, expected largest absolute value / 127"
        require(close, f"{told} = {expected[row].item():.4g}")
        at = int(weight[row].abs().argmax())
        number, sign = int(numbers[row, at]), 127 if weight[row, at] > 0 else -127
        require(number == sign, f"{what}, row {row}: its largest weight became {number}, expected {sign}")
    off = (numbers.float() * scales[:, None] - weight).abs() / scales[:, None]
    worst = off.max().item()
    more = "A cast to int8 cuts off what is behind the point; round first" if worst > 0.9 else "Round to the nearest"
    require(worst <= 0.501, f"{what}: a weight is off by {worst:.2f} of its scale, at most 0.5 is allowed. {more}")


def int8_story(tokens: int = 40) -> str:
    """The shipped model's greedy text in int8, quantized with whatever stands in the library now."""
    tokenizer = create_tokenizer()
    model = use_int8_linear(create_model(device="cpu", dtype="float32"))
    return greedy_generate_text(model, tokenizer, PROMPT, prompt_ids(tokenizer, PROMPT).shape[1] + tokens)


@exercise("small_machine.quantize_rows")
def quantize_rows(yours: Callable[[Tensor], tuple[Tensor, Tensor]]) -> str:
    """`yours(weight)` gives int8 numbers and a scale for each row; then the shipped model writes with it."""
    what, by_hand = "my_quantize_rows([[1.27, -0.5, 0.3, 0.004]])", torch.tensor([[1.27, -0.5, 0.3, 0.004]])
    numbers, scales = check_rows(yours(by_hand.clone()), by_hand, what)
    check_values(numbers, scales, by_hand, what)
    require_equal(numbers, torch.tensor([[127, -50, 30, 0]], dtype=torch.int8), f"the numbers of {what}")
    sizes = torch.tensor([1.0, 50.0, 1e-3, 1e-6, 1.0])
    weight = seeded(5, 64) * sizes[:, None]
    weight[4, 7] = -6.0  # a row whose largest is negative
    before, what = weight.clone(), "my_quantize_rows of five rows, some large, some small"
    numbers, scales = check_rows(yours(weight), weight, what)
    require(torch.equal(weight, before), f"{what} changes its input")
    check_values(numbers, scales, weight, what)
    mirrored, _ = check_rows(yours(-weight), weight, "my_quantize_rows of the negatives")
    require(torch.equal(mirrored, -numbers), "my_quantize_rows(-weight) should be my_quantize_rows(weight) negated")
    zero = torch.cat([weight[:1], torch.zeros(1, 64)])
    numbers, scales = check_rows(yours(zero), zero, "my_quantize_rows with a row of zeros")
    require(not numbers[1].any(), "my_quantize_rows of a row of zeros should give zeros")
    for dtype in (torch.float16, torch.bfloat16):
        small = (1e-3 * seeded(3, 64)).to(dtype)
        what = f"my_quantize_rows of small weights in {dtype}"
        check_values(*check_rows(yours(small), small, what), small, what)
    expected = int8_story()
    with in_place_of(library_quantize_rows, yours):
        written = int8_story()
    require(written == expected, f"The shipped model, quantized by you, wrote another story:\n{written}")
    return f"The shipped model, quantized by your function in place of the library's, wrote this in int8:\n{written}"


@exercise("small_machine.int8_bytes")
def int8_bytes(yours: Callable[[NeoXConfig], int]) -> str:
    """`yours(config)` is the number of bytes of a model in int8, with its scales and all that stays as it is."""
    for argument, config in (("tiny()", tiny()), ('pythia("1.4b")', pythia("1.4b")), ("neox_20b()", neox_20b())):
        found, expected = yours(config), bytes_in_int8(config)
        require(isinstance(found, int | float), f"my_int8_bytes({argument}) should be a number, but is {found!r}")
        hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        embedding = config.vocab_size * hidden
        rows = layers * (5 * hidden + inner) + config.vocab_size
        vectors = layers * (9 * hidden + inner) + 2 * hidden
        reasons = {
            -4 * rows: "the scales are missing, 4 bytes for each row of each matrix",
            -2 * rows: "a scale takes 4 bytes, not 2",
            -embedding: "the embedding stays in fp16, 2 bytes per number",
            2 * embedding: "the embedding takes 2 bytes per number, not 4",
            -2 * embedding: "the embedding is missing",
            -4 * vectors: "biases and norms are missing",
            -3 * vectors: "biases and norms take 4 bytes per number",
            -2 * vectors: "biases and norms take 4 bytes per number",
            4 * config.vocab_size: "the embedding has no scales: it is not quantized",
            -4 * config.vocab_size: "the output matrix has scales too",
        }
        told = f"my_int8_bytes({argument}) is {found:,}, expected {expected:,}"
        reason = reasons.get(int(found - expected))
        require(found == expected, f"{told}: {reason}" if reason else told)
    return f"20B in int8: {bytes_in_int8(neox_20b()):,} bytes."
