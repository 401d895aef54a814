"""Hugging Face folders, read: the same model comes out, whoever wrote it and in which files."""

import json
import os
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import hugging_face_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.huggingface.layout import WHOLE
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.config import NeoXConfig
from neox_lib.generation import greedy_generate
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.tokenizer import read_tokenizer
from tests import small_models
from tests.small_models import family, randomize

BASE = small_models.BASE
CONFIGS = family(BASE)
IDS = torch.arange(40)[None] * 3 % 128


def hugging_face_model(config: NeoXConfig, seed: int = 0):
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(hugging_face_config(config)).eval()
    randomize(model, seed)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """An untied model as transformers saves it: one safetensors file."""
    folder = tmp_path_factory.mktemp("plain")
    hugging_face_model(BASE).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A copy of `plain` to do damage to."""
    return Path(shutil.copytree(plain, tmp_path / "m"))


def logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return create_model(path, device="cpu", dtype="float32")(IDS)


def edit_config(folder: Path, **changes) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def shard(folder: Path, ending: str, sizes: tuple[int, int] = (10, 99)) -> None:
    """Cut model.safetensors into two shards of that ending and an index, as the Hub has large models."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    keys, weight_map = list(tensors), {}
    for number, part in enumerate((keys[: sizes[0]], keys[sizes[0] :]), 1):
        name = f"{stem}-{number:05d}-of-00002.{ending}"
        save = save_file if ending == "safetensors" else torch.save
        save({key: tensors[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def whole_bin(folder: Path, zip_format: bool = True) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)


# What comes out


@st.composite
def rope_dialects(draw) -> dict:
    """Fields of a config.json about rotary positions and biases, in the older words or the newer ones."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn"]))
    rope: dict[str, Any] = {} if kind == "default" else {"factor": draw(st.sampled_from([1.0, 1.5, 4, 16.0]))}
    if kind == "yarn":
        choices = {
            "original_max_position_embeddings": [8, 32, 64],
            "attention_factor": [0.8, 1.3, None],
            "beta_fast": [2.0, 32, None],
            "beta_slow": [0.5, 1, None],
            "mscale": [0.7, None],
            "mscale_all_dim": [1.2, 0.3],
            "truncate": [True, False],
        }
        rope |= {name: draw(st.sampled_from(values)) for name, values in choices.items() if draw(st.booleans())}
        if draw(st.booleans()) and rope.get("original_max_position_embeddings"):
            rope["factor"] = draw(st.sampled_from([rope["factor"], None]))
    # with a single pair transformers divides by zero in dynamic scaling
    share, base = (
        draw(st.sampled_from([0.5, 1.0] if kind == "dynamic" else [0.25, 0.5, 1.0])),
        draw(st.sampled_from([10000, 500.0])),
    )
    fields: dict[str, Any] = {"attention_bias": draw(st.booleans())}
    if kind == "yarn" and draw(st.booleans()):
        fields["original_max_position_embeddings"] = 24
    if draw(st.booleans()):
        scaling = {} if kind == "default" else {"rope_scaling": {"type": kind, **rope}}
        return fields | scaling | {"rotary_pct": share, "rotary_emb_base": base}
    words = {"rope_type": kind, **rope, "partial_rotary_factor": share, "rope_theta": base}
    return fields | {"rope_parameters": words}


@settings(max_examples=25, deadline=None)
@given(dialect=rope_dialects(), heads=st.sampled_from([1, 2, 4]))
@torch.inference_mode()
def test_rotary_positions_are_scaled_as_transformers_scales_them(tmp_path_factory, dialect, heads):
    """In both dialects, with whatever may be left out: logits to 1e-5, and the text written after them."""
    from transformers import GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("rope")
    changed = replace(BASE, num_attention_heads=heads, attention_bias=dialect["attention_bias"])
    hugging_face_model(changed, seed=heads).save_pretrained(folder)
    edit_config(folder, rope_parameters=None)
    edit_config(folder, **dialect)
    theirs, ours = GPTNeoXForCausalLM.from_pretrained(folder).eval(), create_model(folder, dtype="float32")
    expected = theirs(IDS).logits
    assert (ours(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()
    written = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    assert greedy_generate(ours, IDS, 46)[0][: written.shape[1]] == written[0].tolist()
    shutil.rmtree(folder)


@pytest.mark.parametrize("case", CONFIGS)
@torch.inference_mode()
def test_a_folder_of_transformers_gives_its_logits_and_its_text(tmp_path, case):
    """Every kind of model in this family. Bound: 1e-5 of the widest logit, in fp32."""
    theirs = hugging_face_model(CONFIGS[case], seed=len(case))
    theirs.save_pretrained(tmp_path)
    ours = create_model(tmp_path, device="cpu", dtype="float32")
    assert ours.config == CONFIGS[case]
    expected = theirs(IDS).logits
    width = expected.abs().max().item()
    assert width > 2, "with tiny logits the bound would mean nothing"
    assert (ours(IDS) - expected).abs().max().item() <= 1e-5 * width
    prompt = IDS[:, 1:7]
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    assert greedy_generate(ours, prompt, 30) == written.tolist()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda folder: shard(folder, "safetensors"),
        whole_bin,
        lambda folder: whole_bin(folder, zip_format=False),
        lambda folder: shard(folder, "bin"),
        lambda folder: shard(folder, "safetensors", sizes=(1, 99)),
    ],
    ids=["sharded safetensors", "bin", "bin of an old torch", "sharded bin", "uneven shards"],
)
def test_however_the_weights_are_filed_the_model_is_the_same(plain, folder, rewrite):
    rewrite(folder)
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(logits(folder), logits(plain))


def test_safetensors_are_taken_before_bin_files(plain, folder):
    """Many models on the Hub have both; the first is the one that can do no harm and is mapped."""
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert torch.equal(logits(folder), logits(plain))


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_out.weight"])
def test_both_names_of_the_output_matrix_are_read(plain, folder, name):
    """transformers 5 calls it lm_head in memory, and embed_out on the disk."""
    edit_weights(folder, lambda tensors: tensors.update({name: tensors.pop("embed_out.weight")}))
    assert torch.equal(logits(folder), logits(plain))


def test_a_tied_base_model_is_enough(tmp_path):
    """A bare GPTNeoXModel is saved without its prefix; tied, it lacks nothing."""
    theirs = hugging_face_model(CONFIGS["tied"])
    theirs.save_pretrained(tmp_path / "whole")
    theirs.gpt_neox.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(tmp_path / "base"), logits(tmp_path / "whole"))


@pytest.mark.parametrize(
    "place", ["module.", "_orig_mod.", "base_model.model.", "transformer.", "a.trainer's._orig_mod."]
)
@pytest.mark.parametrize("rewrite", [lambda folder: None, lambda folder: shard(folder, "safetensors"), whole_bin])
def test_what_stands_in_front_of_all_names_is_no_part_of_them(plain, folder, place, rewrite):
    """DDP, torch.compile, PEFT and trainers save a model under the name that it has inside of theirs."""

    def put_inside(tensors):
        for key in list(tensors):
            words = key.split(".")
            if "_orig_mod" in place and "layers" in words:  # FSDP and compiled blocks
                words.insert(words.index("layers") + 2, "_fsdp_wrapped_module")
            tensors[place + ".".join(words)] = tensors.pop(key)

    edit_weights(folder, put_inside)
    rewrite(folder)
    assert torch.equal(logits(folder), logits(plain))


def test_a_base_model_inside_of_another(tmp_path):
    """The body under a name of the owner's, without gpt_neox, and an output matrix beside it."""
    theirs = hugging_face_model(BASE)
    theirs.save_pretrained(tmp_path)
    edit_weights(
        tmp_path,
        lambda tensors: [
            tensors.update({"transformer." + key.removeprefix("gpt_neox."): tensors.pop(key)})
            for key in list(tensors)
            if "gpt_neox" in key
        ],
    )
    with torch.inference_mode():
        assert (logits(tmp_path) - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "head", ["v_head.summary.weight", "v_head.0.weight", "ilql_heads.target_q_heads.0.0.bias", "value_head.weight"]
)
def test_a_value_head_beside_the_model_is_left_out_with_a_note(plain, folder, caplog, head):
    """PPO judges the model's texts with it; the texts are written without."""
    edit_weights(folder, lambda tensors: tensors.update({head: torch.ones(1, 32)}))
    assert torch.equal(logits(folder), logits(plain))
    (message,) = caplog.messages
    assert f"model.safetensors: {head}: a value head beside the model is left out" in message


def test_a_quantization_config_over_plain_weights_is_passed_over_with_a_note(plain, folder, caplog):
    """A model merged after QLoRA often keeps one. What counts is what lies in the files; those below are refused."""
    caplog.set_level("INFO")
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert torch.equal(logits(folder), logits(plain))
    assert any("quantization_config is ignored" in message for message in caplog.messages)


def test_settings_of_gpt_neox_that_transformers_ignores_get_a_note(plain, folder, caplog):
    edit_config(folder, use_mup=True, attention_config=[[["local"], 2]], sliding_window=None, sliding_window_width=64)
    assert torch.equal(logits(folder), logits(plain))
    assert [message.split(": ")[1].split(" is ")[0] for message in caplog.messages] == ["use_mup", "attention_config"]


def test_old_buffers_are_passed_over(plain, folder):
    """Pythia's files carry the causal mask, its fill value and the rotary frequencies of every layer."""

    def add(tensors):
        tensors["gpt_neox.layers.1.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        tensors["gpt_neox.layers.1.attention.masked_bias"] = torch.tensor(-1e9)
        tensors["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(1, dtype=torch.float64)

    edit_weights(folder, add)
    assert torch.equal(logits(folder), logits(plain))


def test_the_older_dialect_of_the_config(plain, folder):
    edit_config(folder, rope_parameters=None, rotary_pct=0.25, rotary_emb_base=10000)
    assert torch.equal(logits(folder), logits(plain))
    edit_config(folder, rotary_pct=0.5, rotary_emb_base=500)
    config = open_checkpoint(folder).config
    assert (config.rotary_pct, config.rotary_emb_base) == (0.5, 500)


def test_absent_keys_have_the_defaults_of_transformers(folder):
    """Their default activation is the exact GELU, where ours is 20B's: a model must not change by what is not said."""
    from transformers import GPTNeoXConfig

    sizes = {name: getattr(BASE, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes |= {name: getattr(BASE, name) for name in ("num_attention_heads", "intermediate_size")}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", **sizes}))
    ours, theirs = open_checkpoint(folder).config, GPTNeoXConfig(**sizes)
    assert ours.hidden_act == theirs.hidden_act == "gelu"
    for name in ("max_position_embeddings", "layer_norm_eps", "use_parallel_residual", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    rope = theirs.rope_parameters
    assert (ours.rotary_pct, ours.rotary_emb_base) == (rope["partial_rotary_factor"], rope["rope_theta"])


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_python", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"]
)
def test_each_name_of_gelu_is_the_formula_that_transformers_means(folder, name):
    """The two formulas differ by up to 5e-4, rounding of one by 1e-6: enough to tell them apart."""
    from transformers.activations import ACT2FN

    edit_config(folder, hidden_act=name)
    ours = open_checkpoint(folder).config.hidden_act
    x = torch.linspace(-4, 4, 1001)
    found = torch.nn.functional.gelu(x, approximate="tanh" if ours == "gelu_fast" else "none")
    assert (found - ACT2FN[name](x)).abs().max() < 1e-6


def test_mixed_precisions_round_nothing(plain, folder):
    """Matrices come in the widest precision that any of them has; norms and biases as they are."""
    norm, matrix = "gpt_neox.final_layer_norm.weight", "gpt_neox.embed_in.weight"

    def mix(tensors):
        for key in tensors:
            if key not in (norm, matrix):
                tensors[key] = tensors[key].half()

    edit_weights(folder, mix)
    weights, exact = open_checkpoint(folder), load_file(folder / "model.safetensors")
    found = dict(weights.tensors())
    assert weights.dtype == torch.float32
    assert {tensor.dtype for tensor in found.values() if tensor.dim() == 2} == {torch.float32}
    assert found["norm.bias"].dtype == torch.float16
    assert {name: tensor.dtype for name, tensor in found.items()} == weights.dtypes()
    assert torch.equal(found["word_embeddings.weight"], exact[matrix])
    assert torch.equal(found["norm.weight"], exact[norm])
    assert torch.equal(
        found["layers.0.mlp.dense_h_to_4h.weight"], exact["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"].float()
    )


def test_a_model_stored_in_half_precision_says_so(folder):
    edit_weights(folder, lambda tensors: tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()}))
    weights = open_checkpoint(folder)
    assert weights.dtype == torch.bfloat16
    assert weights.nbytes == 2 * BASE.parameter_count() == sum(tensor.nbytes for _, tensor in weights.tensors())


def test_loading_needs_no_transformers_and_keeps_no_file_open(folder, monkeypatch):
    """The library runs where only safetensors is installed; and a file that stays mapped can't be replaced on Windows,
    and here would change the model under our hands."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = create_model(folder, device="cpu", dtype="float32")
    before = model(IDS)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    assert torch.equal(model(IDS), before)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()


def test_the_tokenizer_beside_the_weights_says_which_rows_stand_for_tokens(folder, tmp_path):
    """Padding rows hold noise: generation must never choose one."""
    assert open_checkpoint(folder).config.tokenizer_vocab_size == 128
    small = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text())
    small["model"]["vocab"] = dict(list(small["model"]["vocab"].items())[:100])
    small["model"]["merges"] = []
    small["added_tokens"] = [token for token in small["added_tokens"] if token["id"] < 100]
    (folder / "tokenizer.json").write_text(json.dumps(small))
    assert open_checkpoint(folder).config.tokenizer_vocab_size == 100


def test_without_a_tokenizer_no_row_is_taken_for_padding(folder):
    """Whoever fine-tuned 20B gave its padding rows to tokens of their own: a size alone tells nothing."""
    edit_config(folder, vocab_size=50304, tokenizer_vocab_size=50277)
    padded = torch.zeros(50304, 32)
    edit_weights(folder, lambda tensors: tensors.update({"gpt_neox.embed_in.weight": padded.clone()}))
    edit_weights(folder, lambda tensors: tensors.update({"embed_out.weight": padded}))
    assert open_checkpoint(folder).config.tokenizer_vocab_size == 50304


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPTNeoXTokenizerFast"])
def test_a_tokenizer_that_transformers_saved_is_read_by_both_of_ours(tokenizer_20b_path, tmp_path, kind):
    """Its file differs from the release's in details; the ids must not."""
    from transformers import AutoTokenizer

    shutil.copy(tokenizer_20b_path, tmp_path / "tokenizer.json")
    content = {"tokenizer_class": kind, "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    fast, slow = create_tokenizer(tmp_path / "saved"), read_tokenizer(tmp_path / "saved" / "tokenizer.json")
    real = create_tokenizer(tokenizer_20b_path)
    for text in (
        "  def f(x):\n        return x",
        "na\u00efve e\u0301<|endoftext|> 1234",
        "x" + 25 * " " + "y",
        "\U0001f98a \u00a0z",
    ):
        assert fast.encode(text).ids == slow.encode(text) == real.encode(text).ids


# What is refused


def write_header(folder: Path, header: bytes, length: int | None = None) -> None:
    """Put another header before the tensors of model.safetensors, or lie about its length."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + content[end:])


def truncate(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * keep))


def quantize(folder: Path, dtype: torch.dtype) -> None:
    key = "gpt_neox.layers.0.attention.dense.weight"
    edit_weights(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))


def quantized(method: str | None, *endings: str, dtype: torch.dtype = torch.int32):
    """A matrix as another program's method stores it: in place of the weight, tensors of these endings."""

    def write(folder: Path) -> None:
        name = "gpt_neox.layers.0.attention.dense"
        edit_weights(folder, lambda tensors: tensors.pop(f"{name}.weight"))
        parts = {f"{name}.{ending}": torch.zeros(4, 4, dtype=dtype) for ending in endings}
        edit_weights(folder, lambda tensors: tensors.update(parts))
        if method is not None:
            edit_config(folder, quantization_config={"quant_method": method})

    return write


def quantized_to_half_the_size(folder: Path) -> None:
    """As torchao has it: nothing but the config tells, and the file would be refused as a pickle."""
    (folder / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": torch.zeros(4)}, folder / "pytorch_model.bin")
    edit_config(folder, quantization_config={"quant_method": "torchao"}, _name_or_path="EleutherAI/pythia-70m")


def weights_named_as(name: str, **config):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
        (folder / name).write_text("{}")
        edit_config(folder, **config)

    return write


class Hostile:
    """A pickle that would make a file."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def hostile(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": Hostile()}, folder / "pytorch_model.bin")


def truncated_bin(folder: Path) -> None:
    whole_bin(folder)
    path = folder / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size // 2)


def lose_shard(folder: Path) -> None:
    shard(folder, "safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_key_of_shard(folder: Path) -> None:
    shard(folder, "safetensors")
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors.pop("gpt_neox.embed_in.weight")
    save_file(tensors, path)


def index_that_says(text: str):
    def write(folder: Path) -> None:
        shard(folder, "safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def tie_what_differs(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)


def base_model(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("embed_out.weight"))


def other_architecture(folder: Path) -> None:
    edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def config_is(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def without(name: str):
    return lambda folder: (folder / name).unlink()


def config_says(**changes):
    return lambda folder: edit_config(folder, **changes)


def two_models(folder: Path) -> None:
    put = {f"{name}.": load_file(folder / "model.safetensors") for name in ("module", "reference")}
    save_file({prefix + key: tensors[key] for prefix, tensors in put.items() for key in tensors}, folder / WHOLE)


def not_merged(folder: Path) -> None:
    key = "base_model.model.gpt_neox.layers.0.attention.dense.lora_A.default.weight"
    edit_weights(folder, lambda tensors: tensors.update({key: torch.zeros(2, 32)}))


def extra_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))


REFUSED = {
    "another architecture": (other_architecture, r"config\.json: model_type is 'llama'; only .*gpt_neox"),
    "no model type": (config_says(model_type=None), "config.json: model_type is None"),
    "no config": (without("config.json"), r"config\.json: missing"),
    "damaged config": (config_is("{"), r"config\.json: can't be read"),
    "config is a list": (config_is("[]"), r"config\.json: can't be read.*expected an object, found list"),
    "config of a wrong type": (config_says(hidden_size="32"), r"config\.json: not a GPT-NeoX config: hidden_size"),
    "config of an impossible shape": (config_says(num_attention_heads=5), r"hidden_size 32 does not divide"),
    "relu": (config_says(hidden_act="relu"), r"config\.json: hidden_act is 'relu'; it must be one of gelu, "),
    "no attention bias in the config alone": (
        config_says(attention_bias=False),
        r"model\.safetensors: unexpected gpt_neox\.layers\.\d\.attention\.(dense|query_key_value)\.bias",
    ),
    "attention bias is a word": (config_says(attention_bias="no"), "attention_bias must be true or false, got 'no'"),
    "another head size": (config_says(head_dim=16), r"head_dim is 16; 4 heads of it"),
    "rotary of Llama 3": (
        config_says(rope_parameters={"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4}),
        r"config\.json: rope_parameters is of type 'llama3'; only one of default, linear, dynamic, yarn",
    ),
    "rotary of each kind of layer": (
        config_says(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 2.0}}),
        r"config\.json: rope_parameters is settings for each kind of layer",
    ),
    "rotary scaled and plain": (
        config_says(rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_scaling and rope_parameters contradict",
    ),
    "scaled by nothing": (
        config_says(rope_parameters={"rope_type": "linear"}),
        "rope_scaling of type linear has no factor",
    ),
    "scaled by a word": (
        config_says(rope_parameters={"rope_type": "yarn", "factor": "2"}),
        "rope_scaling: factor must be a positive number, from 1e-18 to 1e18, got '2'",
    ),
    "rotary is a list": (config_says(rope_parameters=[1]), r"rope_parameters is of type \[1\]; only one of default"),
    "scaled from no context": (
        config_says(
            rope_parameters={
                "rope_type": "yarn",
                "factor": None,
                "original_max_position_embeddings": 0,
                "rope_theta": 1e4,
            }
        ),
        "config.json: not a GPT-NeoX config: division by zero",
    ),
    "a head size in words": (config_says(head_dim="x", num_attention_heads=10**12), "head_dim is 'x'"),
    "a billion layers": (config_says(num_hidden_layers=10**9), "num_hidden_layers must be 10,000 at most"),
    "an end past all ids": (
        lambda folder: (folder / "generation_config.json").write_text(f'{{"eos_token_id": 1{"0" * 30}}}'),
        "eos_token_id is 10{30}; expected a token's id",
    ),
    "a window": (config_says(sliding_window=16), r"config\.json: sliding_window is 16; only attention to all earlier"),
    "chunks": (config_says(attention_chunk_size=16), r"config\.json: attention_chunk_size is 16"),
    "layers with a window": (config_says(layer_types=["sliding_attention"] * 2), r"config\.json: layer_types is \["),
    "not causal": (config_says(is_causal=False), r"config\.json: is_causal is False"),
    "rotary said twice": (
        config_says(rotary_pct=0.5),
        r"rotary_pct 0.5 and rope_parameters.partial_rotary_factor 0.25 contradict",
    ),
    "config lies about a width": (
        config_says(intermediate_size=128),
        r"model\.safetensors: gpt_neox\.layers\.0\.mlp.* has shape \[96, 32\], expected \[128, 32\] from config\.json",
    ),
    "config lies about layers": (
        config_says(num_hidden_layers=3),
        r"model\.safetensors: lacks gpt_neox\.layers\.2\.input_layernorm\.weight",
    ),
    "config hides a layer": (config_says(num_hidden_layers=1), r"unexpected gpt_neox\.layers\.1\."),
    "two models": (two_models, r"module\.\S+ and reference\.\S+ name the same parameter"),
    "an adapter that is not merged": (
        not_merged,
        r"model\.safetensors: unexpected base_model\.model\.gpt_neox\..*lora_A",
    ),
    "a classifier": (extra_tensor, r"model\.safetensors: unexpected score\.weight"),
    "a base model": (base_model, r"lacks embed_out\.weight.*a model without its output matrix writes no text"),
    "tied, yet different": (tie_what_differs, r"embed_out\.weight differs from gpt_neox\.embed_in\.weight.*tied"),
    "missing shard": (lose_shard, r"model-00002-of-00002\.safetensors: missing; model\.safetensors\.index\.json names"),
    "a shard lacks a key": (lose_key_of_shard, r"model-00001-of-00002.*lacks gpt_neox\.embed_in\.weight, which the"),
    "index damaged": (index_that_says("{"), r"index\.json: can't be read"),
    "index without a map": (index_that_says("{}"), r"index\.json: not an index of shards.*weight_map"),
    "index is empty": (index_that_says('{"weight_map": {}}'), r"index\.json: not an index.*names no tensor"),
    "index leads elsewhere": (
        index_that_says('{"weight_map": {"x": "../../secret.bin"}}'),
        r"index\.json: names '\.\./\.\./secret\.bin'",
    ),
    "truncated": (lambda folder: truncate(folder, 0.7), r"model\.safetensors: truncated, damaged"),
    "truncated in the header": (lambda folder: truncate(folder, 0.001), r"model\.safetensors: truncated, damaged"),
    "empty": (lambda folder: truncate(folder, 0), r"model\.safetensors: truncated, damaged"),
    "header of junk": (lambda folder: write_header(folder, b"\x00" * 64), r"model\.safetensors: truncated, damaged"),
    "header of another shape": (
        lambda folder: write_header(folder, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,9]}}'),
        r"model\.safetensors: truncated, damaged",
    ),
    "header of huge length": (
        lambda folder: write_header(folder, b"{}", length=2**62),
        r"model\.safetensors: truncated, damaged",
    ),
    "fp8 weights": (
        lambda folder: quantize(folder, torch.float8_e4m3fn),
        r"dense\.weight is F8_E4M3, expected float16",
    ),
    "int8 weights": (lambda folder: quantize(folder, torch.int8), r"dense\.weight is torch\.int8, expected float16"),
    "GPTQ": (quantized("gptq", "qweight", "qzeros", "g_idx", "scales"), r"safetensors: quantized by GPTQ \(.*dense"),
    "GPTQ, by names": (quantized(None, "qweight", "qzeros", "g_idx", "scales"), r"by GPTQ \(.*\.g_idx\), which can't"),
    "AWQ": (quantized("awq", "qweight", "qzeros", "scales"), r"quantized by AWQ .*fetch the model as it was before"),
    "AWQ, by names": (quantized(None, "qweight", "qzeros", "scales"), r"quantized by GPTQ or AWQ \(.*\.q"),
    "bitsandbytes in 8 bits": (
        quantized(None, "SCB", "weight", dtype=torch.int8),
        r"quantized by bitsandbytes \(\S+\.SCB\)",
    ),
    "bitsandbytes in 4 bits": (
        quantized("bitsandbytes", "weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", dtype=torch.uint8),
        "quantized by bitsandbytes",
    ),
    "a method that is not known": (quantized("new", "weight", dtype=torch.uint8), r"by new \(\S+ is torch\.uint8, exp"),
    "a method that only the config tells": (
        quantized_to_half_the_size,
        r"by torchao \(0\.00 GB, in half precision .*before \(config\.json names EleutherAI/pythia-70m\), and give",
    ),
    "AutoGPTQ's own files": (weights_named_as("quantize_config.json"), r"quantized by GPTQ \(quantize_config\.json\)"),
    "AutoAWQ's own files": (weights_named_as("quant_config.json"), r"quantized by AWQ \(quant_config\.json\)"),
    "weights of another name": (
        weights_named_as("README.md", quantization_config={"load_in_4bit": True}),
        r"quantized by bitsandbytes \(quantization_config\)",
    ),
    "a pickle that runs code": (hostile, r"pytorch_model\.bin: refused, and nothing in it was run"),
    "truncated bin": (truncated_bin, r"pytorch_model\.bin: truncated, damaged .*expected a \.bin file of weights"),
    "tokenizer of another model": (
        lambda folder: shutil.copy(SHIPPED_MODEL / "tokenizer.json", folder),
        r"tokenizer\.json: its ids end at 2047 and the config says vocab_size 128",
    ),
    "tokenizer damaged": (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json: not a token"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_one_line_that_names_it(folder, tmp_path, monkeypatch, damage, message):
    """File, what was expected and what was found; and whatever is in a file, nothing of it is run."""
    monkeypatch.chdir(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        create_model(folder, device="cpu")
    assert len(str(error.value).splitlines()) == 1
    assert str(folder) in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_something_else_than_tensors(folder):
    (folder / "model.safetensors").unlink()
    torch.save([1, 2, 3], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: holds something other than tensors"):
        open_checkpoint(folder)


def test_an_adapter_is_no_checkpoint(folder):
    """A folder with LoRA weights alone has a safetensors file too."""
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json without weights; expected .*model\.safetensors"):
        open_checkpoint(folder)
