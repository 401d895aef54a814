"""The slim layout: ranks' shards to a model and back, exactly; and what is said when a checkpoint is broken."""

import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import Tensor

from neox_lib.checkpoints import build, files
from neox_lib.checkpoints.build import build_model
from neox_lib.checkpoints.convert import convert_to_huggingface, convert_to_slim
from neox_lib.checkpoints.files import CheckpointError, open_tensors
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import quantized_tensors
from neox_lib.checkpoints.slim import layout, reader
from neox_lib.checkpoints.slim import partition as sharding
from neox_lib.checkpoints.slim import writer as slim_writer
from neox_lib.checkpoints.slim.layout import find_shards, is_slim, layer_file_name
from neox_lib.checkpoints.slim.partition import merge_as_stored, merge_shards, split_tensor
from neox_lib.checkpoints.slim.reader import SlimCheckpoint
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.config import NeoXConfig, neox_20b, parameter_shapes
from neox_lib.distributed.loading import build_rank
from neox_lib.model import NeoXModel
from neox_lib.tokenizer import ENDOFTEXT
from tests.small_models import load, randomize

CONFIG = NeoXConfig(
    vocab_size=256,
    tokenizer_vocab_size=250,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
    rotary_pct=0.25,
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def assert_same_model(found: NeoXModel, expected: NeoXModel) -> None:
    """Every parameter equal to the bit, in the same dtype."""
    pairs = dict(found.named_parameters()), dict(expected.named_parameters())
    assert pairs[0].keys() == pairs[1].keys()
    for name, parameter in pairs[1].items():
        assert pairs[0][name].dtype == parameter.dtype, name
        assert torch.equal(pairs[0][name], parameter), name


def edit(path: Path, change) -> None:
    """Let `change(tensors)` alter the tensors of a shard."""
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


# Where things are


def test_the_files_of_20b():
    """00, 02..45, 47, 48: the release's own numbering, two digits for layer and rank."""
    shapes = parameter_shapes(neox_20b())
    found = {}
    for name in shapes:
        index, key = layout.place_of(name, 44)
        found.setdefault(index, []).append(key)
    assert list(found) == [0, *range(2, 46), 47, 48]
    assert found[0] == ["word_embeddings.weight"] and found[48] == ["final_linear.weight"]
    assert found[47] == ["norm.weight", "norm.bias"]
    assert found[2] == found[45] and len(found[2]) == 12
    assert layer_file_name(47, 1) == "layer_47-model_01-model_states.pt"


def test_inventory(tmp_path, random_model, monkeypatch):
    """`info` lists what each file holds without reading the weights."""
    write_slim(random_model(CONFIG), tmp_path / "c", ranks=2)
    monkeypatch.setattr(reader, "merge_as_stored", None)
    rows = SlimCheckpoint(tmp_path / "c").files()
    parts = ["word embeddings", "block 0", "block 1", "block 2", "final norm", "output matrix"]
    assert [row.part for row in rows] == [part for part in parts for _ in range(2)]
    assert [row.rank for row in rows] == [0, 1] * 6
    assert all((tmp_path / "c" / row.file).stat().st_size == row.nbytes for row in rows)


# Round trips


@pytest.mark.parametrize("spread_seed", [None, 7])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_and_read_is_the_same_model(tmp_path, random_model, dtype, ranks, spread_seed):
    """A checkpoint that changes a model by being saved would make every comparison with its source fail."""
    model = random_model(CONFIG).to(dtype)
    write_slim(model, tmp_path / "c", ranks, spread_seed)
    assert len(find_shards(tmp_path / "c")[0]) == ranks
    assert SlimCheckpoint(tmp_path / "c").dtype == dtype
    assert SlimCheckpoint(tmp_path / "c").config == CONFIG
    loaded = load(tmp_path / "c")
    assert_same_model(loaded, model)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"num_hidden_layers": 1}, {"vocab_size": 252}])
def test_other_shapes_come_back(tmp_path, random_model, changes, token_ids):
    """Tied, one-layer and oddly padded models go through the same files."""
    model = random_model(replace(CONFIG, **changes))
    write_slim(model, tmp_path / "c", ranks=2, spread_seed=1)
    loaded = load(tmp_path / "c")
    assert_same_model(loaded, model)
    ids = token_ids(CONFIG, 1, 20)
    assert torch.equal(loaded(ids), model(ids))


