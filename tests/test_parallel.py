"""One model on several ranks: the same scores and text as one process, a fair share of memory, one exchange per block,
and one line when a rank fails."""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore

from neox_lib.cache import KVCache
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.slim.partition import MERGE_RULES, merge_shards, split_tensor
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.config import NeoXConfig, neox_20b, parameter_shapes, tiny
from neox_lib.distributed.ranks import RankFailed, describe_failure, on_ranks, rank_device
from neox_lib.distributed.tensor_parallel import own_part, share_of
from neox_lib.loading import create_model
from neox_lib.model import NeoXModel
from tests import ranks_at_work
from tests.conftest import randomize
from tests.small_models import YARN

PARALLEL = NeoXConfig(
    vocab_size=96,
    tokenizer_vocab_size=90,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=64,
    rotary_pct=0.5,
)
pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {
    "parallel": PARALLEL,
    "sequential": dataclasses.replace(
        PARALLEL, use_parallel_residual=False, hidden_act="gelu", attention_bias=False, rope_scaling=YARN
    ),
    "tied": dataclasses.replace(PARALLEL, tie_word_embeddings=True),
}
IDS = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(shape, file_ranks) -> a random model as a slim folder whose ranks differ in biases and norms; for 0
    file ranks, as a Hugging Face folder."""

    @functools.cache
    def make(shape: str, file_ranks: int):
        model = NeoXModel(SHAPES[shape]).eval()
        randomize(model, seed=1)
        if SHAPES[
            shape
        ].tie_word_embeddings:  # as output matrix it would make scores of 40, of which 1e-5 is a rounding
            model.word_embeddings.weight.data.mul_(0.2)
        folder = tmp_path_factory.mktemp("parallel") / f"{shape}_{file_ranks}"
        if file_ranks:
            write_slim(model, folder, file_ranks, spread_seed=5)
        else:
            write_huggingface(model, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def found(folder_of):
    """found(shape, file_ranks, ranks) -> what each rank tells, once a session."""

    @functools.cache
    def examine(shape: str, file_ranks: int, ranks: int) -> list[dict]:
        return on_ranks(ranks, ranks_at_work.examine, folder_of(shape, file_ranks), IDS)

    return examine


@functools.cache
def alone(folder) -> tuple[torch.Tensor, dict]:
    """Logits and texts of the whole model in this process."""
    model = create_model(folder, device="cpu", dtype="float32")
    return model(IDS), ranks_at_work.texts(model)


CASES = [
    ("parallel", 2, 2),  # the files' own ranks
    ("parallel", 2, 1),
    ("parallel", 2, 4),
    ("sequential", 1, 2),
    ("tied", 0, 2),
]
every_case = pytest.mark.parametrize(("shape", "file_ranks", "ranks"), CASES)


@every_case
def test_every_rank_has_the_scores_of_one_process(found, folder_of, shape, file_ranks, ranks):
    expected, _ = alone(folder_of(shape, file_ranks))
    for told in found(shape, file_ranks, ranks):
        assert torch.allclose(told["logits"], expected, rtol=0, atol=1e-5)


@every_case
def test_passes_through_a_cache_give_the_same_scores(found, folder_of, shape, file_ranks, ranks):
    expected, _ = alone(folder_of(shape, file_ranks))
    for told in found(shape, file_ranks, ranks):
        assert torch.allclose(told["cached"], expected, rtol=0, atol=1e-5)


@every_case
def test_every_rank_writes_the_text_of_one_process(found, folder_of, shape, file_ranks, ranks):
    """Greedy, drawn, without a cache and up to a stop token: a rank that chose otherwise would go its own way."""
    _, expected = alone(folder_of(shape, file_ranks))
    assert len(expected["stopped"]) < len(expected["greedy"]) and expected["drawn"] != expected["greedy"]
    for told in found(shape, file_ranks, ranks):
        assert told["texts"] == expected


@every_case
def test_a_rank_keeps_its_own_heads_in_its_cache(found, shape, file_ranks, ranks):
    heads, whole = SHAPES[shape].num_attention_heads // ranks, SHAPES[shape].kv_cache_bytes(12, torch.float32)
    for told in found(shape, file_ranks, ranks):
        assert told["cache shape"] == (3, 2, heads, 12, 16)
        assert told["cache bytes counted"] == whole // ranks


@every_case
@pytest.mark.parametrize("work", ["prefill", "decode"])
def test_one_exchange_a_block_two_where_the_residual_is_sequential(found, shape, file_ranks, ranks, work):
    """Each exchange costs a wait for the slowest rank: a second one per block would double the waits."""
    a_block = 1 if SHAPES[shape].use_parallel_residual else 2
    for told in found(shape, file_ranks, ranks):
        assert told[work] == {"allreduce_": 1 + 3 * a_block, "allgather_": 1}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_share_of_the_parameters(ranks):
    """Of 20B, counted on shapes: 1.1 times an Nth at most."""
    for config in (tiny(), neox_20b()):
        if config.num_attention_heads % ranks:
            continue
        held = sum(
            part.numel()
            for key, shape in parameter_shapes(config).items()
            if (part := own_part(key, [torch.empty(shape, device="meta")], 0, ranks)) is not None
        )
        assert held <= 1.1 * config.parameter_count() / ranks


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A model of 36 MB in fp32, whose files are of two ranks: large enough to be seen in a process's memory."""
    config = dataclasses.replace(tiny(), hidden_size=384, intermediate_size=1536, num_hidden_layers=4)
    folder = tmp_path_factory.mktemp("larger") / "model"
    write_slim(NeoXModel(config), folder, 2)
    return folder, config


