"""Notebook 04: its exercises can be solved and failed, and the named checks catch its bug exhibits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.attention import Attention
from neox_lib.block import MLP
from neox_lib.config import NeoXConfig, neox_20b, tiny
from neox_lib.course.exercises import parallel_residual as exercises
from tests.lessons import Lesson

CHECKS = {
    "my_gelu": exercises.gelu,
    "my_layer_norm": exercises.layer_norm,
    "MyBlock": exercises.parallel_block,
    "my_forward": exercises.forward_pass,
}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return Lesson("04_parallel_residual")


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_that_it_is_one(lesson, name):
    lesson.stub_is_told(CHECKS[name], name)


@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_solution_passes(lesson, name):
    lesson.solution_passes(CHECKS[name], name, story=name in ("MyBlock", "my_forward"))


def sigmoid_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def share_alone(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def square_for_cube(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**2)))


def caret_for_power(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ^ 3)))


def no_half(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sample_variance(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * weight + bias


def no_root(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps) * weight + bias


def eps_outside_the_root(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0).sqrt() + eps) * weight + bias


def over_all_tokens(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + eps).sqrt() * weight + bias


def drops_the_dimension(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1)
    return (x - mean) / (((x - mean) ** 2).mean(-1) + eps).sqrt() * weight + bias


class Parts(nn.Module):
    """What every try at a block makes first."""

    def __init__(self, config: NeoXConfig, layer_index: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, layer_index)
        self.mlp = MLP(config)


class WaitsForAttention(Parts):
    def forward(self, hidden, cos, sin, cache=None):
        hidden = hidden + self.attention(self.input_layernorm(hidden), cos, sin, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class TiesTheNorms(Parts):
    def forward(self, hidden, cos, sin, cache=None):
        normed = self.input_layernorm(hidden)
        return hidden + self.attention(normed, cos, sin, cache) + self.mlp(normed)


class NormsInARow(Parts):
    def forward(self, hidden, cos, sin, cache=None):
        normed = self.input_layernorm(hidden)
        attended = self.attention(normed, cos, sin, cache)
        return hidden + attended + self.mlp(self.post_attention_layernorm(normed))


class SwapsTheNorms(Parts):
    def forward(self, hidden, cos, sin, cache=None):
        attended = self.attention(self.post_attention_layernorm(hidden), cos, sin, cache)
        return hidden + attended + self.mlp(self.input_layernorm(hidden))


class ForgetsTheStream(Parts):
    def forward(self, hidden, cos, sin, cache=None):
        attended = self.attention(self.input_layernorm(hidden), cos, sin, cache)
        return attended + self.mlp(self.post_attention_layernorm(hidden))


class ForgetsTheCache(Parts):
    def forward(self, hidden, cos, sin, cache=None):
        attended = self.attention(self.input_layernorm(hidden), cos, sin)
        return hidden + attended + self.mlp(self.post_attention_layernorm(hidden))


class ChangesItsInput(Parts):
    def forward(self, hidden, cos, sin, cache=None):
        attended = self.attention(self.input_layernorm(hidden), cos, sin, cache)
        bent = self.mlp(self.post_attention_layernorm(hidden))
        hidden += attended + bent
        return hidden


class OtherNames(nn.Module):
    def __init__(self, config: NeoXConfig, layer_index: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention, self.mlp = Attention(config, layer_index), MLP(config)


def a_pass(norm=True, layers=lambda all_layers: all_layers, last=lambda logits: logits, keep=True):
    """A try at the forward pass, with one thing changed."""

    def my_forward(model, ids):
        hidden = model.word_embeddings(ids)
        cos, sin = model.rotary.rows(0, ids.shape[1], like=hidden)
        for block in layers(list(model.layers)):
            returned = block(hidden, cos, sin)
            hidden = returned if keep else hidden
        return last(model.final_linear(model.norm(hidden) if norm else hidden))

    return my_forward


def one_position_only(model, ids):
    hidden = model.word_embeddings(ids)
    cos, sin = model.rotary.rows(0, 1, like=hidden)
    for block in model.layers:
        hidden = block(hidden, cos, sin)
    return model.final_linear(model.norm(hidden))


PASSES = {
    a_pass(norm=False): "the last norm is missing",
    a_pass(layers=lambda each: each[:-1]): "the last block is missing",
    a_pass(keep=False): "no block has run",
    a_pass(layers=lambda each: each[::-1]): "the blocks run from last to first",
    a_pass(last=lambda logits: logits.softmax(-1)): "logits come before softmax",
    a_pass(last=lambda logits: logits[:, -1:]): r"should have shape \[2, 6, 40\], but has \[2, 1, 40\]",
    a_pass(last=lambda logits: None): "is there a return",
    one_position_only: "should be within 0.001 of the expected values",
}


WRONG = {
    "my_gelu": {
        F.gelu: "is the exact GELU",
        sigmoid_gelu: "sigmoid",
        share_alone: "multiply it by x",
        square_for_cube: "should be",
        no_half: "the factor 0.5 is missing",
        caret_for_power: r"my_gelu\(\[-3.0, .*\]\): your code raised (NotImplemented|Runtime)Error",
    },
    "my_layer_norm": {
        sample_variance: "is divided by C - 1",
        no_root: "by the square root of the variance",
        eps_outside_the_root: "added to the variance, before the root",
        drops_the_dimension: "keepdim=True",
        over_all_tokens: "normalised over its own 4 numbers",
    },
    "MyBlock": {
        WaitsForAttention: "your residual is sequential",
        TiesTheNorms: "the branches share one norm",
        NormsInARow: "the MLP's norm reads the output of attention's norm",
        SwapsTheNorms: "through the other's norm",
        ForgetsTheStream: "x itself is missing",
        ForgetsTheCache: "pass layer_index and cache on to attention",
        ChangesItsInput: "changes its input",
        OtherNames: "has no input_layernorm.bias",
    },
    "my_forward": PASSES,
}
TRIES = [(name, wrong, says) for name, tries in WRONG.items() for wrong, says in tries.items()]


@pytest.mark.parametrize(("name", "wrong", "says"), TRIES, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_try_hears_which_property_failed(name, wrong, says):
    """'Wrong' teaches nothing; what the try does instead, on which input, does. And no wrong block tells a story."""
    result = CHECKS[name](wrong)
    assert not result.passed
    assert "story" not in result.message and "stub" not in result.message
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(result.message)


@pytest.mark.parametrize("name", CHECKS)
def test_different_wrong_tries_hear_different_things(name):
    messages = [CHECKS[name](wrong).message for wrong in WRONG[name]]
    assert len(set(messages)) == len(messages)


def test_a_function_in_place_of_a_class_is_told_so():
    """`my_block` as a function is a natural try, and create_model could not build it."""
    assert "MyBlock should be a class" in exercises.parallel_block(lambda config, index: Parts(config, index)).message


@torch.inference_mode()
def test_the_bug_exhibits_are_caught_by_the_named_checks_and_pass_the_blind_ones(lesson):
    """The lesson of the exhibits: shapes prove nothing, a loss little, a reference everything."""
    names = lesson.names
    caught = {check.__name__: [name for name in names["VERSIONS"] if not check(name)] for check in names["CHECKS"]}
    assert caught["shapes_fit"] == []
    assert caught["loss_within_1_percent"] == ["SecondBlock"]
    assert "right" not in caught["same_story"]
    assert caught["logits_to_1e_5"] == ["FirstBlock", "SecondBlock", "ThirdMLP"]
    assert len(lesson.exhibits()) == 3 and all(
        any(f"class {name}(" in source for source in lesson.exhibits()) for name in caught["logits_to_1e_5"]
    )


def test_the_parity_table_names_the_first_step_that_differs(lesson, capsys):
    """The table is what a reader takes along to port other models: a bug's address must be right in any block."""
    names = lesson.names
    for index in (0, 5):
        names["ours"].layers[index].use_parallel_residual = False
        found = names["distances"](names["ours"], names["theirs"], names["ids"])
        names["ours"].layers[index].use_parallel_residual = True
        assert names["parity_table"](found) == f"layers.{index}"
    assert capsys.readouterr().out.count("<- first") == 2


def test_the_parts_of_20b_add_up(lesson):
    """The number on the cover."""
    by_part = lesson.names["by_part"]
    assert sum(by_part.values()) == neox_20b().parameter_count() == 20_554_567_680
    assert by_part["norms"] == (2 * 44 + 1) * 2 * 6144
    assert tiny().parameter_count() == sum(lesson.names["parameters_by_part"](lesson.names["model"]).values())
