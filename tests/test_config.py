"""The config: the released sizes, counts that agree with real tensors, and errors that name the field."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_lib import config as config_module
from neox_lib.checkpoints.build import empty_model
from neox_lib.config import PYTHIA_SHAPES, NeoXConfig, neox_20b, parameter_shapes, preset, pythia, tiny
from neox_lib.distributed import tensor_parallel
from neox_lib.model import NeoXModel
from neox_lib.playground import settings as settings_module
from tests.small_models import BASE, family

# Biderman et al. 2023 (https://arxiv.org/abs/2304.01373), table 1 and the model cards: all, and without embeddings
PUBLISHED_PYTHIA_COUNTS = {
    "14m": (14_067_712, 1_189_888),
    "31m": (30_494_720, 4_739_072),
    "70m": (70_426_624, 18_915_328),
    "160m": (162_322_944, 85_056_000),
    "410m": (405_334_016, 302_311_424),
    "1b": (1_011_781_632, 805_736_448),
    "1.4b": (1_414_647_808, 1_208_602_624),
    "2.8b": (2_775_208_960, 2_517_652_480),
    "6.9b": (6_857_302_016, 6_444_163_072),
    "12b": (11_846_072_320, 11_327_027_200),
}


def test_20b_is_the_released_model():
    """The name promises these numbers (NeoX paper, table 1, and `configs/20B.yml`)."""
    config = neox_20b()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (44, 6144, 64)
    assert (config.head_dim, config.rotary_ndims, config.intermediate_size) == (96, 24, 24576)
    assert (config.vocab_size, config.tokenizer_vocab_size) == (50432, 50277)
    assert (config.max_position_embeddings, config.rotary_emb_base, config.layer_norm_eps) == (2048, 10000, 1e-5)
    assert (config.hidden_act, config.use_parallel_residual, config.tie_word_embeddings) == ("gelu_fast", True, False)


def test_20b_costs_what_the_lesson_says():
    """20,554,567,680 parameters, 38.3 GiB in fp16, 1.03 MiB of keys and values per token, 2.06 GiB for 2048."""
    config = neox_20b()
    assert config.parameter_count() == 20_554_567_680
    assert config.weight_bytes(torch.float16) == 41_109_135_360
    assert round(config.weight_bytes(torch.float16) / 2**30, 1) == 38.3
    assert config.kv_cache_bytes(1, torch.float16) == 44 * 2 * 6144 * 2
    assert round(config.kv_cache_bytes(1, torch.float16) / 2**20, 2) == 1.03
    assert round(config.kv_cache_bytes(2048, torch.float16) / 2**30, 2) == 2.06


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", [*PYTHIA_SHAPES, "20b"])
def test_counts_equal_hugging_face(size):
    """Counted on a Hugging Face model of that shape, which takes no memory on the meta device."""
    from conftest import hugging_face_config
    from transformers import GPTNeoXForCausalLM

    config = neox_20b() if size == "20b" else pythia(size)
    with torch.device("meta"):
        theirs = GPTNeoXForCausalLM(hugging_face_config(config))
    assert config.parameter_count() == count(theirs)


@pytest.mark.parametrize("size", PYTHIA_SHAPES)
def test_pythia_counts_are_the_published_ones(size):
    """A wrong layer or vocabulary in the table would load nobody's weights."""
    config = pythia(size)
    everything = config.parameter_count()
    assert (everything, everything - 2 * config.vocab_size * config.hidden_size) == PUBLISHED_PYTHIA_COUNTS[size]


def test_pythia_uses_the_exact_gelu_and_20b_does_not():
    """Their Hugging Face configs say so; one default for both is wrong for one."""
    assert {pythia(size).hidden_act for size in PYTHIA_SHAPES} == {"gelu"}
    assert neox_20b().hidden_act == "gelu_fast"


