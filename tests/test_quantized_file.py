"""The int8 or int4 file: whole or not there, loaded by mapping, shared between processes, refused when it is wrong."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from neox_lib import create_tokenizer
from neox_lib.__main__ import main
from neox_lib.checkpoints import quantized as quantized_file
from neox_lib.checkpoints.build import fill_model
from neox_lib.checkpoints.checkpoint import ModelCheckpoint
from neox_lib.checkpoints.convert import convert_to_quantized
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import (
    empty_quantized_model,
    find_quantized,
    quantized,
    quantized_bytes,
    quantized_metadata,
    quantized_specs,
    write_quantized,
)
from neox_lib.checkpoints.quantized_stream import QuantizedStream
from neox_lib.checkpoints.safetensors_writer import ALIGNMENT, lay_out, write_safetensors
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.checkpoints.tensor_files import read_ahead
from neox_lib.config import NeoXConfig, parameter_shapes, tiny
from neox_lib.loading import create_model
from neox_lib.precision import needs
from neox_lib.quantization.linear import QUANTIZED
from neox_lib.rope_scaling import RopeScaling
from tests.small_models import BASE

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")


@pytest.fixture(scope="module", params=QUANTIZED)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kind):
    """The shipped model in int8 or int4, with its tokenizer."""
    path = tmp_path_factory.mktemp(kind) / "model"
    write_quantized(open_checkpoint(SHIPPED_MODEL), path, SHIPPED_MODEL / "tokenizer.json", dtype=QUANTIZED[kind])
    return path


def edited(file: Path, target: Path, change) -> Path:
    """A copy of an int8 file whose header `change(header)` has altered; the tensors' bytes stay."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return target


def test_the_file_gives_the_model_that_quantizing_while_loading_gives(folder, kind):
    ids = torch.arange(2, 90)[None]
    quantized_now = create_model(device="cpu", dtype=kind)
    expected = quantized_now(ids)
    for path in (folder, str(folder), find_quantized(folder)):
        model = create_model(path, device="cpu")
        assert torch.equal(model(ids), expected)
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert create_tokenizer(path).get_vocab_size() == 2048
    assert torch.equal(
        create_model(folder, device="cpu").state_dict()["layers.3.attention.dense.weight"],
        quantized_now.state_dict()["layers.3.attention.dense.weight"],
    )


def test_other_programs_can_read_the_file(folder, kind):
    """One plain safetensors file: names, dtypes and shapes are what the specs say, and every tensor is aligned."""
    with safetensors.safe_open(find_quantized(folder), "pt") as file:
        specs = quantized_specs(tiny(), QUANTIZED[kind])
        assert set(file.keys()) == set(specs)
        for name, (dtype, shape) in specs.items():
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape))
        assert file.metadata()["source_dtype"] == "float16" and file.metadata()["version"] == "1"
    for name, tensor in open_checkpoint(folder).tensors():
        assert tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous(), name
    assert (find_quantized(folder)).stat().st_size < quantized_bytes(tiny(), QUANTIZED[kind]) + 20_000


def test_a_model_in_memory_can_be_written_too(folder, kind, tmp_path):
    model = ModelCheckpoint(create_model(device="cpu", dtype="float32"))
    file = write_quantized(model, tmp_path / f"mine.{kind}.safetensors", dtype=QUANTIZED[kind])
    assert file.name == f"mine.{kind}.safetensors" and find_quantized(tmp_path) == file
    ids = torch.arange(2, 50)[None]
    assert (
        create_model(file, device="cpu")(ids) - create_model(folder, device="cpu")(ids)
    ).abs().max() < 2e-2  # its embedding is not rounded to fp16


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["word_embeddings.weight", "layers.5.mlp.dense_h_to_4h.weight", "layers.0.attention.dense.bias", "norm.weight"],
)
def test_damaged_weights_are_named_and_no_file_is_left(random_model, tmp_path, kind, name, bad):
    """Rounded to int8, NaN looks like any other number: it must be said while it is still one."""
    model = random_model(tiny()).requires_grad_(False)
    model.get_parameter(name)[3] = bad
    write_slim(model, tmp_path / "m", ranks=2)
    for quantize in (
        lambda: convert_to_quantized(tmp_path / "m", tmp_path / "i", QUANTIZED[kind]),
        lambda: create_model(tmp_path / "m", dtype=kind),
    ):
        with pytest.raises(CheckpointError, match=f"^{name}:? .*holds NaN or infinity"):
            quantize()
    assert find_quantized(tmp_path / "i") is None