def test_a_ranks_process_grows_by_its_share(larger):
    folder, config = larger
    for grown in on_ranks(2, ranks_at_work.grow, folder):
        assert grown <= 1.1 * config.weight_bytes(torch.float32) / 2


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="page counts are Linux's")
def test_a_rank_reads_its_own_files_only(larger):
    """Of the other rank's file a few pages: its header, its norms and biases. 20B's are 20 GB that need not be read."""
    folder, _ = larger
    for rank, shares in enumerate(on_ranks(2, ranks_at_work.pages_touched, folder)):
        blocks = {name: share for name, share in shares.items() if name.startswith(("layer_02", "layer_05"))}
        assert len(blocks) == 4
        for name, share in blocks.items():
            assert (share > 0.9) if f"model_{rank:02d}" in name else (share < 0.15), (name, share)


KEYS = [key if key.startswith(("norm", "word", "final")) else f"layers.0.x.{key}" for key in MERGE_RULES]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KEYS), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4, 6, 12]), st.data())
def test_what_the_ranks_keep_is_the_whole_however_the_files_cut_it(key, file_ranks, ranks, data):
    whole = torch.randn((12, 24) if "weight" in key and "norm" not in key else (12,))
    parts = split_tensor(key, whole, file_ranks, spread_seed=data.draw(st.integers(0, 9)))
    kept = [own_part(key, parts, rank, ranks) for rank in range(ranks)]
    if None in kept[1:]:
        assert torch.equal(kept[0], whole) and all(part is None for part in kept[1:])
    elif len(whole.shape) == 1 and len(kept[0]) == len(whole):
        assert all(torch.equal(part, merge_shards(key, parts)) for part in kept)
    else:
        assert torch.equal(merge_shards(key, kept), whole)


def test_ranks_that_differ_in_the_last_digits_still_choose_the_same_token(folder_of):
    """Another kind of processor may round otherwise. The scores are gathered, so all ranks see the very same ones."""
    first, second = on_ranks(2, ranks_at_work.disagree, folder_of("parallel", 2))
    assert not torch.equal(first["hidden"], second["hidden"])
    assert torch.equal(first["logits"], second["logits"])
    assert all(first[way] == second[way] for way in ("greedy", "drawn", "no cache", "stopped"))


def test_heads_that_do_not_divide_are_refused_with_the_number():
    with pytest.raises(CheckpointError, match="3 ranks do not divide the attention heads of 4"):
        share_of(PARALLEL, 3)


def test_a_share_has_heads_of_the_whole_models_size():
    share = share_of(neox_20b(), 2)
    assert (share.num_attention_heads, share.head_dim, share.rotary_ndims) == (32, 96, 24)
    cache = KVCache(share, 1, 3, torch.device("meta"), torch.float16)
    assert cache.keys.shape == (44, 1, 32, 3, 96)


