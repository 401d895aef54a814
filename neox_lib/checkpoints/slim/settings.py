"""Which settings of gpt-neox change what a model computes, and which of their values this library supports.

From gpt-neox's own list (`megatron/neox_arguments/neox_args.py`), names with underscores.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Settings that the config is made from.
READ = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rotary_pct",
    "rotary_emb_base",
    "layernorm_epsilon",
    "bias_gelu_fusion",
    "gpt_j_residual",
    "no_weight_tying",
    "use_bias_in_attn_linear",
)
# Settings that must have these values.
COMPUTED = {
    "activation": "gelu",
    "gpt_j_tied": False,
    "mlp_type": "regular",
    "model_arch": "gpt2",
    "norm": "layernorm",
    "pos_emb": "rotary",
    "use_bias_in_mlp": True,
    "use_bias_in_norms": True,
    "use_mup": False,
}


def only_full_attention(value: Any) -> bool:
    """Whether an `attention_config`, such as [[["global", "flash"], 12]], names nothing but full attention."""
    kinds = [kind for kinds, _ in value for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return all(kind in ("global", "flash") for kind in kinds)


# Settings that change nothing if this holds for their value; one that is off needs no check.
HARMLESS_WHEN: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "attention_config": lambda value, fields: only_full_attention(value),
    "moe_num_experts": lambda value, fields: value == 1,
    "num_experts": lambda value, fields: value == 1,
    "num_kv_heads": lambda value, fields: value == fields.get("num_attention_heads"),
    "num_unique_layers": lambda value, fields: value == fields.get("num_layers"),
    "sliding_window_width": lambda value, fields: value >= fields.get("max_position_embeddings", value + 1),
    "soft_prompt_tuning": lambda value, fields: not value.get("enabled", True),
}
# Settings that sound as if they changed a forward pass but do not: how a kernel computes the same (query-key layer
# scaling divides by the layer's number and multiplies again), training, and details of what is off or refused above.
HARMLESS = re.compile(
    r"\w+_(fusion|dropout|epsilon|data_paths|init_method)|(log|loss|moe|mup|mamba|rpe|gmlp)_\w+|attention_softmax_in_fp32"
    r"|apply_query_key_layer_scaling|rotary_save_freqs_buffer|sparsity_config|expert_interval|create_moe_param_group"
    r"|enable_expert_tensor_parallelism|use_flashattn_swiglu|local_rank|mlp_multiple_of|return_logits|prompt_end|sparse_gradients"
)
# Words in an unknown setting's name, perhaps a fork's, which suggest that it changes a forward pass.
TELLING = re.compile(
    r"(^|_)(adapter|alibi|attention|attn|bias|embeddings?|experts?|gelu|glu|interleaved|kv|local|logits?|lora|mha|mlp|moe|mup"
    r"|norms?|layernorm|rmsnorm|pos|positions?|prompt|qkv?|residual|rope|rotary|sliding|softcap|softmax|sparse|swiglu"
    r"|window)(_|$)"
)


def unusual_settings(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings among `fields`, name and value, that ask for something that this library doesn't compute.

    An unknown setting is one of them when it is on and its name has one of the TELLING words.
    """
    for name, value in fields.items():
        if name in READ:
            continue
        if name in COMPUTED:
            if value != COMPUTED[name]:
                yield name, value
        elif not value:
            continue
        elif name in HARMLESS_WHEN:
            try:
                harmless = HARMLESS_WHEN[name](value, fields)
            except (TypeError, ValueError, AttributeError):
                harmless = False
            if not harmless:
                yield name, value
        elif TELLING.search(name) and not HARMLESS.fullmatch(name):
            yield name, value


def what_can_be_run(name: str) -> str:
    """The part of an error that follows a setting and its value."""
    if name in COMPUTED:
        return f"only {COMPUTED[name]!r} can be run"
    if name in HARMLESS_WHEN:
        return "only attention to all earlier tokens, in layers with their own weights and heads, can be run"
    return "this library doesn't know it, and by its name it may change what the model computes; if not, remove it"
