"""Hugging Face folders, written: others must load our models and compute the same."""

import importlib.util
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from neox_lib.bench.candidates import our_model
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.huggingface.config import huggingface_fields, read_huggingface_config
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.config import ACTIVATIONS, NeoXConfig
from neox_lib.generation import greedy_generate
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.quantization.linear import use_quantized_linear
from neox_lib.rope_scaling import RopeScaling
from tests import small_models
from tests.small_models import family

BASE = replace(small_models.BASE, tokenizer_vocab_size=120)
CONFIGS = family(BASE)
IDS = 1 + torch.arange(40)[None] * 3 % 100


def load_theirs(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def assert_same_weights(ours: NeoXModel, folder: Path) -> None:
    """The folder read back by us has every number and every dtype."""
    expected, found = ours.state_dict(), dict(open_checkpoint(folder).tensors())
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert found.keys() | {"final_linear.weight"} == expected.keys()


@pytest.mark.parametrize("case", CONFIGS)
@torch.inference_mode()
def test_transformers_computes_the_same_from_an_export(random_model, tmp_path, case):
    """The door to all programs that read such folders. Bound: 1e-5 of the widest logit, in fp32."""
    ours = random_model(CONFIGS[case], seed=len(case))
    write_huggingface(ours, tmp_path / "m")
    theirs = load_theirs(tmp_path / "m")
    assert theirs.dtype == torch.float32
    found, expected = ours(IDS), theirs(IDS).logits
    width = expected.abs().max().item()
    assert width > 2, "with tiny logits the bound would mean nothing"
    assert (found - expected).abs().max().item() <= 1e-5 * width
    prompt = IDS[:, :6]
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    free = create_model(tmp_path / "m", device="cpu")
    free.config = replace(free.config, tokenizer_vocab_size=128)  # they know no padding rows
    assert greedy_generate(free, prompt, 30) == written.tolist()


@torch.inference_mode()
def test_auto_classes_load_the_shipped_model_and_write_its_story(tmp_path):
    """Text in, text out: weights, config, tokenizer and the end of text all come along."""
    from transformers import AutoTokenizer

    write_huggingface(open_checkpoint(SHIPPED_MODEL), tmp_path, SHIPPED_MODEL / "tokenizer.json")
    ours, theirs = create_model(device="cpu"), load_theirs(tmp_path, dtype=torch.float32)
    tokenizer, real = AutoTokenizer.from_pretrained(tmp_path), create_tokenizer()
    for text in ("Once upon a time, a fox", "  two  spaces\n\n<|endoftext|>", "na\u00efve \U0001f98a"):
        assert tokenizer(text)["input_ids"] == real.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 0
    ids = tokenizer("Once upon a time, a fox", return_tensors="pt")
    expected = theirs.generate(**ids, max_new_tokens=40, do_sample=False)[0].tolist()
    assert greedy_generate(ours, ids["input_ids"], ids["input_ids"].shape[1] + 40)[0] == expected
    assert len(set(expected)) > 20, "a model that repeats itself would prove little"


def test_the_file_is_what_transformers_itself_writes(random_model, tmp_path):
    """Same keys, shapes, dtypes and metadata: a reader that knows theirs knows ours."""
    write_huggingface(random_model(CONFIGS["tied"]), tmp_path / "ours")
    load_theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    seen = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            keys = sorted(file.keys())
            parts = [file.get_slice(key) for key in keys]
            seen.append(
                (file.metadata(), [(k, p.get_dtype(), p.get_shape()) for k, p in zip(keys, parts, strict=True)])
            )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_stays(random_model, tmp_path, dtype):
    ours = random_model(BASE).to(dtype)
    write_huggingface(ours, tmp_path / "m")
    assert_same_weights(ours, tmp_path / "m")
    assert load_theirs(tmp_path / "m").dtype == dtype, "transformers takes it from config.json"


def test_a_mixed_model_keeps_its_precisions(random_model, tmp_path):
    """fp16 matrices beside fp32 norms, as a CPU holds them here."""
    ours = our_model(random_model(BASE), "float16")
    write_huggingface(ours, tmp_path / "m")
    assert_same_weights(ours, tmp_path / "m")


@pytest.mark.parametrize("limit", [1, 9_000, 40_000])
def test_shards_hold_at_most_the_limit_and_load_as_one_model(random_model, tmp_path, limit):
    """A file past 5 GB is refused by some stores and loads whole elsewhere."""
    ours = random_model(BASE)
    write_huggingface(ours, tmp_path / "m", shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    for path in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= limit or len(sizes) == 1
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * BASE.parameter_count()
    assert set(index["weight_map"].values()) == set(files)
    assert_same_weights(ours, tmp_path / "m")
    theirs = load_theirs(tmp_path / "m")
    with torch.inference_mode():
        assert (theirs(IDS).logits - ours(IDS)).abs().max() < 1e-4


def rope_scalings():
    factors = st.sampled_from([1.5, 2.0, 8])
    plain = st.builds(RopeScaling, st.sampled_from(["linear", "dynamic"]), factors)
    attention = st.none() | st.sampled_from([0.5, 1.2])
    return plain | st.builds(
        RopeScaling, st.just("yarn"), factors, st.integers(8, 64), attention, st.sampled_from([32, 4.0])
    )


@st.composite
def configs(draw) -> NeoXConfig:
    heads, pairs = draw(st.integers(1, 8)), draw(st.integers(1, 16))
    share = draw(st.sampled_from([0.25, 0.5, 1.0]))
    return NeoXConfig(
        vocab_size=draw(st.integers(200, 300)),
        tokenizer_vocab_size=draw(st.integers(1, 200)),
        hidden_size=heads * int(2 * pairs / share),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 64)),
        max_position_embeddings=draw(st.integers(1, 4096)),
        rotary_pct=share,
        rotary_emb_base=draw(st.sampled_from([10000, 500, 1e6])),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-3, 1e-12])),
        hidden_act=draw(st.sampled_from(ACTIVATIONS)),
        use_parallel_residual=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        rope_scaling=draw(st.none() | rope_scalings()),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 199), unique=True, max_size=3))),
    )