def test_a_tied_model_has_one_embedding_and_no_output_matrix_and_keeps_its_other_rules(random_model, tmp_path, kind):
    scaling = RopeScaling("linear", 2.0)
    model = random_model(
        dataclasses.replace(tiny(), tie_word_embeddings=True, attention_bias=False, rope_scaling=scaling)
    )
    loaded = create_model(write_quantized(ModelCheckpoint(model), tmp_path / "tied", dtype=QUANTIZED[kind]))
    assert loaded.final_linear.weight is loaded.word_embeddings.weight and loaded.config == model.config
    ids = torch.arange(2, 60)[None]
    assert (loaded(ids) - model(ids)).abs().mean() < {"int8": 0.05, "int4": 0.3}[kind] * model(ids).std()


def test_a_stream_of_wrapped_shards_is_the_model_without_its_value_head(random_model, tmp_path, kind):
    """`download --to int8` reads what `create_model` reads: the names of a training script, a head beside the model."""
    model = random_model(BASE).half()
    write_huggingface(model, tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    wrapped = {f"module.{key}": tensor for key, tensor in tensors.items()} | {"v_head.summary.bias": torch.ones(1)}
    save_file(wrapped, tmp_path / "shard.safetensors")
    stream = QuantizedStream(tmp_path, BASE, torch.float16, QUANTIZED[kind])
    stream.check_complete("the index", wrapped)
    stream.add(tmp_path / "shard.safetensors")
    stream.finish(tmp_path / "streamed")
    expected = write_quantized(ModelCheckpoint(model), tmp_path / "expected", dtype=QUANTIZED[kind]).read_bytes()
    assert (tmp_path / "streamed").read_bytes() == expected


def test_rounded_weights_are_no_source(folder, kind, tmp_path, capsys):
    for target in ("slim", "huggingface", "gguf", "int8", "int4"):
        assert main(["convert", str(folder), str(tmp_path / "out"), "--to", target]) == 2
        assert f"{kind} weights, which can be run but not converted" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=f"the model in memory: {kind} weights"):
        write_quantized(ModelCheckpoint(create_model(folder, device="cpu")), tmp_path / "again")
    for other in {"float16", *QUANTIZED} - {kind}:
        with pytest.raises(ValueError, match=f"dtype must be auto or {kind}"):
            create_model(folder, dtype=other)


def test_the_commands_write_run_and_describe_it(tmp_path, capsys, folder, kind):
    """Converted twice, it is the same file byte by byte."""
    out = tmp_path / "out"
    assert main(["convert", str(SHIPPED_MODEL), str(out), "--to", kind]) == 0
    assert find_quantized(out).read_bytes() == find_quantized(folder).read_bytes()
    assert main(["generate", "Once upon a time", "--model", str(out), "--tokens", "5"]) == 0
    written = capsys.readouterr()
    assert written.out.splitlines()[-1].startswith("Once upon a time") and f" {kind}, cpu" in written.err
    assert main(["info", str(out)]) == 0
    assert f"{kind}, from float16" in capsys.readouterr().out


def test_rows_that_do_not_divide_into_groups_are_named(random_model, tmp_path):
    model = ModelCheckpoint(random_model(dataclasses.replace(tiny(), intermediate_size=720)))
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.dense_4h_to_h.weight: .*in a multiple of 32.*192, 720"):
        write_quantized(model, tmp_path, dtype=QUANTIZED["int4"])
    assert [need.precision for need in needs(model.config, 9)] == ["float32", "float16", "int8"]
    with pytest.raises(CheckpointError, match=r"give a folder or a name that ends in \.int4\.safetensors"):
        write_quantized(model, tmp_path / "a.int8.safetensors", dtype=QUANTIZED["int4"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [0, 4, 8, 500, -1])
def test_a_truncated_file_is_named(folder, tmp_path, length):
    raw = find_quantized(folder).read_bytes()
    short = tmp_path / "short.int8.safetensors"
    short.write_bytes(raw[:length])
    with pytest.raises(CheckpointError, match=r"short\.int8\.safetensors: truncated, damaged"):
        create_model(short)


@pytest.mark.parametrize("at", [0, 5, 9, 100])
def test_a_damaged_header_is_named(folder, tmp_path, at):
    raw = bytearray((find_quantized(folder)).read_bytes())
    raw[at : at + 3] = b"\xff\xff\xff"
    damaged = tmp_path / "damaged.int8.safetensors"
    damaged.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"damaged\.int8\.safetensors"):
        create_model(damaged)


OTHER = {"neox_lib int8": "neox_lib int4", "neox_lib int4": "neox_lib int8"}


def set_metadata(**entries: str):
    return lambda header: header["__metadata__"].update(entries)


