"""The two sides of a race: our model and Hugging Face's, with the same random weights."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neox_lib.config import NeoXConfig, pythia, tiny
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.scale.linear import pack_half, use_fast_linear
from neox_lib.scale.loading import DTYPES, Precision

RIVALS = {"packed": "float16"}  # a dtype of ours alone, and which of theirs it is measured against
# generate(ids [1, T], new_tokens) -> token ids written
Generate = Callable[[Tensor, int], list[int]]


def has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def shape_config(shape: str) -> NeoXConfig:
    """ "tiny", the shape of the shipped model, or a Pythia size such as "160m"."""
    return tiny() if shape == "tiny" else pythia(shape)


def random_model(config: NeoXConfig, seed: int = 0) -> NeoXModel:
    """An fp32 model with matrices of standard deviation 0.02, GPT-NeoX's own start."""
    torch.manual_seed(seed)
    model = NeoXModel(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.02)
    return model


def in_precision(model: NeoXModel, dtype: torch.dtype) -> NeoXModel:
    """The same weights as `create_model` would hold them in `dtype` on a CPU, with its fast layers."""
    precision = Precision(dtype, torch.float32, "")
    with torch.device("meta"):
        copy = NeoXModel(model.config)
    state = {name: tensor.to(precision.dtype_of(name)) for name, tensor in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        copy.final_linear.weight = copy.word_embeddings.weight
    return use_fast_linear(copy.requires_grad_(False).eval())


def our_model(model: NeoXModel, dtype: str) -> NeoXModel:
    """The same weights in one of DTYPES, or "packed"."""
    if dtype == "packed":
        return pack_half(in_precision(model, torch.float16))
    return in_precision(model, DTYPES[dtype])


def hugging_face_twin(model: NeoXModel, dtype: torch.dtype) -> Any:
    """A Hugging Face GPTNeoXForCausalLM with the same weights, all in `dtype`; in fp32 it shares their memory.

    Raises ImportError without transformers.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("max_position_embeddings", "layer_norm_eps", "hidden_act", "use_parallel_residual", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": config.rotary_emb_base, "partial_rotary_factor": config.rotary_pct}
    same = {name: getattr(config, name) for name in names}
    same |= {"rope_parameters": rope, "attn_implementation": "sdpa"}
    twin = GPTNeoXForCausalLM(GPTNeoXConfig(**same))
    ours = {"embed_in": "word_embeddings", "final_layer_norm": "norm", "lm_head": "final_linear"}
    ours["embed_out"] = "final_linear"
    state = {}
    for name in twin.state_dict():
        owner, _, rest = name.removeprefix("gpt_neox.").partition(".")
        state[name] = model.state_dict()[f"{ours.get(owner, owner)}.{rest}"].to(dtype)
    twin.load_state_dict(state, assign=True)
    twin.generation_config.eos_token_id = None  # both sides write all the tokens asked for
    twin.generation_config.pad_token_id = 0
    return twin.requires_grad_(False).eval()


def our_generate(model: NeoXModel) -> Generate:
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        return [step.token_id for step in stream_generate(model, ids, new_tokens, stop_token_ids=())]

    return generate


def their_generate(model: Any) -> Generate:
    @torch.inference_mode()
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True}
        return model.generate(ids, max_new_tokens=new_tokens, **more)[0, ids.shape[1] :].tolist()

    return generate
