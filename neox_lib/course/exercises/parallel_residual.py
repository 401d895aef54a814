"""The exercises of notebook 04: GELU, the norm, the parallel block, the forward pass, and a count of parameters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.block import Block
from neox_lib.config import NeoXConfig
from neox_lib.course.checks import (
    PropertyFailed,
    describe,
    exercise,
    given,
    numbers,
    require,
    require_equal,
    require_same_story,
    story_with,
)
from neox_lib.course.figures.plots import seeded
from neox_lib.model import NeoXModel
from neox_lib.rotary import rotary_table

PROMPT = "Once upon a time, an old bear"  # no other notebook's

SMALL = NeoXConfig(
    vocab_size=40,
    tokenizer_vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
)
BLOCK_PARTS = ("input_layernorm", "post_attention_layernorm", "attention", "mlp")
NAMES = f"its parts are called {', '.join(BLOCK_PARTS[:-1])} and {BLOCK_PARTS[-1]}"


@exercise("parallel_residual.gelu")
def gelu(yours: Callable[[Tensor], Tensor]) -> str:
    """`yours(x)` is the tanh form of GELU, elementwise, for a tensor of any shape."""
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    with given(f"my_gelu({numbers(x)})"):
        found = yours(x)
    expected = F.gelu(x, approximate="tanh")
    if isinstance(found, Tensor) and found.shape == x.shape:
        other = {
            "the exact GELU, x * Phi(x)": F.gelu(x),
            "x * sigmoid(1.702 * x), a coarser form": x * torch.sigmoid(1.702 * x),
            "ReLU": x.relu(),
            "the factor alone: multiply it by x": expected / x,
            "twice the GELU: the factor 0.5 is missing": 2 * expected,
        }
        for name, curve in other.items():
            same = (found - curve).abs().nan_to_num().max().item() < 1e-6
            require(not same, f"my_gelu({numbers(x)}) should be the tanh form of GELU, but is {name}")
    require_equal(found, expected, f"my_gelu({numbers(x)})", tolerance=1e-6)
    wide = seeded(2, 3, 4)
    with given("my_gelu of a [2, 3, 4] tensor"):
        found = yours(wide)
    require_equal(found, F.gelu(wide, approximate="tanh"), "my_gelu of a [2, 3, 4] tensor", tolerance=1e-5)
    return "It is the curve that 20B was trained with."


@exercise("parallel_residual.layer_norm")
def layer_norm(yours: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """`yours(x, weight, bias, eps)` normalises each token over its C numbers: `[..., C]` -> `[..., C]`."""
    x, ones, zeros = torch.tensor([[1.0, 1.0, 5.0, 5.0]]), torch.ones(4), torch.zeros(4)
    call = "my_layer_norm([[1, 1, 5, 5]], weight of ones, bias of zeros)"
    with given(call):
        found = yours(x, ones, zeros, 1e-5)
    expected = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    if isinstance(found, Tensor) and found.shape == x.shape:
        sample = (x - 3) / (16 / 3) ** 0.5
        told = f"{call} should be {numbers(expected)}, but is {numbers(found)}"
        hint = "your variance is divided by C - 1, LayerNorm's by C (torch.var: correction=0)"
        require((found - sample).abs().max().item() > 1e-3, f"{told}: {hint}")
        hint = "divide by the square root of the variance, not by the variance"
        require((found - (x - 3) / 4).abs().max().item() > 1e-3, f"{told}: {hint}")
    require_equal(found, expected, call, tolerance=1e-4)
    weight, bias = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 10.0, 10.0])
    what = "my_layer_norm([[1, 1, 5, 5]], weight [1, 2, 3, 4], bias [0, 0, 10, 10])"
    require_equal(yours(x, weight, bias, 1e-5), torch.tensor([[-1.0, -2.0, 13.0, 14.0]]), what, tolerance=1e-3)
    tokens = 3 * seeded(2, 5, 4) + 1
    what = "my_layer_norm of a [2, 5, 4] tensor, each token normalised over its own 4 numbers,"
    try:
        found = yours(tokens, weight, bias, 1e-5)
    except RuntimeError as error:  # [2, 5, 4] - [2, 5] has no meaning, while [1, 4] - [1] above had one
        hint = "take mean and variance with keepdim=True, so that they have shape [2, 5, 1]"
        raise PropertyFailed(f"{what} raised RuntimeError ({error}): {hint}") from None
    require_equal(found, F.layer_norm(tokens, [4], weight, bias), what, tolerance=1e-4)
    flat = yours(torch.full((1, 4), 3.0), ones, zeros, 1e-5)
    require_equal(
        flat, torch.zeros(1, 4), "my_layer_norm([[3, 3, 3, 3]], weight of ones, bias of zeros)", tolerance=1e-6
    )
    small = torch.tensor([[0.0, 0.0, 0.02, 0.02]])
    what, why = "my_layer_norm([[0, 0, 0.02, 0.02]]) with eps = 0.0003", "eps is added to the variance, before the root"
    require_equal(yours(small, ones, zeros, 3e-4), torch.tensor([[-0.5, -0.5, 0.5, 0.5]]), what, 1e-4, why)
    return "It agrees with PyTorch's LayerNorm, eps included."


class OneLayerStore:
    """A cache that records which layers update it, and keeps nothing else."""

    def __init__(self):
        self.layers: list[int] = []

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append(layer_index)
        return key, value


def possible_wirings(block: nn.Module, x: Tensor, table: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The output of a block whose parts are wired rightly ("parallel"), and in each of the usual wrong ways:
    what is wrong -> output.
    """
    first, second, attention, mlp = (getattr(block, name) for name in BLOCK_PARTS)
    after = x + attention(first(x), *table)
    parallel = after + mlp(second(x))
    return {
        "parallel": parallel,
        "your residual is sequential: the MLP reads x plus attention's output, but should read x": after
        + mlp(second(after)),
        "the branches share one norm: the MLP should read through post_attention_layernorm": after + mlp(first(x)),
        "the MLP's norm reads the output of attention's norm, but should read x": after + mlp(second(first(x))),
        "each branch reads through the other's norm: swap them": x + attention(second(x), *table) + mlp(first(x)),
        "x itself is missing: the block adds both branches to it": parallel - x,
        "the MLP reads x without a norm, but should read it through post_attention_layernorm": after + mlp(x),
        "the MLP's output is missing from the sum": after,
    }


