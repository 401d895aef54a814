"""Shapes that several tests share: small, and each with one rule of the family changed."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from neox_lib.checkpoints.build import build_model
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel
from neox_lib.rope_scaling import RopeScaling
from neox_lib.tokenizer import save_tokenizer, train_tokenizer

WITH_TOKENIZER = NeoXConfig(  # room for a tokenizer of 300 tokens, and padding rows behind it
    vocab_size=384,
    tokenizer_vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=256,
)
BASE = NeoXConfig(
    vocab_size=128,
    tokenizer_vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=64,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=16, beta_fast=4)


@torch.no_grad()
def randomize(model: nn.Module, seed: int, gain: float = 1.5) -> None:
    """Random weights whose mistakes show: every bias and norm takes part, and logits spread by about `gain`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif parameter.dim() == 1:
            parameter.normal_(0, 0.1, generator=generator)
        elif name.endswith(("embed_in.weight", "word_embeddings.weight")):
            parameter.normal_(0, 1, generator=generator)
        else:
            parameter.normal_(0, gain / parameter.shape[1] ** 0.5, generator=generator)


def family(base: NeoXConfig) -> dict[str, NeoXConfig]:
    """What GPT-NeoX models differ in, by name: activation, residual, tied or not, biases, rotary share, base
    and scaling, epsilon."""
    both = replace(base, tie_word_embeddings=True, use_parallel_residual=False, hidden_act="gelu", rotary_pct=0.5)
    return {
        "20b rules": base,
        "exact gelu": replace(base, hidden_act="gelu"),
        "sequential residual": replace(base, use_parallel_residual=False),
        "tied": replace(base, tie_word_embeddings=True),
        "tied, sequential, exact, half rotary": both,
        "no attention bias, linear rotary": replace(
            base, attention_bias=False, rope_scaling=RopeScaling("linear", 3.0)
        ),
        "yarn": replace(base, rotary_pct=1.0, rope_scaling=YARN),
        "dynamic rotary": replace(base, rotary_pct=0.5, rope_scaling=RopeScaling("dynamic", 2.0)),
        "rotary everywhere, another base and epsilon": replace(
            base, rotary_pct=1.0, rotary_emb_base=500, layer_norm_eps=1e-3
        ),
    }


def load(path: str | Path, dtype: torch.dtype | None = None) -> NeoXModel:
    """A checkpoint's model on the CPU, all of it in `dtype`, or as it is stored: nothing chosen, nothing made fast."""
    return build_model(open_checkpoint(path), dtype_of=lambda name: dtype)


def write_chat_model(folder: Path) -> Path:
    """A random model that converses, in Hugging Face's layout; its folder."""
    model, tokenizer = NeoXModel(WITH_TOKENIZER).eval(), folder.with_name("own.json")
    randomize(model, seed=4)
    save_tokenizer(train_tokenizer(["the fox and the hen"], 300), tokenizer)
    write_huggingface(model, folder, tokenizer)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
