"""create_model: what it takes, where it puts it, in which precision, and what it says when it can't."""

import contextlib
import re
import shutil
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import neox_lib
from neox_lib import loading, memory, precision
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError, open_tensors
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import write_quantized
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.checkpoints.tensor_files import open_safetensors
from neox_lib.config import NeoXConfig, neox_20b, pythia, tiny
from neox_lib.course.checks import in_place_of
from neox_lib.distributed.loading import build_rank
from neox_lib.generation import greedy_generate
from neox_lib.loading import choose_device, create_model
from neox_lib.model import NeoXModel
from neox_lib.precision import Precision, check_memory, choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = NeoXConfig(
    vocab_size=256,
    tokenizer_vocab_size=250,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=128,
)


@contextlib.contextmanager
def counted(monkeypatch) -> Iterator[tuple[Counter, Counter]]:
    """While this is entered: how often each file of weights is opened, and each of our classes is made."""
    files, made = Counter(), Counter()

    def counting(open_file):
        return lambda path: files.update([Path(path).name]) or open_file(path)

    def noting(cls, method):
        real = getattr(cls, method)
        monkeypatch.setattr(
            cls, method, lambda self, *arguments, **more: made.update([type(self)]) or real(self, *arguments, **more)
        )

    noting(NeoXModel, "__init__")
    noting(NeoXConfig, "__post_init__")
    with contextlib.ExitStack() as stack:
        for open_file in (open_tensors, open_safetensors):
            stack.enter_context(in_place_of(open_file, counting(open_file)))
        yield files, made


@pytest.mark.parametrize("kind", ["the shipped model", "the same, quantized", "tied", "an int8 file", "one rank"])
def test_each_file_is_opened_once_and_one_model_is_built(kind, tmp_path, monkeypatch, random_model):
    """A path leads to a model in a straight line; what is done twice is slow at 20B and hard to follow at any size."""
    path = tmp_path / "model"
    if kind == "an int8 file":
        write_quantized(open_checkpoint(SHIPPED_MODEL), path)
    elif kind == "tied":
        write_slim(random_model(replace(CONFIG, tie_word_embeddings=True)), path, ranks=2)
    else:
        shutil.copytree(SHIPPED_MODEL, path)
    expected = {file.name: 1 for file in path.iterdir() if file.suffix in (".pt", ".safetensors")}
    with counted(monkeypatch) as (files, made):
        if kind == "one rank":
            checkpoint = open_checkpoint(path)
            build_rank(checkpoint.config, checkpoint.parts(), 1, 2, CPU, lambda name: torch.float32)
        else:
            create_model(path, device="cpu", dtype="int8" if "quantized" in kind else "auto")
    assert files == expected
    assert made[NeoXModel] == 1 and made[NeoXConfig] == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random fp16 model in the slim layout."""
    torch.manual_seed(0)
    model = NeoXModel(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1)
    path = tmp_path_factory.mktemp("loading") / "model"
    write_slim(model.to(torch.float16), path, ranks=2, spread_seed=1)
    return path


def stored_as(dtype, config=None, float_dtype=None) -> Any:
    """As much of a checkpoint as the choice of a precision looks at."""
    return types.SimpleNamespace(config=config or tiny(), dtype=dtype, float_dtype=float_dtype or dtype)


@pytest.mark.parametrize(
    ("config", "stored", "device", "dtype", "matrices", "others"),
    [
        (tiny(), torch.float16, CPU, "auto", torch.float32, torch.float32),
        (pythia("70m"), torch.float16, CPU, "auto", torch.float32, torch.float32),
        (pythia("160m"), torch.float16, CPU, "auto", torch.float16, torch.float32),
        (pythia("410m"), torch.float32, CPU, "auto", torch.float32, torch.float32),
        (neox_20b(), torch.float16, CPU, "auto", torch.float16, torch.float32),
        (neox_20b(), torch.float16, GPU, "auto", torch.float16, torch.float16),
        (pythia("410m"), torch.bfloat16, GPU, "auto", torch.bfloat16, torch.bfloat16),
        (tiny(), torch.float16, CPU, "float16", torch.float16, torch.float32),
        (tiny(), torch.float16, GPU, torch.float32, torch.float32, torch.float32),
    ],
)
def test_precision_rule(config, stored, device, dtype, matrices, others):
    """Small models compute exactly, large ones keep half the bytes, and a GPU takes the file as it is."""
    precision = choose_precision(stored_as(stored, config), device, dtype)
    assert (precision.matrices, precision.others) == (matrices, others)


@pytest.mark.parametrize(("device", "others"), [(CPU, torch.float32), (GPU, torch.bfloat16)])
def test_int8_weights_stay_int8(device, others):
    checkpoint = stored_as(torch.int8, tiny(), float_dtype=torch.bfloat16)
    for dtype in ("auto", "int8", torch.int8):
        assert choose_precision(checkpoint, device, dtype) == Precision(torch.int8, others)
    with pytest.raises(ValueError, match="holds int8 weights; dtype must be auto or int8, got 'float16'"):
        choose_precision(checkpoint, device, "float16")


@pytest.mark.parametrize("dtype", ["float8", torch.int16, None])
def test_unknown_dtype_is_named(dtype):
    with pytest.raises(ValueError, match="dtype must be auto"):
        choose_precision(stored_as(torch.float16), CPU, dtype)


def test_auto_device_is_cuda_else_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == GPU
    with pytest.raises(ValueError, match="abacus"):
        choose_device("abacus")


@pytest.mark.parametrize("device", ["meta", "hpu", "xla", "cuda:77", torch.device("meta"), None])
def test_a_device_that_is_not_there_is_one_line(device, monkeypatch):
    """Each kind says in its own way that it is missing, some of them only when the first tensor is made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"(can't be used here|no device is called).*use (device='auto'|auto)"
    ) as error:
        choose_device(device)
    assert len(str(error.value).splitlines()) == 1


