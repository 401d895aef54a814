"""A model's shape as the keys of a GGUF file, and the names and the order of rows that it has for our parameters."""

from typing import Any

import numpy as np
from torch import Tensor

from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.gguf.file import GGUFFile
from neox_lib.checkpoints.huggingface.config import ACTIVATION_OF
from neox_lib.config import NeoXConfig
from neox_lib.rope_scaling import RopeScaling

ARCHITECTURE = "gptneox"
# What a GPT-NeoX model's keys end in, after "gptneox.", by our names of the same number.
WHOLE_NUMBERS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
PARALLEL, EPSILON = "use_parallel_residual", "attention.layer_norm_epsilon"
ROTARY_NDIMS, ROTARY_BASE, SCALING = "rope.dimension_count", "rope.freq_base", "rope.scaling"
SCALING_FIELDS = {  # after "rope.scaling.", by RopeScaling's names
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
}
ACTIVATION = "hidden_activation"  # ours: llama.cpp always computes the tanh form, and reads no such key here

THEIR_NAME = {"word_embeddings": "token_embd", "norm": "output_norm", "final_linear": "output"}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def their_name(name: str) -> str:
    """A parameter's name in a GGUF file.

    >>> their_name("layers.3.attention.query_key_value.bias"), their_name("final_linear.weight")
    ('blk.3.attn_qkv.bias', 'output.weight')
    """
    path, _, leaf = name.rpartition(".")
    if not path.startswith("layers."):
        return f"{THEIR_NAME[path]}.{leaf}"
    _, index, rest = path.split(".", 2)
    return f"blk.{index}.{IN_BLOCK[rest]}.{leaf}"


def rows_by_kind(name: str, tensor: Tensor, heads: int) -> Tensor:
    """A parameter as GGUF has it: the rows of query_key_value, q, k and v of one head after the other, become those of
    all q, all k, all v. Others stay as they are.
    """
    return reorder(tensor, heads, 3) if "query_key_value" in name else tensor


def rows_by_head(name: str, tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `rows_by_kind`."""
    return reorder(tensor, 3, heads) if "query_key_value" in name else tensor


def reorder(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Rows `[outer, inner, D]` in the order `[inner, outer, D]`."""
    return tensor.reshape(outer, inner, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def gguf_fields(config: NeoXConfig) -> dict[str, Any]:
    """A config's keys and values, floats for what is a fraction there. Raises CheckpointError, naming the setting, for
    what llama.cpp does not compute.
    """
    fields: dict[str, Any] = {key: getattr(config, name) for name, key in WHOLE_NUMBERS.items()}
    fields |= {
        "attention.head_count_kv": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        PARALLEL: config.use_parallel_residual,
        EPSILON: float(config.layer_norm_eps),
        ROTARY_NDIMS: config.rotary_ndims,
        ROTARY_BASE: float(config.rotary_emb_base),
        ACTIVATION: config.hidden_act,
    }
    if (scaling := config.rope_scaling) is not None:
        said = {key: getattr(scaling, name) for key, name in SCALING_FIELDS.items()}
        if scaling.rope_type == "dynamic" or scaling != RopeScaling(scaling.rope_type, *said.values()):
            raise CheckpointError(
                f"{scaling}: llama.cpp runs only linear, and yarn with its usual betas and attention_factor; write "
                "another layout"
            )
        said |= {"type": scaling.rope_type, "factor": float(scaling.factor)}
        fields |= {f"{SCALING}.{key}": value for key, value in said.items() if value is not None}
    return {f"{ARCHITECTURE}.{key}": value for key, value in fields.items()}


def shortest(value: Any) -> Any:
    """The shortest decimal of an fp32 number: 1e-05 was written, 9.999999747378752e-06 is in the file."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_gguf_config(file: GGUFFile) -> NeoXConfig:
    """The config of a GGUF file. Without its own key for the activation it is the tanh form, as llama.cpp computes it.

    Raises CheckpointError, naming file and key, for another architecture and for what NeoXModel does not compute.
    """
    found = file.fields.get("general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(f"{file}: the model is a {found!r}; only a {ARCHITECTURE!r} can be run here")
    own = {
        key.removeprefix(f"{ARCHITECTURE}."): shortest(value)
        for key, value in file.fields.items()
        if key.startswith(f"{ARCHITECTURE}.")
    }
    try:
        ours: dict[str, Any] = {name: own[key] for name, key in WHOLE_NUMBERS.items()}
        heads, activation = ours["num_attention_heads"], own.get(ACTIVATION, "gelu_fast")
        if own.get("attention.head_count_kv", heads) != heads:
            raise ValueError("keys and values have fewer heads than queries")
        if activation not in ACTIVATION_OF:
            raise ValueError(f"{ACTIVATION} is {activation!r}")
        ours["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
        head_dim = ours["hidden_size"] // heads
        return NeoXConfig(
            **ours,
            tokenizer_vocab_size=ours["vocab_size"],
            rotary_pct=share(own.get(ROTARY_NDIMS, head_dim), head_dim),
            rotary_emb_base=own.get(ROTARY_BASE, 10000.0),
            layer_norm_eps=own[EPSILON],
            hidden_act=ACTIVATION_OF[activation],
            use_parallel_residual=own.get(PARALLEL, True),
            tie_word_embeddings="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_qkv.bias" in file.tensors,
            rope_scaling=read_scaling(own),
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: lacks {error}; fetch or convert it again") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: not a GPT-NeoX config: {error}") from error


def share(rotary_ndims: int, head_dim: int) -> float:
    """The `rotary_pct` of which a config makes just so many dimensions.

    >>> share(24, 96), int(47 * (6 / 47)), int(47 * share(6, 47))
    (0.25, 5, 6)
    """
    exact = rotary_ndims / head_dim
    return exact if int(head_dim * exact) == rotary_ndims else (rotary_ndims + 0.5) / head_dim


def read_scaling(own: dict[str, Any]) -> RopeScaling | None:
    """How rotary frequencies are scaled, by keys without "gptneox.". Raises ValueError for what can't be run."""
    said = {key.removeprefix(f"{SCALING}."): value for key, value in own.items() if key.startswith(f"{SCALING}.")}
    kind = said.pop("type", "none")
    if kind == "none":
        return None
    if unknown := [key for key in said if key not in (*SCALING_FIELDS, "finetuned")]:
        raise ValueError(f"{SCALING}.{unknown[0]} is {said[unknown[0]]!r}, which can't be run")
    return RopeScaling(kind, **{SCALING_FIELDS[key]: value for key, value in said.items() if key in SCALING_FIELDS})