def random_block(yours: Callable[[NeoXConfig, int], nn.Module], layer_index: int) -> nn.Module:
    """The learner's block with random parameters, so that its two norms differ.

    Raises PropertyFailed unless its parameters have the names that a checkpoint gives them.
    """
    require(
        isinstance(yours, type),
        f"MyBlock should be a class, so that MyBlock(config, 0) is a block, but is {describe(yours)}",
    )
    block = yours(SMALL, layer_index)
    expected = {name for name, _ in Block(SMALL, layer_index).named_parameters()}
    found = {name for name, _ in block.named_parameters()}
    missing, extra = sorted(expected - found), sorted(found - expected)
    require(not missing, f"A checkpoint fills parameters by name, but MyBlock has no {', '.join(missing[:3])}: {NAMES}")
    require(not extra, f"MyBlock has {', '.join(extra[:3])}, which no checkpoint holds: {NAMES}")
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(block.named_parameters())):
            parameter.copy_(0.3 * seeded(*parameter.shape, seed=number))
    return block.eval()


@exercise("parallel_residual.block")
@torch.no_grad()
def parallel_block(yours: Callable[[NeoXConfig, int], nn.Module]) -> str:
    """`yours(config, layer_index)` is a block whose two branches both read x, each through its own norm."""
    block = random_block(yours, layer_index=1)
    x = seeded(2, 5, SMALL.hidden_size)
    table = rotary_table(5, SMALL.rotary_ndims, SMALL.rotary_emb_base, torch.device("cpu"), torch.float32)
    before = x.clone()
    with given("MyBlock on a [2, 5, 32] input"):
        found = block(x, *table)
    require(torch.equal(x, before), "MyBlock changes its input: write hidden = hidden + ..., not hidden += ...")
    wirings = possible_wirings(block, x, table)
    expected, what = wirings.pop("parallel"), "The output of MyBlock for a [2, 5, 32] input"
    if isinstance(found, Tensor) and found.shape == expected.shape:
        for name, output in wirings.items():
            require((found - output).abs().max().item() > 1e-4, f"{what} has the wrong values: {name}")
    require_equal(found, expected, what, tolerance=1e-4)
    store = OneLayerStore()
    with given("MyBlock on a [2, 5, 32] input with a cache"):
        block(x, *table, store)
    told = f"MyBlock(config, layer_index=1) should update layers [1] of its cache, but updated {store.layers}"
    require(store.layers == [1], f"{told}: pass layer_index and cache on to attention")
    if yours is Block:  # a story in place of itself would prove nothing
        return "It is the library's own block."
    return story_with(Block, yours, "block", PROMPT)