def test_three_ranks_in_fp32(tmp_path, random_model):
    """(x + x + x) / 3 misses some fp32 numbers by a rounding: three equal norms must have themselves as their mean."""
    config = replace(
        CONFIG, vocab_size=255, hidden_size=48, num_attention_heads=3, intermediate_size=96, rotary_pct=0.5
    )
    model = random_model(config)
    write_slim(model, tmp_path / "c", ranks=3)
    assert_same_model(load(tmp_path / "c"), model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_ranks_differ(tmp_path, random_model, dtype):
    """The shipped model's ranks must differ as a trained model's do, or wrong merge rules would pass unseen."""
    write_slim(random_model(CONFIG).to(dtype), tmp_path / "c", ranks=2, spread_seed=0)
    for index in (2, 3, 4, 6):
        first, second = (torch.load(path, weights_only=True) for path in find_shards(tmp_path / "c")[index])
        for key, tensor in first.items():
            if ("norm" in key and key.endswith("weight")) or key.endswith(("dense.bias", "4h_to_h.bias")):
                assert (tensor != second[key]).float().mean() > 0.75, (index, key)
    a, b = (torch.load(find_shards(tmp_path / "c")[index][0], weights_only=True) for index in (2, 3))
    ratio = a["attention.dense.bias"] / b["attention.dense.bias"]
    assert ratio.std() > 0, "each layer has a spread of its own"


def test_converting_back_and_forth(tmp_path, random_model):
    """One checkpoint at 1, 2 and 4 ranks is one model, and `convert` copies nothing but the layout."""
    model = random_model(CONFIG).half()
    write_slim(model, tmp_path / "0", ranks=2, spread_seed=3)
    for step, ranks in enumerate([4, 1, 2]):
        convert_to_slim(tmp_path / str(step), tmp_path / str(step + 1), ranks)
        assert len(find_shards(tmp_path / str(step + 1))[2]) == ranks
        assert_same_model(load(tmp_path / str(step + 1)), model)


def test_converting_holds_one_layer(tmp_path, random_model, monkeypatch):
    """20B is converted on a laptop: of the merged tensors only one layer's may be alive at any write."""
    write_slim(random_model(replace(CONFIG, num_hidden_layers=6)), tmp_path / "c", ranks=2)
    alive: list[weakref.ref] = []
    counts = []

    def watched(key, parts):
        merged = merge_as_stored(key, parts)
        alive.append(weakref.ref(merged))
        return merged

    def save(path, tensors):
        counts.append(sum(reference() is not None for reference in alive))
        files.save_tensors(path, tensors)

    monkeypatch.setattr(reader, "merge_as_stored", watched)
    monkeypatch.setattr(slim_writer, "save_tensors", save)
    convert_to_slim(tmp_path / "c", tmp_path / "d", ranks=4)
    assert len(alive) == 6 * 12 + 4 and max(counts) <= 13  # a block, and the tensor read ahead that ends its group


def test_dtype_by_name(tmp_path, random_model):
    """On a CPU matrices may stay in fp16 while norms and biases work in fp32: the loader asks for each by name."""
    model = random_model(CONFIG).half()
    write_slim(model, tmp_path / "c", ranks=2, spread_seed=0)
    loaded = build_model(
        open_checkpoint(tmp_path / "c"), dtype_of=lambda name: torch.float32 if "norm" in name else torch.bfloat16
    )
    for name, parameter in loaded.named_parameters():
        expected = torch.float32 if "norm" in name else torch.bfloat16
        assert parameter.dtype == expected
        assert torch.equal(parameter, model.get_parameter(name).to(expected))
    assert_same_model(load(tmp_path / "c", dtype=torch.float32), model.float())


def test_the_model_outlives_its_files(tmp_path, random_model):
    """Weights are copied out of the mapped files, for one rank too: deleting or overwriting them changes no answer."""
    model = random_model(CONFIG)
    write_slim(model, tmp_path / "c", ranks=1)
    loaded = load(tmp_path / "c")
    for paths in find_shards(tmp_path / "c").values():
        paths[0].write_bytes(bytes(paths[0].stat().st_size))
    assert_same_model(loaded, model)


# Exactness of a split, for every number

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@st.composite
def finite_tensors(draw) -> Tensor:
    """Any finite bit patterns of a dtype: huge, tiny, subnormal, both zeros."""
    dtype = draw(st.sampled_from(DTYPES))
    half = 2 ** (8 * dtype.itemsize - 1)
    bits = draw(st.lists(st.integers(-half, half - 1), min_size=1, max_size=40))
    numbers = torch.tensor(bits, dtype=BITS[dtype]).view(dtype)
    return torch.where(numbers.isfinite(), numbers, 0)


KEYS = ["layers.0.attention.dense.bias", "mlp.dense_4h_to_h.bias", "input_layernorm.weight", "norm.bias"]


@settings(max_examples=600, deadline=None)
@given(finite_tensors(), st.sampled_from(KEYS), st.integers(1, 8), st.none() | st.integers(0, 99))
def test_a_split_merges_to_the_same_bits(tensor, key, ranks, spread_seed):
    """Halving a bias is not exact (half of the smallest number is none): the last rank must take the remainder."""
    parts = split_tensor(key, tensor, ranks, spread_seed)
    assert len(parts) == ranks and all(part.dtype == tensor.dtype and part.shape == tensor.shape for part in parts)
    assert torch.equal(merge_shards(key, parts), tensor.float()), "in fp32, without a rounding"
    merged = merge_as_stored(key, parts)
    assert torch.equal(merged.view(BITS[tensor.dtype]), tensor.view(BITS[tensor.dtype]))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["query_key_value.weight", "attention.dense.weight", "final_linear.weight"]), st.integers(1, 6))
def test_a_split_matrix_merges_to_itself(key, ranks):
    tensor = torch.randn(60, 120)
    assert torch.equal(merge_shards(key, split_tensor(key, tensor, ranks)), tensor)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("key", sharding.MERGE_RULES)
def test_merged_tensors_have_memory_of_their_own(key, ranks):
    """A merged tensor that still points into the mapped file would keep it open and change with it."""
    parts = [torch.ones(6, 6) for _ in range(ranks)]
    merged = merge_shards(key, parts)
    assert all(merged.data_ptr() != part.data_ptr() for part in parts)


def test_sums_and_means_are_formed_in_fp32():
    """In fp16 2048 + 1 is 2048, and 60000 + 60000 is infinite on the way to a mean of 60000."""
    ones = [torch.tensor([2048.0]).half(), *[torch.tensor([1.0]).half()] * 2]
    assert merge_shards("attention.dense.bias", ones).item() == 2050
    large = [torch.tensor([60000.0]).half()] * 2
    assert merge_shards("norm.weight", large).item() == 60000


def test_heads_stay_whole():
    """Rank 0 of two must get heads 0 and 1 with their q, k and v, not the first half of all queries."""
    head, row = torch.arange(4).repeat_interleave(3 * 16), torch.arange(3 * 64)
    weight = torch.stack([head, row], dim=1).float()
    first, second = split_tensor("attention.query_key_value.weight", weight, ranks=2)
    assert first[:, 0].unique().tolist() == [0, 1] and second[:, 0].unique().tolist() == [2, 3]


# A forward on the shards, rank by rank, without the library