def test_a_model_too_large_for_memory_is_refused_with_numbers_and_what_fits(monkeypatch):
    """20B in fp32 on a 48 GiB machine: refused before reading, and told that fp16 fits."""
    monkeypatch.setattr(precision, "available_memory", lambda: 48 * 2**30)
    fp32 = Precision(torch.float32, torch.float32)
    with pytest.raises(CheckpointError, match=r"76\.6 GiB.*48\.0 GiB free.*float16 \(38\.3 GiB\)"):
        check_memory(neox_20b(), fp32, CPU)
    check_memory(neox_20b(), Precision(torch.float16, torch.float32), CPU)
    monkeypatch.setattr(precision, "available_memory", lambda: 24 * 2**30)
    with pytest.raises(CheckpointError, match=r"dtype int8 \(19\.5 GiB\) or int4 \(11\.3 GiB\) fits"):
        check_memory(neox_20b(), Precision(torch.float16, torch.float32), CPU)
    monkeypatch.setattr(precision, "available_memory", lambda: 11 * 2**30)
    with pytest.raises(CheckpointError, match="no dtype fits"):
        check_memory(neox_20b(), fp32, CPU)


GROUP = {  # version: (own group as /proc says it, the limit's file, the usage's, what statistics' names begin with)
    "v2": ("0::{}", "memory.max", "memory.current", ""),
    "v1": ("4:cpu,memory:{}", "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
}


@pytest.mark.parametrize("own", ["/", "/jupyter/user", "/docker/of the host"])
@pytest.mark.parametrize("version", GROUP)
def test_the_limit_of_a_container_is_what_is_free(tmp_path, monkeypatch, version, own):
    """JupyterHub, Binder and Docker end a process that takes more, whatever the machine has. Pages of files can be
    given up and count as free; the limit may be on a group around our own."""
    line, limit, used, total = GROUP[version]
    (tmp_path / "own").write_text(f"1:name=systemd:/\n{line.format(own)}\n")
    top = tmp_path / Path(limit).parent
    (top / "jupyter" / "user").mkdir(parents=True)
    for folder, most in ((top, 700_000), (top / "jupyter", 600_000), (top / "jupyter" / "user", "max")):
        (folder / Path(limit).name).write_text(f"{most}\n")
        (folder / Path(used).name).write_text("500000\n")
        (folder / "memory.stat").write_text(f"inactive_file 1\n{total}inactive_file 30000\n{total}active_file 20000\n")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    assert precision.free_memory(CPU) == (150_000 if "user" in own else 250_000)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "none, as on macOS and Windows")
    assert precision.free_memory(CPU) > 700_000


def test_memory_is_checked_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(precision, "available_memory", lambda: 1000)
    monkeypatch.setattr(loading, "build_model", lambda *_: pytest.fail("read weights that cannot fit"))
    with pytest.raises(CheckpointError, match="the weights need"):
        create_model(folder)