@settings(deadline=None)  # the first example imports transformers
@given(config=configs())
def test_any_config_comes_back_from_its_json_and_means_the_same_to_transformers(tmp_path_factory, config):
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(huggingface_fields(config, torch.float16)))
    assert read_huggingface_config(folder) == replace(config, tokenizer_vocab_size=config.vocab_size)
    theirs = AutoConfig.from_pretrained(folder)
    for name in ("hidden_size", "intermediate_size", "layer_norm_eps", "use_parallel_residual", "tie_word_embeddings"):
        assert getattr(theirs, name) == getattr(config, name), name
    rope = theirs.rope_parameters
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (config.rotary_pct, config.rotary_emb_base)
    scaling = {"rope_type": "default"} if config.rope_scaling is None else asdict(config.rope_scaling)
    assert {name: value for name, value in rope.items() if name in scaling}.items() <= scaling.items()
    assert theirs.attention_bias == config.attention_bias
    assert theirs.hidden_act == config.hidden_act and theirs.dtype == torch.float16
    shutil.rmtree(folder)


@pytest.mark.parametrize("case", ["20b rules", "exact gelu", "sequential residual"])
def test_ctranslate2_converts_an_export_and_writes_the_same_tokens(random_model, tmp_path, monkeypatch, case):
    """Its converter reads the older names, rotary_pct and embed_out, which transformers 5 has dropped from its classes:
    they are put back here for it; with transformers 4 it needs nothing."""
    if importlib.util.find_spec("ctranslate2") is None:
        pytest.skip("ctranslate2 is not installed: pip install ctranslate2")
    import ctranslate2
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rotary = property(lambda config: config.rope_parameters["partial_rotary_factor"])
    monkeypatch.setattr(GPTNeoXConfig, "rotary_pct", rotary, raising=False)
    monkeypatch.setattr(GPTNeoXForCausalLM, "embed_out", property(lambda model: model.lm_head), raising=False)
    ours = random_model(replace(CONFIGS[case], vocab_size=2048, tokenizer_vocab_size=2048))
    write_huggingface(ours, tmp_path / "m", SHIPPED_MODEL / "tokenizer.json")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "m")).convert(str(tmp_path / "c"))
    generator, tokenizer = ctranslate2.Generator(str(tmp_path / "c"), device="cpu", intra_threads=1), create_tokenizer()
    prompt = [tokenizer.id_to_token(token) for token in IDS[0, :6].tolist()]
    options = {"max_length": 24, "sampling_topk": 1, "include_prompt_in_result": False}
    found = generator.generate_batch([prompt], **options)[0].sequences_ids[0]
    assert len(set(found)) > 4, "a model that repeats itself would prove little"
    assert greedy_generate(ours, IDS[:, :6], 30)[0][6 : 6 + len(found)] == found


# What is refused


def test_an_int8_model_is_not_exported(random_model, tmp_path):
    """Rounded weights under the name of a whole model would pass for it ever after."""
    ours = random_model(BASE)
    use_quantized_linear(ours)
    with pytest.raises(CheckpointError, match="the model in memory: int8 weights, which can be run but not converted"):
        write_huggingface(ours, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_tokenizer_that_is_none_leaves_nothing_behind(random_model, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer file"):
        write_huggingface(random_model(BASE), tmp_path / "m", tmp_path / "bad.json")
    assert not (tmp_path / "m").exists()
