"""The baselines, with one of our models' weights: transformers, CTranslate2, llama.cpp in its wheel xllamacpp, and its
fork ik_llama.cpp.
"""

import importlib
import importlib.util
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from neox_lib.bench.candidates import Generate
from neox_lib.checkpoints.build import WithoutInitialValues
from neox_lib.checkpoints.checkpoint import ModelCheckpoint
from neox_lib.checkpoints.files import WEIGHT_DTYPES
from neox_lib.checkpoints.gguf.writer import write_gguf
from neox_lib.checkpoints.huggingface.config import huggingface_fields
from neox_lib.checkpoints.huggingface.layout import names_by_key
from neox_lib.model import NeoXModel
from neox_lib.tokenizer import save_tokenizer, train_tokenizer

# For each of our dtypes, the one a baseline uses. CTranslate2 computes in fp32 or int8 on a CPU, never in fp16.
BASELINES = {
    "transformers": {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"},
    "ctranslate2": {"float32": "float32", "float16": "float32", "int8": "int8"},
    "xllamacpp": {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "q8_0", "int4": "q4_0"},
    "ik_llama_cpp": {"float16": "float16", "int8": "q8_0", "int4": "q4_0"},
}
PACKAGES = {"ik_llama_cpp": "ik-llama-cpp-python"}  # where a package's name is another than its module's


def is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:  # a module set to None, as tests do
        return False


def make_baseline(library: str, model: NeoXModel, dtype: str) -> Generate:
    """A generate function of `library` with the weights of an fp32 `model`. Raises ImportError if it is not
    installed.
    """
    if library == "transformers":
        return hugging_face_generate(hugging_face_twin(model, WEIGHT_DTYPES[dtype]))
    if library == "xllamacpp":
        return llama_generate(model, dtype)
    if library == "ik_llama_cpp":
        return ik_llama_generate(model, dtype)
    return ctranslate2_generate(ctranslate2_twin(model, dtype))


def write_twin(model: NeoXModel, folder: str, dtype: str) -> str:
    """The path of a GGUF file with the model's weights in one of `gguf.writer.TYPES`."""
    tokenizer = Path(folder, "tokenizer.json")
    save_tokenizer(train_tokenizer(["the fox and the hen"], 290), tokenizer)  # any: prompts are given as ids
    return str(write_gguf(ModelCheckpoint(model), folder, tokenizer, dtype))


def llama_generate(model: NeoXModel, dtype: str) -> Generate:
    """llama.cpp in its own settings, with as many threads as torch. `dtype` is one of `gguf.writer.TYPES`."""
    xllamacpp: Any = importlib.import_module("xllamacpp")  # it tells no types
    settings = xllamacpp.CommonParams()
    settings.n_ctx, settings.n_parallel, settings.verbosity = model.config.max_position_embeddings, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        settings.model.path = write_twin(model, folder, dtype)
        server = xllamacpp.Server(settings)  # its mapping outlives the file's name
    always = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        answer = server.handle_completions({"prompt": ids[0].tolist(), "n_predict": new_tokens, **always})
        return [0] * answer["usage"]["completion_tokens"]  # it tells their text, and their number

    return generate


def ik_llama_generate(model: NeoXModel, dtype: str) -> Generate:
    """ik_llama.cpp in its own settings, with as many threads as torch."""
    ik_llama_cpp: Any = importlib.import_module("ik_llama_cpp")
    settings = {"n_ctx": model.config.max_position_embeddings, "n_threads": torch.get_num_threads(), "verbose": False}
    with tempfile.TemporaryDirectory() as folder:
        llama = ik_llama_cpp.IkLlama(write_twin(model, folder, dtype), **settings)

    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        # its own loop also computes what would follow the last token
        written = llama.generate(ids[0].tolist(), max_tokens=new_tokens - 1, temperature=0)
        return [*written, llama._context.sample(-1, temperature=0)]

    return generate


def hugging_face_twin(model: NeoXModel, dtype: torch.dtype) -> Any:
    """A Hugging Face GPTNeoXForCausalLM with the same weights on their device, all in `dtype`; what is in it already
    shares its memory. Raises ImportError without transformers.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    fields: dict[str, Any] = huggingface_fields(model.config, dtype) | {"attn_implementation": "sdpa"}
    with torch.device("meta"), WithoutInitialValues():  # 20B's initial values would need 82 GB of the host
        twin = GPTNeoXForCausalLM(GPTNeoXConfig(**fields))
    names, ours = names_by_key(model.config), model.state_dict()
    state = {key: ours[names.get(key, "final_linear.weight")].to(dtype) for key in twin.state_dict()}
    twin.load_state_dict(state, assign=True)
    twin.gpt_neox.rotary_emb = type(twin.gpt_neox.rotary_emb)(twin.config).to(model.norm.weight.device)
    twin.generation_config.eos_token_id = None  # both sides write every token asked for
    twin.generation_config.pad_token_id = 0
    return twin.requires_grad_(False).eval()


def hugging_face_generate(model: Any, **options) -> Generate:
    """Their generation, greedy; `options` such as a cache's implementation go to `generate`."""

    @torch.inference_mode()
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True} | options
        return model.generate(ids, max_new_tokens=new_tokens, **more)[0, ids.shape[1] :].tolist()

    return generate