def test_tiny_has_20b_rules_at_three_and_a_half_million():
    """The shipped model must go through the same code as 20B."""
    config = tiny()
    assert 3_400_000 < config.parameter_count() < 3_600_000
    for name in ("rotary_pct", "hidden_act", "use_parallel_residual", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(config, name) == getattr(neox_20b(), name)


@st.composite
def configs(draw) -> NeoXConfig:
    heads, head_dim = draw(st.integers(1, 6)), draw(st.sampled_from([4, 8, 12, 24]))
    vocab_size = draw(st.integers(1, 90))
    return NeoXConfig(
        vocab_size=vocab_size,
        tokenizer_vocab_size=draw(st.integers(1, vocab_size)),
        hidden_size=heads * head_dim,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 100)),
        max_position_embeddings=draw(st.integers(1, 64)),
        rotary_pct=draw(st.sampled_from([0.5, 1.0])),
        rotary_emb_base=draw(st.sampled_from([10000, 500.0])),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_fast"])),
        use_parallel_residual=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(config=configs(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_counts_and_bytes_agree_with_a_real_model(config, dtype):
    """`info` tells people what will fit before anything is loaded."""
    with torch.device("meta"):
        model = NeoXModel(config).to(dtype)
    assert config.parameter_count() == count(model)
    assert config.weight_bytes(dtype) == sum(p.numel() * p.element_size() for p in model.parameters())


@settings(max_examples=30, deadline=None)
@given(config=configs(), tokens=st.integers(1, 9))
def test_cache_bytes_agree_with_the_keys_and_values_of_a_pass(config, tokens):
    """Counted on the very tensors that attention hands to a cache."""
    tokens = min(tokens, config.max_position_embeddings)
    stored = []

    class Counting:
        length = 0

        def update(self, layer_index, key, value):
            stored.extend([key, value])
            return key, value

        def advance(self, tokens):
            pass

    with torch.inference_mode():
        NeoXModel(config)(torch.zeros(1, tokens, dtype=torch.int64), Counting())
    assert config.kv_cache_bytes(tokens, torch.float32) == sum(t.numel() * t.element_size() for t in stored)


@settings(max_examples=50, deadline=None)
@given(config=configs())
def test_json_gives_the_same_config_back(tmp_path_factory, config):
    """A saved model must come back as itself."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(config.to_json(), "utf-8")
    assert NeoXConfig.from_json(path) == config
    assert json.loads(path.read_text("utf-8"))["model_type"] == "gpt_neox"


@pytest.mark.parametrize(
    ("module", "name"), [(config_module, "NeoXConfig"), (settings_module, "Settings"), (tensor_parallel, "RankConfig")]
)
@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"], ids=["types", "strings"])
def test_every_field_is_checked_whatever_its_annotation_is(monkeypatch, module, name, future):
    """With annotations that are strings, a check by type passes -3 layers; a new field must not pass unchecked."""
    copy = types.ModuleType("a_copy")
    monkeypatch.setitem(sys.modules, "a_copy", copy)
    exec(future + Path(module.__file__).read_text("utf-8"), vars(copy))
    fields = dataclasses.fields(vars(copy)[name])
    assert {type(field.type) is str for field in fields} >= {bool(future)}
    for field in fields:
        for wrong in (-3, object()):
            if (name, field.name, wrong) != ("Settings", "seed", -3):  # any whole number is a seed
                with pytest.raises(ValueError, match=field.name):
                    vars(copy)[name](**{field.name: wrong})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive whole number, got 0"),
        ({"hidden_size": 6144.0}, "hidden_size must be a positive whole number, got 6144.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": "50432"}, "vocab_size"),
        ({"num_attention_heads": 7}, "hidden_size 6144 does not divide into num_attention_heads 7"),
        ({"rotary_pct": 1.5}, "rotary_pct 1.5"),
        ({"rotary_pct": 0.04}, "rotary_pct 0.04 of head size 96 gives 3 rotary"),
        ({"rotary_pct": 0.01}, "rotary_pct 0.01"),
        ({"rotary_pct": 0.0}, "rotary_pct must be a positive number"),
        ({"rotary_pct": float("nan")}, "rotary_pct"),
        ({"rotary_emb_base": float("inf")}, "rotary_emb_base"),
        ({"rotary_emb_base": None}, "rotary_emb_base"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps"),
        ({"rotary_emb_base": 10**400}, "rotary_emb_base must be a positive number, from 1e-18 to 1e18"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be 10,000 at most, got 1000000000"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings must be 16,777,216 at most"),
        ({"tokenizer_vocab_size": 50433}, "tokenizer_vocab_size 50433 exceeds vocab_size 50432"),
        ({"hidden_act": "relu"}, "hidden_act must be one of gelu_fast, gelu, got 'relu'"),
        ({"use_parallel_residual": "false"}, "use_parallel_residual must be true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
    ],
)
def test_a_config_that_cannot_be_names_its_field(change, message):
    """Someone edits a config.json by hand; the error must say which line."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(neox_20b(), **change)


def changed_json(tmp_path: Path, change) -> Path:
    fields = json.loads(tiny().to_json())
    change(fields)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields), "utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(hidden_sise=192), "hidden_sise"),
        (lambda fields: fields.pop("rotary_pct"), "missing rotary_pct"),
        (lambda fields: fields.update(hidden_act="swish"), "hidden_act"),
        (lambda fields: fields.update(vocab_size=None), "vocab_size"),
    ],
    ids=["unknown key", "missing key", "bad value", "null"],
)
def test_from_json_refuses_what_is_no_whole_config(tmp_path, change, message):
    """An ignored key is a setting that someone believes in."""
    path = changed_json(tmp_path, change)
    with pytest.raises(ValueError, match=f"config.json: not a NeoX config: .*{message}"):
        NeoXConfig.from_json(path)


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '{"model_type": "gpt_neox"}', "\udc80", "[" * 100_000])
def test_from_json_names_the_file_whatever_it_holds(tmp_path, content):
    """A truncated or foreign file gives one line with its name, not a traceback."""
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json: not a NeoX config"):
        NeoXConfig.from_json(path)


def test_another_model_type_is_refused(tmp_path):
    """A Llama config with the same field names would load and write nonsense."""
    path = changed_json(tmp_path, lambda fields: fields.update(model_type="llama"))
    with pytest.raises(ValueError, match="model_type"):
        NeoXConfig.from_json(path)


def test_an_unknown_pythia_lists_the_known_ones():
    """The sizes are hard to guess: 410m, not 400m."""
    with pytest.raises(ValueError, match=r"'400m'.*160m, 410m"):
        pythia("400m")


@pytest.mark.parametrize("config", [*family(BASE).values(), tiny(), pythia("1b"), neox_20b()], ids=str)
def test_the_shapes_are_those_of_the_model_in_its_order(config):
    """Loaders, writers and the byte counts go by these names; the model itself is not built for them."""
    built = {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    assert list(parameter_shapes(config).items()) == list(built.items())


@pytest.mark.parametrize(
    ("name", "config"),
    [("neox_20b", neox_20b()), ("20b", neox_20b()), ("tiny", tiny()), ("pythia-1.4b", pythia("1.4b"))],
)
def test_a_preset_has_the_name_that_people_use(name, config):
    assert preset(name) == config
    with pytest.raises(ValueError, match="no Pythia of size 'large'"):
        preset("large")