def lie(**fields):
    def change(header):
        config = json.loads(header["__metadata__"]["config"]) | fields
        header["__metadata__"]["config"] = json.dumps(config)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_metadata(version="2"), "version 2, expected 1; convert the checkpoint again"),
        (set_metadata(format="other"), "not a quantized file of this library"),
        (lambda header: header.pop("__metadata__"), "not a quantized file of this library"),
        (set_metadata(config="{}}"), "damaged metadata"),
        (set_metadata(config='{"hidden_size": "wide"}'), "damaged metadata"),
        (set_metadata(source_dtype="float8"), "damaged metadata"),
        (set_metadata(config="[" * 100_000), "damaged metadata"),
        (set_metadata(source_dtype="bfloat16"), "word_embeddings.weight is torch.float16"),
        (
            lie(intermediate_size=384),
            r"dense_h_to_4h.weight is torch.u?int8 .768, [\d, ]*., the config in the file expects",
        ),
        (
            lambda header: header["__metadata__"].update(format=OTHER[header["__metadata__"]["format"]]),
            r"weight is torch.u?int8 .*, the config in the file expects torch.u?int8",
        ),
        (lie(num_hidden_layers=7), "layers.6.input_layernorm.weight is nothing"),
        (lie(num_hidden_layers=5), "layers.5.attention.dense.bias is torch.float32 .192., .* expects nothing"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused_in_one_line(folder, tmp_path, change, said):
    file = edited(find_quantized(folder), tmp_path / "edited.int8.safetensors", change)
    with pytest.raises(CheckpointError, match=said) as error:
        create_model(file)
    assert "edited.int8.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_cannot_be_an_int8_model_says_what_was_expected(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.int8.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a\.int8\.safetensors, b\.int8\.safetensors; give the path of one"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="give a folder or a name that ends in"):
        write_quantized(open_checkpoint(SHIPPED_MODEL), tmp_path / "notes.txt")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_in_the_middle_leaves_the_old_file_whole(folder, tmp_path, monkeypatch, error):
    file = write_quantized(open_checkpoint(SHIPPED_MODEL), tmp_path)
    before = file.read_bytes()

    def stop(tensors, dtype, embedding=None):
        for number, item in enumerate(quantized(tensors, dtype, embedding)):
            if number == 20:
                raise error
            yield item

    monkeypatch.setattr(quantized_file, "quantized", stop)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as raised:
        write_quantized(open_checkpoint(SHIPPED_MODEL), tmp_path)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file.name]
    if isinstance(error, OSError):
        assert "No space left on device" in str(raised.value)


@ON_LINUX
def test_a_disk_that_is_full_refuses_for_real(tmp_path):
    """Not a pretended error: a limit on the size of files, which the system holds to in the middle of writing."""
    code = (
        "import resource, signal, sys; from neox_lib.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2)\n"
        "sys.exit(main(['convert', sys.argv[1], sys.argv[2], '--to', 'int8']))"
    )
    target = tmp_path / "full"
    command = [sys.executable, "-c", code, str(SHIPPED_MODEL), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "could not be written (File too large)" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not target.exists()


def test_a_disk_without_room_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("neox_lib.checkpoints.files.free_bytes", lambda folder: 1_000_000)
    monkeypatch.setattr(quantized_file, "quantize", lambda *arguments: pytest.fail("read weights that have no room"))
    with pytest.raises(CheckpointError, match=r"need 0\.00 GB and the disk has 0\.00 GB free"):
        write_quantized(open_checkpoint(SHIPPED_MODEL), tmp_path / "out")


def test_a_tensor_that_is_not_as_announced_leaves_no_file(tmp_path):
    specs = {"a": (torch.int8, (2, 3)), "b": (torch.float32, (2,))}
    a, b = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2)
    wrong = [
        ([("a", a)], "b: announced, but never came"),
        ([("a", a), ("b", b), ("b", b)], "b: came twice"),
        ([("a", a.float()), ("b", b)], "a: is torch.float32"),
        ([("a", a.T), ("b", b)], r"a: is torch.int8 \[3, 2\], announced as torch.int8 \[2, 3\]"),
    ]
    for tensors, said in wrong:
        with pytest.raises(CheckpointError, match=said):
            write_safetensors(tmp_path / "x.safetensors", specs, tensors)
    assert not list(tmp_path.iterdir())