def possible_passes(model: NeoXModel, ids: Tensor) -> dict[str, Tensor]:
    """The logits of a right forward pass ("right"), and of the usual wrong ones: what is wrong -> logits."""
    hidden = model.word_embeddings(ids)
    cos, sin = model.rotary.rows(0, ids.shape[1], like=hidden)
    stream = [hidden]
    for layer in model.layers:
        stream.append(layer(stream[-1], cos, sin))
    backwards = hidden
    for layer in reversed(list(model.layers)):
        backwards = layer(backwards, cos, sin)
    head, norm = model.final_linear, model.norm
    right = head(norm(stream[-1]))
    return {
        "right": right,
        "the last norm is missing: final_linear reads model.norm(hidden)": head(stream[-1]),
        "the last block is missing: go through all of model.layers": head(norm(stream[-2])),
        "only the first block has run: each block reads what the one before it returns": head(norm(stream[1])),
        "no block has run": head(norm(hidden)),
        "the blocks run from last to first": head(norm(backwards)),
        "these are probabilities: logits come before softmax": right.softmax(-1),
        "the logits are normalised: the norm comes before final_linear": F.layer_norm(
            head(stream[-1]), right.shape[-1:]
        ),
    }


def greedy_story(model: NeoXModel, forward: Callable[[NeoXModel, Tensor], Tensor], tokens: int = 20) -> str:
    """The likeliest continuation of PROMPT by a forward pass without a cache, on the CPU."""
    from neox_lib.generation import next_token_scores, prompt_ids
    from neox_lib.loading import create_tokenizer

    tokenizer = create_tokenizer()
    ids = prompt_ids(tokenizer, PROMPT)
    for _ in range(tokens):
        best = next_token_scores(forward(model, ids), model.config).argmax(-1)
        ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
    return tokenizer.decode(ids[0].tolist())


@exercise("parallel_residual.forward_pass")
@torch.no_grad()
def forward_pass(yours: Callable[[nn.Module, Tensor], Tensor]) -> str:
    """`yours(model, ids)` gives the logits of a model: a small one with random parameters, then the shipped one."""
    from neox_lib.loading import create_model

    model = NeoXModel(SMALL).eval()
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        parameter.copy_(0.5 * seeded(*parameter.shape, seed=number))
    ids = torch.randint(SMALL.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    what = "my_forward on ids [2, 6] of a small model with 2 blocks and 40 tokens"
    with given(what):
        found = yours(model, ids)
    passes = possible_passes(model, ids)
    expected = passes.pop("right")
    if isinstance(found, Tensor) and found.shape == expected.shape:
        for name, logits in passes.items():
            require((found - logits).abs().max().item() > 1e-4, f"{what} has the wrong values: {name}")
    require_equal(found, expected, what, tolerance=1e-3)
    shipped = create_model(device="cpu", dtype="float32")
    written = greedy_story(shipped, yours)
    require_same_story(written, greedy_story(shipped, lambda model, ids: model(ids)), "by your my_forward")
    torch.manual_seed(0)
    untrained = greedy_story(NeoXModel(shipped.config).eval(), yours)
    told = f"By your forward pass, an untrained model of this shape writes:\n{untrained}"
    return f"{told}\n\nand the trained one:\n{written}"