def test_more_ranks_than_gpus_are_told_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"finds 1 GPU.*device cpu"):
        rank_device("auto")
    with pytest.raises(ValueError, match="its own GPU"):
        rank_device("cuda:0")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (ranks_at_work.fail_on_rank_1, "^the fox is not at home$"),
        (ranks_at_work.die_on_rank_1, "lost"),
        (ranks_at_work.hang_on_rank_0, "rank 1 of 2 was lost"),
    ],
)
def test_a_rank_that_fails_or_dies_ends_all_in_seconds(work, said):
    """Not after gloo's half hour of waiting."""
    started = time.monotonic()
    with pytest.raises(RankFailed, match=said) as caught:
        on_ranks(2, work)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 60


def test_a_mistake_in_the_program_is_named_with_its_kind():
    assert describe_failure(TypeError("no\nfox"), 1, 2) == (1, "rank 1 of 2 failed: TypeError: no fox")


@contextlib.contextmanager
def two_processes(*argv: str, stdin: int | None = None):
    """The command on two ranks, with the environment that torchrun gives, without torchrun's own report."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1, "PYTHONUNBUFFERED": 1}
    processes = []
    for rank in range(2):
        environment = os.environ | {
            key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()
        }
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "neox_lib", *argv]
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ends(processes, seconds: float = 60) -> tuple[list[int], str, str]:
    """Exit codes, and all output and errors of both."""
    texts = [process.communicate(timeout=seconds) for process in processes]
    codes = [process.returncode for process in processes]
    return codes, "".join(out for out, _ in texts), "".join(err for _, err in texts)


LONG = ("generate", "the fox", "--device", "cpu", "--tokens", "1500", "--no-stop", "--no-cache")


def test_a_killed_rank_ends_the_command_with_one_line():
    with two_processes(*LONG) as processes:
        assert processes[0].stdout.read(8)
        processes[1].kill()
        codes, _, err = ends(processes)
    assert codes[0] == 1
    assert [line for line in err.splitlines() if not line.startswith("[")] == [err.splitlines()[-1]]
    assert err.splitlines()[-1].startswith("neox_lib: rank 0 of 2 lost another rank")


def test_an_error_that_all_ranks_make_is_said_once():
    with two_processes("generate", "the fox", "--device", "cpu", "--model", "no/such/folder") as processes:
        codes, out, err = ends(processes)
    assert codes == [2, 2] and out == ""
    assert err.count("\n") == 1 and err.startswith("neox_lib: ") and "no/such/folder" in err


def test_ctrl_c_keeps_the_text_and_says_nothing_more():
    with two_processes(*LONG) as processes:
        assert processes[0].stdout.read(8)
        for process in processes:
            process.send_signal(signal.SIGINT)
        codes, _, err = ends(processes)
    assert codes == [130, 130]
    assert err.startswith("[3.5 M parameters") and err.count("\n") == 1


@pytest.mark.slow
def test_torchrun_writes_the_text_of_one_process(capfd):
    argv = [
        "-m",
        "neox_lib",
        "generate",
        "-",
        "--device",
        "cpu",
        "--tokens",
        "12",
        "--temperature",
        "0.8",
        "--seed",
        "4",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv]
    several = subprocess.run(command, input="the fox", capture_output=True, text=True, timeout=120)
    one = subprocess.run([sys.executable, *argv], input="the fox", capture_output=True, text=True, timeout=120)
    assert several.returncode == 0 and several.stdout == one.stdout and "the fox" in one.stdout
    assert "cpu, 2 ranks; prefill" in several.stderr


@pytest.mark.gpu
def test_nccl_gives_the_scores_and_the_text_of_one_process(folder_of):
    ranks, folder = min(2, torch.cuda.device_count()), folder_of("parallel", 2)
    expected, texts = alone(folder)
    for told in on_ranks(ranks, ranks_at_work.examine, folder, IDS, "cuda", device="cuda"):
        assert torch.allclose(told["logits"], expected, rtol=0, atol=1e-4)
        assert told["texts"] == texts
