"""One layer, and its MLP, against plain formulas."""

import math

import pytest
import torch

from neox_lib.block import MLP, Block
from neox_lib.config import NeoXConfig
from neox_lib.rotary import rotary_table


def config(**changes) -> NeoXConfig:
    shape = {"vocab_size": 32, "tokenizer_vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 1}
    return NeoXConfig(**(shape | {"num_attention_heads": 3, "intermediate_size": 80} | changes))


def gelu(x: float, hidden_act: str) -> float:
    """Both GELUs by their formulas (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415)."""
    if hidden_act == "gelu":
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_fast"])
@torch.inference_mode()
def test_mlp_bends_with_the_gelu_of_the_config(hidden_act):
    """The two differ by up to 0.0005 a number: too little to see in a text, enough to miss the published scores."""
    mlp = MLP(config(hidden_act=hidden_act)).double()
    torch.manual_seed(0)
    hidden = 3 * torch.randn(1, 5, 48, dtype=torch.float64)
    wide = hidden @ mlp.dense_h_to_4h.weight.T + mlp.dense_h_to_4h.bias
    by_formula = wide.clone().apply_(lambda x: gelu(x, hidden_act))
    expected = by_formula @ mlp.dense_4h_to_h.weight.T + mlp.dense_4h_to_h.bias
    torch.testing.assert_close(mlp(hidden), expected, atol=1e-9, rtol=1e-9)


def random_block(**changes) -> tuple[Block, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """A block whose two norms differ, some input, and cos and sin."""
    torch.manual_seed(0)
    shape = config(**changes)
    block = Block(shape, 0).eval()
    with torch.no_grad():
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    hidden = torch.randn(2, 7, shape.hidden_size)
    return block, hidden, rotary_table(7, shape.rotary_ndims, 10000, torch.device("cpu"), torch.float32)


@torch.inference_mode()
def test_parallel_branches_both_read_the_input():
    """x + attention(norm1(x)) + mlp(norm2(x)): the second norm only sounds as if it followed attention."""
    block, x, table = random_block()
    expected = x + block.attention(block.input_layernorm(x), *table) + block.mlp(block.post_attention_layernorm(x))
    torch.testing.assert_close(block(x, *table), expected)


@torch.inference_mode()
def test_sequential_mlp_reads_what_attention_left():
    """The other order (RedPajama-INCITE) must come from the config, and must not be the same thing."""
    block, x, table = random_block(use_parallel_residual=False)
    attended = x + block.attention(block.input_layernorm(x), *table)
    expected = attended + block.mlp(block.post_attention_layernorm(attended))
    torch.testing.assert_close(block(x, *table), expected)
    block.use_parallel_residual = True
    assert (block(x, *table) - expected).abs().max() > 1e-2


def test_norm_epsilon_comes_from_the_config():
    """A tiny input shows the epsilon: with another one the norm would scale it differently."""
    block, _, _ = random_block(layer_norm_eps=1e-2)
    assert block.input_layernorm.eps == block.post_attention_layernorm.eps == 1e-2