def test_fp16_matrices_on_a_cpu_keep_everything_else_in_fp32(folder):
    model = create_model(folder, device="cpu", dtype="float16")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(("bias", "norm.weight"))} == {torch.float32}
    assert dtypes["word_embeddings.weight"] == dtypes["layers.1.mlp.dense_4h_to_h.weight"] == torch.float16
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.float32


def test_half_precision_matrices_stay_close_to_fp32(folder):
    """The numbers are the same; only the products round: 2e-3 of the largest logit covers fp16's 2^-11 a term."""
    ids = torch.arange(60)[None]
    exact = create_model(folder, device="cpu", dtype="float32")(ids)
    mixed = create_model(folder, device="cpu", dtype="float16")(ids)
    assert (exact - mixed).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("layout", [write_huggingface, lambda model, path: write_slim(model, path, ranks=2)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_weights_past_fp16_are_refused_by_name(tmp_path, random_model, layout, stored):
    """bfloat16 reaches 3e38 and fp16 65504: cast, such a weight is infinite, and the text was silently another."""
    model, name = random_model(CONFIG).requires_grad_(False), "layers.1.mlp.dense_4h_to_h.weight"
    model.get_parameter(name)[3, 200] = -1e5
    layout(model.to(stored), tmp_path / "m")
    refused = rf"{name} holds (100,000|99,840), but torch.float16 ends at 65,504; give dtype float32 or bfloat16"
    with pytest.raises(CheckpointError, match=refused):
        create_model(tmp_path / "m", device="cpu", dtype="float16")
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=refused):
        build_rank(checkpoint.config, checkpoint.parts(), 1, 2, CPU, lambda name: torch.float16)
    for dtype in ("auto", "bfloat16", "float32", "int8"):
        assert create_model(tmp_path / "m", device="cpu", dtype=dtype)(torch.tensor([[1, 2]])).isfinite().all()


def test_a_message_says_when_a_cpu_keeps_half_precision(folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    create_model(folder, device="cpu")
    assert caplog.messages == []
    monkeypatch.setattr(precision, "SMALL_MODEL_PARAMETERS", 1)
    create_model(folder, device="cpu", dtype="float16")
    assert caplog.messages == [], "it was asked for"
    create_model(folder, device="cpu")
    assert "matrices in torch.float16" in caplog.text


def test_loaded_models_are_for_inference(folder):
    model = create_model(folder, device="cpu")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_use_cache_is_what_generation_does(folder, monkeypatch):
    made = []
    real = neox_lib.generation.KVCache
    monkeypatch.setattr(neox_lib.generation, "KVCache", lambda *arguments: made.append(arguments) or real(*arguments))
    ids = torch.tensor([[5, 6, 7]])
    uncached = greedy_generate(create_model(folder, use_cache=False, device="cpu"), ids, 12)
    assert not made
    assert greedy_generate(create_model(folder, device="cpu"), ids, 12) == uncached
    assert made


def test_threads_follow_the_size_of_the_model_until_a_user_says_otherwise(monkeypatch):
    """On a laptop in use, two threads of a small model wait for each other: it wrote at a tenth of its speed."""
    threads = {"now": 4}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads["now"])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.update(now=number))
    monkeypatch.setattr(loading, "torchs_threads", 4)
    monkeypatch.setattr(loading, "chosen_threads", 4)
    create_model(device="cpu")
    assert threads["now"] == 1
    for config, expected in ((pythia("31m"), 3), (neox_20b(), 4), (tiny(), 1)):
        loading.use_threads(config)
        assert threads["now"] == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    loading.use_threads(neox_20b())
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads["now"] == 1
    torch.set_num_threads(2)
    loading.use_threads(tiny())
    assert threads["now"] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "no such folder"),
        ("file", "a file"),
        ("empty", "no checkpoint"),
        ("config", "a config.json without weights"),
        ("missing.int8.safetensors", "no such file"),
    ],
)
def test_a_path_without_a_checkpoint_says_what_is_there(tmp_path, name, said):
    (tmp_path / "file").write_text("x")
    for folder in ("empty", "config"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: {said}"):
        open_checkpoint(tmp_path / name)


@pytest.mark.gpu
def test_cuda_takes_the_file_as_it_is_and_writes_the_same_text(folder):
    model = create_model(folder)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("cuda", torch.float16)}
    ids = torch.tensor([[5, 6, 7]])
    on_gpu = create_model(folder, device="cuda", dtype="float32")
    assert greedy_generate(on_gpu, ids, 40) == greedy_generate(create_model(folder, device="cpu"), ids, 40)