def ctranslate2_spec(model: NeoXModel) -> Any:
    """The model under CTranslate2's names: queries, keys and values each in one tensor, ids as their own vocabulary.

    Raises ImportError without ctranslate2, ValueError for a model it does not support.
    """
    from ctranslate2.specs.common_spec import Activation
    from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec

    config = model.config
    plain = config.attention_bias and config.rope_scaling is None
    if config.tie_word_embeddings or not config.use_parallel_residual or not plain:
        raise ValueError(
            "CTranslate2 is compared only for untied models with a parallel residual, attention biases, unscaled rotary"
        )
    activations = {"gelu": Activation.GELU, "gelu_fast": Activation.GELUTanh}
    spec: Any = TransformerDecoderModelSpec.from_config(
        config.num_hidden_layers,
        config.num_attention_heads,
        activation=activations[config.hidden_act],
        rotary_dim=config.rotary_ndims,
        rotary_interleave=False,
        parallel_residual=True,
        shared_layer_norm=False,
    )

    def give(part: Any, module: Any) -> None:
        names = ("gamma", "beta") if isinstance(module, torch.nn.LayerNorm) else ("weight", "bias")
        for name, tensor in zip(names, (module.weight, getattr(module, "bias", None)), strict=True):
            if tensor is not None:
                setattr(part, name, tensor.detach())

    def by_kind(interleaved: Tensor) -> Tensor:
        heads = interleaved.detach().unflatten(0, (config.num_attention_heads, 3, config.head_dim))
        return heads.transpose(0, 1).flatten(0, 2)

    spec.decoder.scale_embeddings = False
    give(spec.decoder.embeddings, model.word_embeddings)
    give(spec.decoder.layer_norm, model.norm)
    give(spec.decoder.projection, model.final_linear)
    blocks: list[Any] = list(model.layers)
    for part, block in zip(spec.decoder.layer, blocks, strict=True):
        give(part.input_layer_norm, block.input_layernorm)
        give(part.post_attention_layer_norm, block.post_attention_layernorm)
        part.self_attention.linear[0].weight = by_kind(block.attention.query_key_value.weight)
        part.self_attention.linear[0].bias = by_kind(block.attention.query_key_value.bias)
        give(part.self_attention.linear[1], block.attention.dense)
        give(part.ffn.linear_0, block.mlp.dense_h_to_4h)
        give(part.ffn.linear_1, block.mlp.dense_4h_to_h)
    spec.config.layer_norm_epsilon = config.layer_norm_eps
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.register_vocabulary([str(token) for token in range(config.vocab_size)])
    return spec


def ctranslate2_twin(model: NeoXModel, dtype: str) -> Any:
    """A ctranslate2.Generator with the weights of an fp32 model, in "float32" or "int8", with as many threads as torch.

    Raises as `ctranslate2_spec` does.
    """
    import ctranslate2

    spec = ctranslate2_spec(model)
    spec.validate()
    spec.optimize(quantization=None if dtype == "float32" else dtype)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        threads = torch.get_num_threads()
        return ctranslate2.Generator(folder, compute_type=dtype, inter_threads=1, intra_threads=threads)


def ctranslate2_generate(generator: Any) -> Generate:
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        prompt = [str(token) for token in ids[0].tolist()]
        length = {"min_length": new_tokens, "max_length": new_tokens, "include_prompt_in_result": False}
        return generator.generate_batch([prompt], sampling_topk=1, **length)[0].sequences_ids[0]

    return generate


def ctranslate2_logits(generator: Any, ids: Tensor) -> Tensor:
    """Its logits `[T, V]` for one text of ids `[1, T]`."""
    logits = generator.forward_batch([[str(token) for token in ids[0].tolist()]])
    return torch.from_numpy(numpy.array(logits))[0]
