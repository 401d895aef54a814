"""Reads and writes Hugging Face's `config.json`: the same model under the names of `transformers`, old and new."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from neox_lib.checkpoints.files import WEIGHT_DTYPES, CheckpointError, read_object
from neox_lib.checkpoints.slim.settings import COMPUTED, HARMLESS_WHEN, unusual_settings
from neox_lib.checkpoints.tokenizer_files import role_fields, with_vocabulary
from neox_lib.config import NeoXConfig
from neox_lib.rope_scaling import ROPE_TYPES, RopeScaling, yarn_attention_factor

logger = logging.getLogger(__name__)

# What `transformers` fills in for a key that is not there (its GPTNeoXConfig), and the name of each activation here:
# gelu_new, gelu_pytorch_tanh and the others are the same tanh formula as gelu_fast, written differently.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
ACTIVATION_OF = dict.fromkeys(("gelu", "gelu_python"), "gelu") | dict.fromkeys(
    ("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_fast"
)

# Settings that `transformers` passes to any model's attention, and when they change nothing in a context so long.
WINDOWS: dict[str, Callable[[Any, int], bool]] = {
    "sliding_window": lambda value, context: value == 0 or value >= context,
    "attention_chunk_size": lambda value, context: value == 0 or value >= context,
    "layer_types": lambda value, context: set(value) == {"full_attention"},
    "is_causal": lambda value, context: value is True,
}


def read_huggingface_config(folder: Path) -> NeoXConfig:
    """The config of a Hugging Face folder, in either dialect; what is absent has the default of `transformers`.

    Raises CheckpointError, naming file and key, for another architecture and for what NeoXModel does not compute.
    """
    path = folder / "config.json"
    fields = read_object(path)
    try:
        check_computable(path, fields)
        ours = {name: fields.get(name, default) for name, default in DEFAULTS.items()}
        ours["rope_scaling"] = read_rope_scaling(path, fields)
        ours["rotary_pct"] = rotary_setting(path, fields, "rotary_pct", "partial_rotary_factor", 0.25)
        ours["rotary_emb_base"] = rotary_setting(path, fields, "rotary_emb_base", "rope_theta", 10000)
        ours["hidden_act"] = ACTIVATION_OF[fields.get("hidden_act", "gelu")]
        config = NeoXConfig(**ours, tokenizer_vocab_size=ours["vocab_size"])
        return with_vocabulary(config, folder, fields)
    except CheckpointError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: not a GPT-NeoX config: {error}") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the weights in `config.json`, in either dialect; fp16 where it is missing."""
    fields = read_object(folder / "config.json")
    return WEIGHT_DTYPES.get(str(fields.get("torch_dtype") or fields.get("dtype")), torch.float16)


def check_computable(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the key, for what this library computes differently or not at all."""
    found = fields.get("model_type")
    if found != "gpt_neox":
        raise CheckpointError(f'{path}: model_type is {found!r}; only models of type "gpt_neox" can be run here')
    activation = fields.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATION_OF:
        names = ", ".join(ACTIVATION_OF)
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; it must be one of {names} to be run")
    head_dim = fields.get("head_dim")
    hidden_size, heads = (fields.get(name, DEFAULTS[name]) for name in ("hidden_size", "num_attention_heads"))
    if head_dim is not None and not (type(head_dim) is type(heads) is int and head_dim * heads == hidden_size):
        raise CheckpointError(
            f"{path}: head_dim is {head_dim!r}; {heads} heads of it do not make a hidden_size of {hidden_size}"
        )
    context = fields.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    for key, harmless in WINDOWS.items():
        if (value := fields.get(key)) is not None and not harmless(value, context):
            raise CheckpointError(f"{path}: {key} is {value!r}; only attention to all earlier tokens can be run")
    for name, value in unusual_settings(fields):
        if name in (*COMPUTED, *HARMLESS_WHEN):
            logger.warning("%s: %s is %r, which transformers ignores, and so do we", path, name, value)


def rotary_setting(path: Path, fields: Mapping[str, Any], old: str, new: str, default: float) -> float:
    """A rotary setting under its older name or its newer one in `rope_parameters`. Raises CheckpointError for two."""
    values = {old: fields.get(old)}
    for key in ("rope_scaling", "rope_parameters"):
        values[f"{key}.{new}"] = (fields.get(key) or {}).get(new)
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        said = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise CheckpointError(f"{path}: {said} contradict each other; keep the one that the model was trained with")
    return next(iter(given.values()), default)


def read_rope_scaling(path: Path, fields: Mapping[str, Any]) -> RopeScaling | None:
    """How rotary frequencies are scaled, as `rope_scaling` or `rope_parameters` says; None where they are plain.

    Raises CheckpointError, naming the key, for a kind that can't be run, for settings per layer, and when the two
    contradict each other.
    """
    said: dict[str, RopeScaling | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.get(key)
        if not rope:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        nested = isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values())
        if nested or kind not in ("default", *ROPE_TYPES):
            found = "settings for each kind of layer" if nested else f"of type {kind!r}"
            raise CheckpointError(f"{path}: {key} is {found}; only one of default, {', '.join(ROPE_TYPES)} can be run")
        said[key] = None if kind == "default" else rope_scaling_of(kind, rope, fields)
    if len(set(said.values())) > 1:
        raise CheckpointError(
            f"{path}: rope_scaling and rope_parameters contradict each other; keep the one that the model was trained "
            "with"
        )
    return next(iter(said.values()), None)


def rope_scaling_of(kind: str, rope: Mapping[str, Any], fields: Mapping[str, Any]) -> RopeScaling:
    """The scaling that a dictionary describes, as `transformers` fills in what is absent. Raises ValueError."""
    if "factor" not in rope:
        raise ValueError(f"rope_scaling of type {kind} has no factor")
    factor = rope["factor"]
    if kind != "yarn":
        return RopeScaling(kind, factor)
    context = fields.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    # transformers prefers the one outside the dictionary
    original = fields.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", context))
    if factor is None:
        factor = context / original
    grown, weight, divisor = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if grown is None and weight and divisor:
        grown = yarn_attention_factor(factor, weight) / yarn_attention_factor(factor, divisor)
    betas = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    return RopeScaling(kind, factor, original, grown, *betas, rope.get("truncate", True))


def huggingface_fields(config: NeoXConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a `config.json` that `transformers` 4 and 5 and converters built on them read alike.

    Both dialects' keys are there. `eos_token_id` is always given: without it `transformers` takes 2. Which rows stand
    for tokens is up to the tokenizer beside it.
    """
    names = [*DEFAULTS, "hidden_act", "rotary_pct", "rotary_emb_base"]
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **{name: getattr(config, name) for name in names},
        **rope_fields(config),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **role_fields(config),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def rope_fields(config: NeoXConfig) -> dict[str, Any]:
    """The rotary settings in both dialects; the older one has the kind of scaling under `type`."""
    plain = {"rope_theta": float(config.rotary_emb_base), "partial_rotary_factor": config.rotary_pct}
    if config.rope_scaling is None:
        return {"rope_parameters": {"rope_type": "default", **plain}}
    said = {name: value for name, value in dataclasses.asdict(config.rope_scaling).items() if value is not None}
    kind = said.pop("rope_type")
    numbers = said if kind == "yarn" else {"factor": said["factor"]}
    return {
        "rope_scaling": {"type": kind, **numbers},
        "rope_parameters": {"rope_type": kind, **numbers, **plain},
    }