def shard_forward(folder: Path, ids: Tensor, config: NeoXConfig) -> Tensor:
    """Logits `[T, V]` of ids `[T]` in fp64 as tensor-parallel ranks compute them: each works on its own files with its
    own biases, and their partial results are summed. Only norms are not each rank's own but the mean of all, as in the
    published numbers of 20B.
    """
    ranks = len(list(folder.glob("layer_00-model_*")))

    def files_of(index: int) -> list[dict[str, Tensor]]:
        names = [folder / f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for rank in range(ranks)]
        return [{key: tensor.double() for key, tensor in torch.load(name).items()} for name in names]

    def norm(shards, key, x):
        weight = sum(shard[f"{key}.weight"] for shard in shards) / ranks
        bias = sum(shard[f"{key}.bias"] for shard in shards) / ranks
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt() * weight + bias

    size, tokens = config.hidden_size // config.num_attention_heads, len(ids)
    rotary = int(size * config.rotary_pct)
    frequencies = config.rotary_emb_base ** (-torch.arange(0, rotary, 2).double() / rotary)
    angles = torch.arange(tokens).double()[:, None] * frequencies

    def turn(x):
        left, right, rest = x[:, : rotary // 2], x[:, rotary // 2 : rotary], x[:, rotary:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)

    def attention(shard, x):
        rows = x @ shard["attention.query_key_value.weight"].T + shard["attention.query_key_value.bias"]
        outputs = []
        for head in rows.split(3 * size, dim=-1):
            query, key, value = head.split(size, dim=-1)
            scores = turn(query) @ turn(key).T / size**0.5
            scores += torch.full((tokens, tokens), float("-inf"), dtype=torch.float64).triu(1)
            outputs.append(scores.softmax(-1) @ value)
        return torch.cat(outputs, -1) @ shard["attention.dense.weight"].T + shard["attention.dense.bias"]

    def mlp(shard, x):
        x = x @ shard["mlp.dense_h_to_4h.weight"].T + shard["mlp.dense_h_to_4h.bias"]
        if config.hidden_act == "gelu_fast":
            x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        else:
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        return x @ shard["mlp.dense_4h_to_h.weight"].T + shard["mlp.dense_4h_to_h.bias"]

    x = torch.cat([shard["word_embeddings.weight"] for shard in files_of(0)])[ids]
    for layer in range(config.num_hidden_layers):
        shards = files_of(layer + 2)
        read = norm(shards, "input_layernorm", x)
        attended = x + sum(attention(shard, read) for shard in shards)
        read = norm(shards, "post_attention_layernorm", x if config.use_parallel_residual else attended)
        x = attended + sum(mlp(shard, read) for shard in shards)
    x = norm(files_of(config.num_hidden_layers + 3), "norm", x)
    return torch.cat([x @ shard["final_linear.weight"].T for shard in files_of(config.num_hidden_layers + 4)], dim=-1)


def distance_to_the_ranks(folder: Path, token_ids) -> float:
    """The largest difference between the logits of the loaded model in fp32 and of the ranks in fp64."""
    config = SlimCheckpoint(folder).config
    ids = token_ids(config, 1, 40)
    logits = load(folder, dtype=torch.float32)(ids)[0].double()
    return (logits - shard_forward(folder, ids[0], config)).abs().max().item()


FORWARD_CASES = {
    "20b rules, 2 ranks": ({}, 2),
    "20b rules, 4 ranks": ({}, 4),
    "exact gelu, rotary everywhere": ({"hidden_act": "gelu", "rotary_pct": 1.0}, 2),
    "sequential residual": ({"use_parallel_residual": False}, 2),
}


@pytest.mark.parametrize(("changes", "ranks"), FORWARD_CASES.values(), ids=FORWARD_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_loaded_model_is_what_the_ranks_compute(tmp_path, random_model, token_ids, changes, ranks, dtype):
    """The merge rules stand or fall here: the ranks' biases and norms differ, and the ranks know no merge rule."""
    write_slim(random_model(replace(CONFIG, **changes)).to(dtype), tmp_path / "c", ranks, spread_seed=5)
    assert distance_to_the_ranks(tmp_path / "c", token_ids) < 1e-5


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.fixed_dictionaries({"num_hidden_layers": st.integers(1, 2), "use_parallel_residual": st.booleans()}),
    st.integers(0, 99),
)
def test_nothing_is_rounded_between_the_ranks_and_fp32(tmp_path_factory, ranks, dtype, changes, seed):
    """Ranks as a training leaves them: the sum of their fp16 biases and the mean of their norms are no fp16 numbers.

    Rounded on the way, the logits were off by 7e-4. The same through every other layout, and a rank's own part.
    """
    folder, generator = tmp_path_factory.mktemp("ranks"), torch.Generator().manual_seed(seed)
    model = NeoXModel(replace(CONFIG, **changes))
    randomize(model, seed)
    write_slim(model.to(dtype), folder / "0", ranks)

    def spread(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if sharding.merge_rule(key) in ("sum", "average"):
                tensor += (0.3 * torch.randn(tensor.shape, generator=generator)).to(dtype)

    for path in (folder / "0").glob("*.pt"):
        edit(path, spread)
    ids = torch.randint(250, (1, 20), generator=generator)
    expected = shard_forward(folder / "0", ids[0], model.config)
    convert_to_huggingface(folder / "0", folder / "1")
    convert_to_slim(folder / "1", folder / "2", ranks=2)
    for step in "012":
        logits = load(folder / step, dtype=torch.float32)(ids)[0].double()
        assert (logits - expected).abs().max() < 2e-5, step
    exact = dict(load(folder / "0", dtype=torch.float32).named_parameters())
    int8 = {
        name: tensor
        for name, tensor in quantized_tensors(open_checkpoint(folder / "0"), torch.int8)
        if tensor.dim() == 1
    }
    stored = open_checkpoint(folder / "0").parts()
    rank = build_rank(model.config, stored, 0, 2, torch.device("cpu"), lambda name: torch.float32)
    for name, parameter in rank.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(int8[name], exact[name]), name
            assert torch.equal(parameter, exact[name][: len(parameter)]), name
    for name, parameter in load(folder / "0").named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, exact[name].to(dtype)), "rounded once"


def rank_zero_only(parts: list[Tensor]) -> Tensor:
    return parts[0].clone()


def flat_thirds(key: str, parts: list[Tensor]) -> Tensor:
    """Queries of all ranks, then keys, then values: the right shape, the wrong rows."""
    if "query_key_value" not in key:
        return merge_shards(key, parts)
    return torch.cat([part.chunk(3)[third] for third in range(3) for part in parts])


WRONG_RULES = {
    "attention bias averaged": lambda patch: patch.setitem(sharding.MERGE_RULES, "dense.bias", "average"),
    "MLP bias averaged": lambda patch: patch.setitem(sharding.MERGE_RULES, "dense_4h_to_h.bias", "average"),
    "biases of rank 0": lambda patch: patch.setitem(sharding.MERGE, "sum", rank_zero_only),
    "norms of rank 0": lambda patch: patch.setitem(sharding.MERGE, "average", rank_zero_only),
    "norms summed": lambda patch: patch.setitem(sharding.MERGE, "average", sharding.add_up),
    "ranks in reverse": lambda patch: patch.setitem(sharding.MERGE, "rows", lambda parts: torch.cat(parts[::-1])),
    "qkv in thirds": lambda patch: patch.setattr(build, "merge_shards", flat_thirds),
}


@pytest.mark.parametrize("put_in", WRONG_RULES.values(), ids=WRONG_RULES)
def test_a_wrong_merge_rule_is_noticed(tmp_path, random_model, token_ids, monkeypatch, put_in):
    """Every one of these gives tensors of the right shape: only the numbers tell."""
    write_slim(random_model(CONFIG), tmp_path / "c", ranks=2, spread_seed=5)
    put_in(monkeypatch)
    assert distance_to_the_ranks(tmp_path / "c", token_ids) > 1e-3


@pytest.mark.parametrize("key", ["query_key_value.weight", "dense.weight", "word_embeddings.weight"])
def test_joining_on_the_wrong_side_is_noticed(tmp_path, random_model, token_ids, monkeypatch, key):
    """The shards are checked against the rule, so a wrong rule does not get as far as the model."""
    write_slim(random_model(CONFIG), tmp_path / "c", ranks=2, spread_seed=5)
    other = {"rows": "columns", "columns": "rows"}[sharding.MERGE_RULES[key]]
    monkeypatch.setitem(sharding.MERGE_RULES, key, other)
    with pytest.raises(CheckpointError, match=key.split(".")[0]):
        distance_to_the_ranks(tmp_path / "c", token_ids)


# A release as it is

YML = """# DISCLAIMER: as trained on many GPUs; you may need to change some parameters.
{
  # model settings
  "pipe-parallel-size": 4,
  "model-parallel-size": 2,
  "num-layers": 3,
  "hidden-size": 64,
  "num-attention-heads": 4,
  "max-position-embeddings": 64,
  "norm": "layernorm",
  "pos-emb": "rotary",
  "rotary_pct": 0.25,
  "no-weight-tying": true,
  "gpt_j_residual": true,
  "bias-gelu-fusion": true,
  "optimizer": {
    "type": "Adam",
    "params": { "lr": 0.97e-4, "betas": [0.9, 0.95], }
    },
  "zero_optimization": { "stage": 1, "allgather_partitions": True, },
}
"""
RELEASED = replace(CONFIG, eos_token_ids=(3,))  # by the tokenizer above the weights, which leaves 6 rows for padding


@pytest.fixture
def release(tmp_path, random_model) -> tuple[Path, NeoXModel]:
    """A folder as EleutherAI published 20B, and the model in it: two ranks, old buffers in the blocks, optimizer and
    pipeline files beside, the config one level up, no config.json."""
    folder = tmp_path / "20B_checkpoints" / "global_step150000"
    model = random_model(CONFIG).half()
    write_slim(model, folder, ranks=2, spread_seed=2)
    (folder / "config.json").unlink()

    def add_buffers(tensors: dict[str, Tensor]) -> None:
        tensors["attention.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.01])
        tensors["attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        tensors["attention.masked_bias"] = torch.tensor(-1e4)

    for index in (2, 3, 4):
        for path in find_shards(folder)[index]:
            edit(path, add_buffers)
    for rank in range(8):
        (folder / f"mp_rank_{rank:02d}_model_states.pt").write_bytes(b"not ours to read")
    (folder / "latest").write_text("global_step150000")
    tokens = [ENDOFTEXT if token_id == 3 else f"<{token_id}>" for token_id in range(CONFIG.tokenizer_vocab_size)]
    tokenizer = Tokenizer(models.BPE({token: token_id for token_id, token in enumerate(tokens)}, []))
    tokenizer.save(str(folder.parent / "20B_tokenizer.json"))
    (folder.parent / "configs").mkdir()
    (folder.parent / "configs" / "20B.yml").write_text(YML)
    return folder, model


def test_a_release_is_read_as_it_is(release):
    """Nobody should have to rename, move or convert 40 GB before they can load them."""
    folder, model = release
    assert SlimCheckpoint(folder).config == RELEASED
    assert_same_model(load(folder), model)


def test_a_release_in_the_old_format(release):
    """Files from before torch's zip format can't be memory-mapped; they load all the same."""
    folder, model = release
    for path in folder.glob("layer_*"):
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert_same_model(load(folder), model)


def test_a_relative_path_finds_the_config_one_level_up(release, monkeypatch):
    """`python -m neox_lib info .` in the release's own folder."""
    folder, _ = release
    monkeypatch.chdir(folder)
    assert SlimCheckpoint(".").config == RELEASED


@pytest.mark.parametrize("place", [".", "configs", ".."])
def test_other_places_of_the_yml(release, place):
    folder, _ = release
    (folder / place).mkdir(exist_ok=True)
    shutil.move(folder.parent / "configs" / "20B.yml", folder / place / "20B.yml")
    assert SlimCheckpoint(folder).config == RELEASED


def rewrite_yml(folder: Path, old: str, new: str) -> None:
    path = folder.parent / "configs" / "20B.yml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


YML_DIALECT = {
    "all dashes": ("rotary_pct", "rotary-pct", {}),
    "exact gelu": ('"bias-gelu-fusion": true', '"bias_gelu_fusion": false', {"hidden_act": "gelu"}),
    "sequential": ('"gpt_j_residual": true', '"gpt-j-residual": false', {"use_parallel_residual": False}),
    "gpt-neox turns all dimensions by default": ('"rotary_pct": 0.25,', "", {"rotary_pct": 1.0}),
    "no point in 1e-6": ('"norm"', '"layernorm-epsilon": 1e-6, "norm"', {"layer_norm_eps": 1e-6}),
    "full attention by either kernel": (
        '"norm"',
        '"attention-config": [[["flash", "global"], "all"]], "sliding-window-width": 64, "norm"',
        {},
    ),
    "what kernels do, and training": (
        '"norm"',
        '"scaled-upper-triang-masked-softmax-fusion": true, "rope_fusion": true, "attention-dropout": 0.1, '
        '"apply_query_key_layer_scaling": true, "mup_init_scale": 1.0, "log_grad_norm": true, "moe_top_k": 1, '
        '"mlp-multiple-of": 2, "num_kv_heads": 4, "use_mup": false, "pos_train_data_paths": ["a"], "logs": 3, "norm"',
        {},
    ),
    "another base": ('"norm"', '"rotary-emb-base": 500, "norm"', {"rotary_emb_base": 500}),
}


@pytest.mark.parametrize(("old", "new", "changes"), YML_DIALECT.values(), ids=YML_DIALECT)
def test_the_dialect_of_the_yml(release, old, new, changes):
    """Every setting that changes the arithmetic is taken from the file, in either spelling."""
    folder, _ = release
    rewrite_yml(folder, old, new)
    assert SlimCheckpoint(folder).config == replace(RELEASED, **changes)


BAD_YML = {
    "another model": ('"num-layers": 3', '"num-layers": 5', "layer_05-model_00.*missing"),
    "fewer layers": ('"num-layers": 3', '"num-layers": 2', "layer_04-model_00|layer_07-model_00"),
    "another width": ('"hidden-size": 64', '"hidden-size": 128', "64 columns, expected 128"),
    "learned positions": ('"pos-emb": "rotary"', '"pos-emb": "learned"', "20B.yml: pos_emb is 'learned'"),
    "no positions named": ('"pos-emb": "rotary",', "", "20B.yml: pos_emb"),
    "another norm": ('"layernorm"', '"rmsnorm"', "20B.yml: norm is 'rmsnorm'"),
    "a window": ('"norm"', '"sliding-window-width": 16, "norm"', "20B.yml: sliding_window_width is 16"),
    "local layers": (
        '"norm"',
        '"attention_config": [[["local", "global"], 2]], "norm"',
        "20B.yml: attention_config is",
    ),
    "sparse layers": ('"norm"', '"attention-config": [[["sparse_fixed"], "all"]], "norm"', "20B.yml: attention_config"),
    "layers as a word": ('"norm"', '"attention-config": "flash", "norm"', "20B.yml: attention_config is 'flash'"),
    "mup": ('"norm"', '"use-mup": true, "norm"', "20B.yml: use_mup is True; only False can be run"),
    "a gated mlp": ('"norm"', '"mlp_type": "llama", "norm"', "20B.yml: mlp_type is 'llama'; only 'regular'"),
    "another activation": ('"norm"', '"activation": "swiglu", "norm"', "20B.yml: activation is 'swiglu'"),
    "no biases in the mlp": ('"norm"', '"use_bias_in_mlp": false, "norm"', "20B.yml: use_bias_in_mlp is False"),
    "no biases in norms": ('"norm"', '"use_bias_in_norms": false, "norm"', "20B.yml: use_bias_in_norms is False"),
    "norms of queries": ('"norm"', '"use-qk-layernorm": true, "norm"', "20B.yml: use_qk_layernorm is True; this lib"),
    "fewer keys": ('"norm"', '"num-kv-heads": 2, "norm"', "20B.yml: num_kv_heads is 2"),
    "experts": ('"norm"', '"moe-num-experts": 8, "norm"', "20B.yml: moe_num_experts is 8"),
    "a learned prompt": ('"norm"', '"soft-prompt-tuning": {"enabled": true}, "norm"', "20B.yml: soft_prompt_tuning"),
    "another engine's attention": ('"norm"', '"te_mha": true, "norm"', "20B.yml: te_mha is True; this library"),
    "pairs of neighbours": ('"norm"', '"rotary_interleaved": true, "norm"', "20B.yml: rotary_interleaved is True"),
    "what a fork may call it": ('"norm"', '"attn_logit_softcap": 30, "norm"', "attn_logit_softcap is 30; .*may change"),
    "no layers named": ('"num-layers": 3,', "", "20B.yml.*num_layers"),
    "text for numbers": ('"num-layers": 3', '"num-layers": "many"', "20B.yml.*num_hidden_layers"),
    "heads that do not divide": ('"num-attention-heads": 4', '"num-attention-heads": 5', "20B.yml.*64.*5"),
    "not yaml": ("{", "{ ] :", "20B.yml"),
    "an alias, of which ten times ten in a row are more than memory": (
        '"norm"',
        '"a": &a [1, 2], "num-kv-heads": *a, "norm"',
        r"20B.yml.*aliases, such as \*name, are not read",
    ),
    "an empty number": ('"num-layers": 3', '"num-layers": !!int ""', "20B.yml.*IndexError"),
    "a number past all": ('"norm"', f'"rotary-emb-base": 1{"0" * 400}, "norm"', "20B.yml.*OverflowError"),
    "brackets without an end": ('"norm"', f'"a": {"[" * 1500}, "norm"', "20B.yml"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD_YML.values(), ids=BAD_YML)
def test_a_yml_that_does_not_fit_is_named(release, old, new, message):
    folder, _ = release
    rewrite_yml(folder, old, new)
    with pytest.raises(CheckpointError, match=message) as error:
        SlimCheckpoint(folder)
    assert len(str(error.value).splitlines()) == 1


def test_attention_without_biases_is_read_as_its_yml_says_or_as_the_files_are(release, random_model):
    folder, _ = release
    for path in folder.glob("layer_*"):
        edit(
            path,
            lambda tensors: [tensors.pop(key) for key in list(tensors) if key[:10] == "attention." and "bias" in key],
        )
    with pytest.raises(CheckpointError, match=r"layer_02-model_00.*lacks attention.query_key_value.bias"):
        load(folder)
    rewrite_yml(folder, '"norm"', '"use-bias-in-attn-linear": false, "norm"')
    plain = replace(RELEASED, attention_bias=False)
    assert load(folder).config == plain
    shutil.rmtree(folder.parent / "configs")
    assert load(folder).config == replace(plain, max_position_embeddings=2048)


def without_a_pipeline(folder: Path, place: str = "") -> None:
    """The layer files of a release as gpt-neox writes them for pipe-parallel-size 0: a file a rank, the state of
    training beside the weights."""
    files: dict[str, dict[str, Tensor]] = {}
    for index, paths in find_shards(folder).items():
        for rank, path in enumerate(paths):
            module = files.setdefault(f"mp_rank_{rank:02d}_model_states.pt", {})
            module |= {f"{place}sequential.{index}.{key}": tensor for key, tensor in open_tensors(path).items()}
    state = {"np_rng_state": np.random.default_rng(0).integers(9, size=5).astype("uint32"), "dp_world_size": 1}
    for path in folder.glob("*.pt"):
        path.unlink()
    for name, module in files.items():
        torch.save(state | {"module": {key: tensor.clone() for key, tensor in module.items()}}, folder / name)


@pytest.mark.parametrize("place", ["", "module."])
def test_a_release_without_a_pipeline_is_the_same_model(release, place):
    """All layers of a rank lie in one file then; whatever reads layer files reads them."""
    folder, _ = release
    merged = load(folder).state_dict()
    without_a_pipeline(folder, place)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == RELEASED
    assert all(torch.equal(merged[name], tensor) for name, tensor in checkpoint.tensors())
    assert {len(parts) for _, parts in checkpoint.parts()} == {2}
    rows = checkpoint.files()
    assert [row.part for row in rows[:3]] == ["word embeddings", "word embeddings", "block 0"]
    held = [tensor.nbytes for path in folder.glob("*.pt") for tensor in open_tensors(path).values()]
    assert sum(row.nbytes for row in rows) == sum(held)


WITHOUT_A_PIPELINE = {
    "a rank is missing": (lambda folder: (folder / WHOLE.format(0)).unlink(), "mp_rank_00 is missing"),
    "weights elsewhere": (
        lambda folder: torch.save({"module": None}, folder / WHOLE.format(0)),
        "holds no weights.*layer_00",
    ),
    "a layer is missing": (
        lambda folder: keep(folder, lambda key: "sequential.3." not in key),
        r"mp_rank_00_model_states.pt:sequential.3: missing; 3 layers need it",
    ),
    "names of transformers": (
        lambda folder: keep(folder, lambda key: True, lambda key: key.replace("sequential", "gpt_neox.layers")),
        r"mp_rank_00\S+: gpt_neox.layers.\S+ is not a key of gpt-neox.*the parent folder",
    ),
    "a key is missing": (
        lambda folder: keep(folder, lambda key: "3.mlp.dense_h_to_4h.bias" not in key),
        r"mp_rank_00_model_states.pt:sequential.3: lacks mlp.dense_h_to_4h.bias",
    ),
}
WHOLE = "mp_rank_{:02d}_model_states.pt"


def keep(folder: Path, wanted, rename=lambda key: key) -> None:
    for path in folder.glob("mp_rank_*"):
        module = {rename(key): tensor.clone() for key, tensor in open_tensors(path).items() if wanted(key)}
        torch.save({"module": module}, path)


@pytest.mark.parametrize(("damage", "words"), WITHOUT_A_PIPELINE.values(), ids=WITHOUT_A_PIPELINE)
def test_a_file_of_all_layers_that_cannot_be_used_is_named(release, damage, words):
    folder, _ = release
    without_a_pipeline(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as error:
        load(folder)
    assert len(str(error.value).splitlines()) == 1


def test_what_stands_in_front_of_all_keys_is_no_part_of_them(release):
    """A model that was wrapped when it was saved; a second one in the same file is not taken for it."""
    folder, _ = release
    merged = load(folder).state_dict()
    for path in folder.glob("layer_*"):
        edit(
            path,
            lambda tensors: [tensors.update({f"module._orig_mod.{key}": tensors.pop(key)}) for key in list(tensors)],
        )
    assert all(torch.equal(merged[name], tensor) for name, tensor in load(folder).state_dict().items())
    edit(shard(folder, 7, 0), lambda tensors: tensors.update({"final_linear.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"layer_07\S+: module\S+ and \S+ name the same parameter"):
        load(folder)


def test_two_ymls_are_a_question(release):
    """Two models' configs in one place: asking is better than taking the first."""
    folder, _ = release
    shutil.copy(folder.parent / "configs" / "20B.yml", folder.parent / "configs" / "small.yml")
    with pytest.raises(CheckpointError, match=r"20B\.yml, small\.yml"):
        SlimCheckpoint(folder)
    shutil.copy(folder.parent / "configs" / "20B.yml", folder)
    assert SlimCheckpoint(folder).config == RELEASED


def test_ymls_of_other_things_do_not_matter(release):
    folder, _ = release
    (folder / "docker-compose.yml").write_text("services: {web: {image: x}}")
    (folder / "broken.yml").write_text("{ ] :")
    (folder / "folder.yml").mkdir()
    assert SlimCheckpoint(folder).config == RELEASED


def test_without_any_config_the_frequencies_tell(release, caplog):
    """Two frequencies are 4 rotary dimensions, a quarter of 16: four heads. An assumption, so it is said."""
    folder, model = release
    shutil.rmtree(folder.parent / "configs")
    assert SlimCheckpoint(folder).config == replace(RELEASED, max_position_embeddings=2048)
    assert re.search(r"global_step150000.*assuming 25 % rotary \(head size 16\)", caplog.text)
    assert_same_model(load(folder), model)


def test_without_any_hint_it_is_refused(tmp_path, random_model):
    """Shapes don't give the number of heads, and a guess would load a model that writes nonsense."""
    write_slim(random_model(CONFIG), tmp_path / "a" / "c", ranks=2)
    (tmp_path / "a" / "c" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="number of heads is unknown"):
        load(tmp_path / "a" / "c")


def test_frequencies_that_do_not_fit_are_refused(release):
    folder, _ = release
    shutil.rmtree(folder.parent / "configs")
    edit(find_shards(folder)[2][0], lambda tensors: tensors.update({"attention.rotary_emb.inv_freq": torch.ones(5)}))
    with pytest.raises(CheckpointError, match="inv_freq has 5 entries"):
        SlimCheckpoint(folder)


# Broken checkpoints


def shard(folder: Path, index: int, rank: int) -> Path:
    return folder / layer_file_name(index, rank)


def drop_rank(folder: Path) -> None:
    for path in folder.glob("layer_*-model_01-*"):
        path.unlink()


def add_third_rank(folder: Path) -> None:
    for path in folder.glob("layer_*-model_01-*"):
        shutil.copy(path, str(path).replace("model_01", "model_02"))


def drop_layer(index: int):
    return lambda folder: [shard(folder, index, rank).unlink() for rank in range(2)]


def cut(folder: Path) -> None:
    content = shard(folder, 3, 1).read_bytes()
    shard(folder, 3, 1).write_bytes(content[: len(content) // 2])


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def change(index: int, rank: int, key: str, value):
    return lambda folder: edit(shard(folder, index, rank), lambda tensors: tensors.update({key: value(tensors)}))


BIAS, QKV = "attention.dense.bias", "attention.query_key_value.weight"
# name: (what happens to a good checkpoint of two ranks, message of the error)
BROKEN = {
    "a rank of a layer missing": (lambda f: shard(f, 3, 1).unlink(), r"layer_03-model_01.*missing"),
    "a rank missing": (
        drop_rank,
        r"layer_00-model_00.*word_embeddings.weight.*\[128, 64\], expected \[256, 64\].*rank",
    ),
    "a block missing": (drop_layer(3), r"layer_03-model_00.*missing.*block 1"),
    "the embedding missing": (drop_layer(0), r"layer_00-model_00.*missing.*word embeddings"),
    "the norm missing": (drop_layer(6), r"layer_06-model_00.*missing.*final norm"),
    "the output matrix missing": (drop_layer(7), r"layer_07-model_00.*missing.*output matrix"),
    "a stray rank": (lambda f: shutil.copy(shard(f, 3, 0), shard(f, 3, 2)), r"layer_03-model_02.*unexpected.*2 rank"),
    "a stray layer": (
        lambda f: [shutil.copy(shard(f, 3, rank), shard(f, 9, rank)) for rank in (0, 1)],
        r"layer_09-model_00.*unexpected.*3 layers",
    ),
    "a third rank": (add_third_rank, r"256 rows do not divide into 3 ranks"),
    "a shard cut in half": (cut, r"layer_03-model_01.*truncated"),
    "an empty shard": (lambda f: shard(f, 3, 1).write_bytes(b""), r"layer_03-model_01.*empty"),
    "text in a shard": (lambda f: shard(f, 3, 1).write_text("404"), r"layer_03-model_01"),
    "a folder for a shard": (
        lambda f: (shard(f, 3, 1).unlink(), shard(f, 3, 1).mkdir()),
        r"layer_03-model_01.*missing",
    ),
    "a hostile shard": (lambda f: torch.save({"a": RunsCode()}, shard(f, 3, 1)), r"layer_03-model_01.*refused"),
    "a hostile embedding": (lambda f: torch.save({"a": RunsCode()}, shard(f, 0, 0)), r"layer_00-model_00.*refused"),
    "a wrong shape": (
        change(3, 1, QKV, lambda t: t[QKV][:-1].clone()),
        r"layer_03-model_01.*query_key_value.weight.*\[95, 64\], expected \[96, 64\]",
    ),
    "a wrong dtype": (change(3, 1, BIAS, lambda t: t[BIAS].int()), r"layer_03-model_01.*dense.bias is torch.int32"),
    "dtypes that differ by rank": (
        change(3, 1, BIAS, lambda t: t[BIAS].half()),
        r"layer_03-model_01.*dense.bias is torch.float16, expected torch.float32",
    ),
    "an unknown key": (change(3, 1, "extra.weight", lambda t: t[BIAS]), r"layer_03-model_01.*unexpected extra.weight"),
    "a missing key": (
        lambda f: edit(shard(f, 3, 1), lambda tensors: tensors.pop(BIAS)),
        r"layer_03-model_01.*lacks attention.dense.bias",
    ),
    "a config of another width": (
        lambda f: (f / "config.json").write_text(replace(CONFIG, intermediate_size=256).to_json()),
        r"layer_02-model_00.*dense_h_to_4h.weight.*\[64, 64\], expected \[128, 64\]",
    ),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "an impossible config": (lambda f: (f / "config.json").write_text('{"hidden_size": 5}'), r"config\.json"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_named(tmp_path, random_model, monkeypatch, damage, message):
    """File, expected and found in one line; and whatever is in a shard, nothing of it is run."""
    folder = tmp_path / "c"
    write_slim(random_model(CONFIG), folder, ranks=2)
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_no_checkpoint_at_all(tmp_path):
    assert not is_slim(tmp_path) and not is_slim(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no layer files"):
        SlimCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        SlimCheckpoint(tmp_path / "nowhere")


def test_a_tied_model_may_repeat_its_embedding_but_not_change_it(tmp_path, random_model):
    """gpt-neox writes a tied embedding twice. Two different ones mean that the config is wrong, and half the model."""
    folder = tmp_path / "c"
    model = random_model(replace(CONFIG, tie_word_embeddings=True))
    write_slim(model, folder, ranks=2)
    for rank in range(2):
        shutil.copy(shard(folder, 0, rank), shard(folder, 7, rank))
    assert_same_model(load(folder), model)
    edit(shard(folder, 7, 1), lambda tensors: tensors["word_embeddings.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"layer_07-model_01.*tied"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"layer_07-model_01.*tied"):
        convert_to_slim(folder, tmp_path / "d", ranks=1)


# Saving


@pytest.mark.parametrize("ranks", [3, 8, 0, -1, 2.0])
def test_ranks_that_do_not_divide_are_refused(tmp_path, random_model, ranks):
    with pytest.raises(CheckpointError, match=f"{ranks} ranks do not divide the attention heads of 4"):
        write_slim(random_model(CONFIG), tmp_path / "c", ranks)
    assert not (tmp_path / "c").exists()


def test_the_vocabulary_and_the_mlp_must_divide_too(tmp_path, random_model):
    with pytest.raises(CheckpointError, match="2 ranks do not divide the padded vocabulary of 255"):
        write_slim(random_model(replace(CONFIG, vocab_size=255)), tmp_path / "c", ranks=2)
    with pytest.raises(CheckpointError, match="4 ranks do not divide the MLP width of 130"):
        write_slim(random_model(replace(CONFIG, intermediate_size=130)), tmp_path / "c", ranks=4)


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, random_model, monkeypatch):
    model = random_model(CONFIG)
    write_slim(model, tmp_path / "c", ranks=2)
    monkeypatch.setattr(files, "free_bytes", lambda folder: 100_000)
    with pytest.raises(CheckpointError, match=r"need 0\.00 GB and the disk has 0\.00 GB|need .* GB"):
        write_slim(model, tmp_path / "d", ranks=2)
    with pytest.raises(CheckpointError, match=r"need .* GB and the disk has 0\.00 GB free"):
        convert_to_slim(tmp_path / "c", tmp_path / "d", ranks=1)
    assert not (tmp_path / "d").exists()


def test_a_model_is_not_written_over_another(tmp_path, random_model):
    """A save over an old checkpoint of other shape or ranks would mix both when interrupted: the old one stays."""
    model = random_model(CONFIG)
    write_slim(model, tmp_path / "c", ranks=2)
    with pytest.raises(CheckpointError, match="already holds a model"):
        write_slim(random_model(CONFIG, seed=1), tmp_path / "c", ranks=4)
    with pytest.raises(CheckpointError, match="folder to read from"):
        convert_to_slim(tmp_path / "c", tmp_path / "c" / ".." / "c", ranks=1)
    assert_same_model(load(tmp_path / "c"), model)


def test_a_file_where_the_folder_should_be(tmp_path, random_model):
    (tmp_path / "c").write_text("notes")
    with pytest.raises(CheckpointError, match="c: cannot be written to"):
        write_slim(random_model(CONFIG), tmp_path / "c", ranks=2)
    assert (tmp_path / "c").read_text() == "notes"


def test_other_files_in_the_folder_stay(tmp_path, random_model):
    (tmp_path / "tokenizer.json").write_text("{}")
    write_slim(random_model(CONFIG), tmp_path, ranks=2)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or "unfinished" in path.name]


def test_an_interrupted_save_never_looks_whole(tmp_path, random_model, monkeypatch):
    """Ctrl-C at every possible file in turn: until the last is written the folder is refused, with a config above it
    that would fit, and saving again completes it."""
    model = random_model(CONFIG).half()
    (tmp_path / "m.yml").write_text(YML)
    folder, real = tmp_path / "c", os.replace
    for allowed in range(1, 14):  # the mark, 12 layer files, config.json: the 14th move would complete it
        moves = iter(range(allowed))

        def move(source, target, moves=moves):
            if next(moves, None) is None:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            write_slim(model, folder, ranks=2, spread_seed=1)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="interrupted; save again"):
            load(folder)
    write_slim(model, folder, ranks=1)  # of the torso's second rank nothing may be left
    assert_same_model(load(folder), model)


KILLED = """
import sys, time
from dataclasses import replace
from neox_lib.checkpoints.slim import writer as slim_writer
from neox_lib.config import tiny
from neox_lib.model import NeoXModel
from tests.small_models import load

real, count = slim_writer.save_tensors, 0

def save(path, tensors):
    global count
    count += 1
    real(path, tensors)
    if count == 5:
        print("in the middle", flush=True)
        time.sleep(60)

slim_writer.save_tensors = save
slim_writer.write_slim(NeoXModel(replace(tiny(), vocab_size=64, tokenizer_vocab_size=64)), sys.argv[1], ranks=2)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_save_is_refused_and_can_be_repeated(tmp_path, random_model):
    """The machine loses power while 20B is being written: nobody may take the torso for the model."""
    folder = tmp_path / "c"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in the middle\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(folder.glob("layer_*.pt"))) == 5
    with pytest.raises(CheckpointError, match="interrupted; save again"):
        load(folder)
    model = random_model(CONFIG)
    write_slim(model, folder, ranks=1)
    assert_same_model(load(folder), model)


def test_loading_is_silent_and_shows_no_warning(tmp_path, random_model, capfd):
    """A bar for a small model would stand in the stored output of every notebook."""
    write_slim(random_model(CONFIG), tmp_path / "c", ranks=2)
    load(tmp_path / "c")
    assert capfd.readouterr() == ("", "")


def test_a_small_model_shows_no_bar_however_slow_the_machine_is(tmp_path, random_model, monkeypatch, capfd):
    """Notebooks' outputs are compared; a bar after two seconds would make a busy machine fail."""
    write_slim(random_model(CONFIG), tmp_path / "c", ranks=2)
    real = files.tqdm
    monkeypatch.setattr(files, "tqdm", lambda **options: real(**options | {"delay": 0}))
    load(tmp_path / "c")
    assert capfd.readouterr() == ("", "")


def test_a_large_model_shows_its_progress(tmp_path, random_model, monkeypatch, capfd):
    """Without a bar a minute of loading looks like a hang: bytes done of the bytes on the disk."""
    write_slim(random_model(CONFIG), tmp_path / "c", ranks=2)
    bars, real = [], files.tqdm
    large = {"delay": 0, "disable": False}
    monkeypatch.setattr(files, "tqdm", lambda **options: bars.append(real(**options | large)) or bars[-1])
    load(tmp_path / "c")
    assert "Reading weights" in capfd.readouterr().err
    assert bars[0].n == bars[0].total == sum(row.nbytes for row in SlimCheckpoint(tmp_path / "c").files())


def test_an_empty_model_does_not_import_the_compiler():
    """Drawing initial values on the meta device costs 1.4 s of imports, more than the shipped model takes to load."""
    code = "from neox_lib.checkpoints import build; from neox_lib import config; import sys"
    code += "; build.empty_model(config.tiny())"
    code += "; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