def test_any_order_of_tensors_and_odd_sizes_make_the_same_file(tmp_path):
    """Views, transposed tensors and sizes that no alignment divides come out as they are."""
    tensors = {
        "odd": torch.arange(7, dtype=torch.int8),
        "turned": torch.arange(6.0).view(2, 3).T,
        "half": torch.tensor([1.5, -2.0, 3.0]).bfloat16(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3.0),
        "view": torch.arange(10, dtype=torch.float16)[3:6],
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", specs, tensors.items(), {"k": "é"})
    write_safetensors(tmp_path / "b.safetensors", specs, reversed(tensors.items()), {"k": "é"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"k": "é"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype
    with pytest.raises(ValueError, match=r"z is torch\.complex64"):
        lay_out({"z": (torch.complex64, (1,))}, {})


def test_a_loaded_file_can_be_replaced_and_is_let_go(folder, tmp_path, random_model):
    """The model in use keeps its old weights; once it is gone nothing is mapped any more."""
    file = write_quantized(open_checkpoint(SHIPPED_MODEL), tmp_path)
    model, ids = create_model(file, device="cpu"), torch.arange(2, 40)[None]
    before = model(ids)
    write_quantized(ModelCheckpoint(random_model(tiny())), tmp_path)
    assert torch.equal(model(ids), before)
    assert not torch.allclose(create_model(file, device="cpu")(ids), before)
    del model
    mapped = [region.path for region in psutil.Process().memory_maps() if region.path.startswith(str(tmp_path))]
    assert not mapped


def test_what_is_written_into_a_loaded_model_never_reaches_the_file(folder):
    before = (find_quantized(folder)).read_bytes()
    with torch.no_grad():
        create_model(folder, device="cpu").layers[0].attention.dense.weight.zero_()
    assert (find_quantized(folder)).read_bytes() == before


LOAD = """
import re, sys, torch
from neox_lib import create_model
model = create_model(sys.argv[1], device='cpu')
with torch.inference_mode():
    model(torch.arange(64)[None])
text = open("/proc/self/smaps").read()
parts = re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", text)
sizes = {key: sum(int(re.search(rf"^{key}:\\s+(\\d+)", part, re.M)[1]) for part in parts if "int8.safetensors" in part)
         for key in ("Rss", "Pss", "Private_Dirty")}
print(sizes["Rss"], sizes["Pss"], sizes["Private_Dirty"], flush=True)
sys.stdin.read()
"""


@ON_LINUX
def test_two_processes_share_the_pages_of_one_file(tmp_path):
    """A page server with a kernel a visitor keeps one copy of the weights, and none is copied on the way."""
    config = NeoXConfig(
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=1024,
        tokenizer_vocab_size=1000,
    )
    from neox_lib.bench.random_checkpoint import random_tensors, write_random

    assert next(random_tensors(config))[0] == "word_embeddings.weight"
    write_random(tmp_path / "slim", config)
    file = write_quantized(open_checkpoint(tmp_path / "slim"), tmp_path / "int8")
    command = [sys.executable, "-c", LOAD, str(file)]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
    }
    processes, found = [], []
    try:
        for _ in range(2):
            processes.append(subprocess.Popen(command, **pipes))
            found.append([1024 * int(number) for number in processes[-1].stdout.readline().split()])
    finally:
        for process in processes:
            process.communicate(timeout=60)
    (rss, _, dirty), (second_rss, second_pss, second_dirty) = found
    assert rss > 0.9 * file.stat().st_size and second_rss > 0.9 * file.stat().st_size
    assert second_pss < 0.6 * second_rss, "the second process has pages of its own"
    assert dirty == second_dirty == 0, "weights were copied"


def test_reading_ahead_reads_the_file_to_its_end_and_ends(folder, monkeypatch):
    thread = read_ahead(find_quantized(folder))
    if thread is not None:
        thread.join(timeout=30)
        assert not thread.is_alive()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert read_ahead(find_quantized(folder)) is None


def test_quantizing_lets_go_of_each_tensor_before_the_next_one_comes(kind):
    """Nothing but the tensor in hand is alive, whatever the size of the model."""
    import weakref

    made: list[weakref.ref] = []

    def one_by_one():
        for name, shape in parameter_shapes(tiny()).items():
            assert not any(earlier() is not None for earlier in made), f"the one before {name} is still held"
            tensor = torch.ones(shape)
            made.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    names = []
    for name, tensor in quantized(one_by_one(), QUANTIZED[kind]):
        names.append(name)
        del tensor
    assert names == list(quantized_specs(tiny(), QUANTIZED[kind]))


def test_specs_describe_a_model_that_runs(kind):
    """Specs and the model come from one place: what the specs announce, a model of that config consists of."""
    config = NeoXConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256)
    specs = quantized_specs(config, QUANTIZED[kind])
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}
    model = fill_model(empty_quantized_model(config, QUANTIZED[kind]), tensors.items())
    assert {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()} == specs
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 50432)
    assert json.loads(quantized_metadata(config, QUANTIZED[kind])["config"])["hidden_size"] == 64
