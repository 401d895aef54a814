"""Weights files: opened without trust, written whole or not at all."""

import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from neox_lib.checkpoints import files
from neox_lib.checkpoints.atomic import write_atomically, write_text_atomically
from neox_lib.checkpoints.files import (
    CheckpointError,
    check_free_disk,
    check_tensors,
    open_tensors,
    read_object,
    save_tensors,
)
from neox_lib.checkpoints.tensor_files import describe_file
from neox_lib.checkpoints.tokenizer_files import open_tokenizer


def a_file(path: Path, zip_format: bool = True) -> dict[str, torch.Tensor]:
    tensors = {"a.weight": torch.randn(50, 30), "a.bias": torch.randn(50).half(), "b.weight": torch.randn(5).bfloat16()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zip_format)
    return tensors


class RunsCode:
    """What a hostile file holds: an object whose unpickling calls `os.mkdir`."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


# Opening


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "before zip"])
def test_both_formats_give_the_tensors(tmp_path, zip_format):
    """Files of old torch, which can't be memory-mapped, must still open: early releases are such files."""
    saved = a_file(tmp_path / "x.pt", zip_format)
    opened = open_tensors(tmp_path / "x.pt")
    assert opened.keys() == saved.keys()
    for key, tensor in saved.items():
        assert opened[key].dtype == tensor.dtype and torch.equal(opened[key], tensor)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_a_zip_file_is_mapped_and_let_go(tmp_path):
    """Mapped weights cost no private memory, and the mapping must end with the tensors or 20B stays mapped for ever."""
    a_file(tmp_path / "mapped.pt")
    opened = open_tensors(tmp_path / "mapped.pt")
    assert "mapped.pt" in Path("/proc/self/maps").read_text()
    del opened
    assert "mapped.pt" not in Path("/proc/self/maps").read_text()


def test_a_module_state_opens(tmp_path):
    """gpt-neox saves `state_dict()`s: an OrderedDict with metadata on it, and parameters inside."""
    module = nn.Linear(3, 4)
    state = OrderedDict(module.state_dict(keep_vars=True))
    state._metadata = module.state_dict()._metadata  # pyright: ignore
    torch.save(state, tmp_path / "x.pt")
    opened = open_tensors(tmp_path / "x.pt")
    assert torch.equal(opened["weight"], module.weight) and not opened["weight"].requires_grad


def test_a_file_of_deepspeed_opens(tmp_path):
    """It holds the state of a run too, the random numbers of NumPy among it, which would be refused as code."""
    state = {"np_rng_state": np.random.RandomState(0).get_state(), "dp_world_size": 1, "optimizer": None}
    torch.save(state | {"module": {"a": torch.ones(2)}}, tmp_path / "x.pt")
    assert open_tensors(tmp_path / "x.pt")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "open_file"),
    [
        ("x.pt", open_tensors),
        ("x.bin", open_tensors),
        ("x.safetensors", describe_file),
        ("x.json", open_tokenizer),
        ("config.json", read_object),
    ],
)
def test_what_git_leaves_of_a_large_file_is_called_a_pointer(tmp_path, name, open_file):
    """Without Git LFS a clone has three lines for each file of weights; "damaged" sends people to fetch these again."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer.*git lfs pull") as error:
        open_file(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def truncated(path: Path) -> None:
    a_file(path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_in_half(path: Path) -> None:
    a_file(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def old_format_truncated(path: Path) -> None:
    a_file(path, zip_format=False)
    path.write_bytes(path.read_bytes()[:-200])


def zip_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def not_by_name(path: Path) -> None:
    torch.save([torch.ones(2)], path)


def not_tensors(path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 7}, path)


def holding(make):
    """A file whose tensor `make()` gives."""
    return lambda path: torch.save({"a": make()}, path)


def a_loss_scaler(path: Path) -> None:
    """DeepSpeed's, as a run in fp16 leaves it in an mp_rank file; nobody has DeepSpeed here."""
    path.write_bytes(b"\x80\x02}U\x06modulecdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81s.")


# what is at the path: (how it gets there, what the error must say)
BAD_FILES = {
    "missing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "empty": (lambda path: path.touch(), "empty"),
    "truncated": (truncated, "truncated"),
    "cut in half": (cut_in_half, "truncated"),
    "old format truncated": (old_format_truncated, "truncated"),
    "text": (lambda path: path.write_text("<html>404 not found</html>"), "expected"),
    "another zip": (zip_of_something_else, "expected"),
    "a pipeline's rank": (lambda path: torch.save({"module": None, "iteration": 3}, path), "holds no weights"),
    "a list": (not_by_name, "something other than tensors"),
    "numbers among the tensors": (not_tensors, "something other than tensors"),
    "sparse": (holding(lambda: torch.zeros(50).to_sparse()), "a is torch.sparse_coo on cpu"),
    "without content": (holding(lambda: torch.zeros(50, device="meta")), "a is torch.strided on meta"),
    "nested": pytest.param(
        holding(lambda: torch.nested.nested_tensor([torch.zeros(2)])),
        "a is nested on cpu",
        marks=pytest.mark.filterwarnings("ignore:The PyTorch API of nested"),
    ),
    "a loss scaler": (a_loss_scaler, "its deepspeed.runtime.fp16.loss_scaler.LossScaler runs code; .*`module`"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path, make, message):
    """Whatever is wrong with a file, the learner reads its name and what was expected, not a traceback of torch."""
    path = tmp_path / "layer_07.pt"
    make(path)
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(path)
    assert str(path) in str(error.value) and "expected" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


# what is at the path of a small JSON file: (how it gets there, what the error must say)
BAD_OBJECTS = {
    "missing": (lambda path: None, "missing; fetch it again"),
    "a folder": (lambda path: path.mkdir(), "a folder or a device"),
    "a pipe": pytest.param(
        a_pipe, "a folder or a device", marks=pytest.mark.skipif(os.name == "nt", reason="no pipes")
    ),
    "a list": (lambda path: path.write_text("[]"), "expected an object, found list"),
    "without an end": (lambda path: path.write_text('{"a":' * 100_000), "recursion"),
    "with a mark": (lambda path: path.write_bytes(b"\xef\xbb\xbf{}"), "Unexpected UTF-8 BOM"),  # so says transformers
    "in UTF-16": (lambda path: path.write_text("{}", "utf-16"), "utf-8"),
}


@pytest.mark.parametrize(("make", "message"), BAD_OBJECTS.values(), ids=BAD_OBJECTS)
def test_a_small_file_that_is_no_object_is_named(tmp_path, make, message):
    """Config, index and their like; a pipe would hang, and a million brackets end in a traceback."""
    make(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}") as error:
        read_object(tmp_path / "config.json")
    assert len(str(error.value).splitlines()) == 1


def test_attributes_of_a_tensor_change_nothing(tmp_path):
    """torch keeps what was set on a parameter, under any name, and a file can say so."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.detach = 3  # type: ignore[assignment]
    torch.save({"a": parameter}, tmp_path / "x.pt")
    assert open_tensors(tmp_path / "x.pt")["a"].tolist() == [1, 1]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    a_file(tmp_path / "x.pt")
    (tmp_path / "x.pt").chmod(0)
    with pytest.raises(CheckpointError, match=r"x\.pt.*unreadable"):
        open_tensors(tmp_path / "x.pt")


def test_a_read_error_is_named(tmp_path, monkeypatch):
    """A disk that fails in the middle is told like any other bad file."""
    a_file(tmp_path / "x.pt")

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"x\.pt.*Input/output error"):
        open_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("how", ["zip", "before zip", "bare pickle"])
def test_a_hostile_file_runs_nothing(tmp_path, how):
    """A checkpoint from the internet must not be able to run code on the learner's machine."""
    path, trace = tmp_path / "hostile.pt", tmp_path / "ran"
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"a": RunsCode(trace)}, protocol=2))
    else:
        torch.save({"a": RunsCode(trace)}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"hostile\.pt.*refused"):
        open_tensors(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if how != "bare pickle" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the file was not hostile, so the test proved nothing"


# Checking

SHAPES = {"a.weight": (50, 30), "a.bias": (50,)}
GOOD = {"a.weight": torch.zeros(50, 30), "a.bias": torch.zeros(50)}
# name: (tensors, what the error must name besides the file)
WRONG_TENSORS = {
    "missing key": ({"a.weight": torch.zeros(50, 30)}, ["lacks a.bias", "found a.weight"]),
    "no keys": ({}, ["lacks a.weight", "found nothing"]),
    "unexpected key": (GOOD | {"c": torch.zeros(1)}, ["unexpected c", "expected a.bias, a.weight"]),
    "wrong shape": (GOOD | {"a.bias": torch.zeros(25)}, ["a.bias", "[25]", "expected [50]"]),
    "wrong rank of a tensor": (GOOD | {"a.bias": torch.zeros(50, 1)}, ["a.bias", "[50, 1]", "expected [50]"]),
    "integers": (GOOD | {"a.bias": torch.zeros(50, dtype=torch.int8)}, ["a.bias", "torch.int8", "float16"]),
    "doubles": (GOOD | {"a.bias": torch.zeros(50, dtype=torch.float64)}, ["a.bias", "torch.float64", "float16"]),
}


@pytest.mark.parametrize(("tensors", "parts"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors_are_named(tensors, parts):
    """File, key, expected and found are all in the message: enough to see which copy went wrong."""
    with pytest.raises(CheckpointError) as error:
        check_tensors(Path("layer_07.pt"), tensors, SHAPES)
    assert all(part in str(error.value) for part in ["layer_07.pt", *parts])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_right_tensors_pass(dtype):
    check_tensors(Path("x.pt"), {key: tensor.to(dtype) for key, tensor in GOOD.items()}, SHAPES)


# Disk and writing


def test_too_little_disk_is_said_with_the_numbers(tmp_path, monkeypatch):
    """Forty gigabytes that do not fit are told before the first is written, for a folder that is not there yet too."""
    monkeypatch.setattr(files, "free_bytes", lambda folder: 3_210_000_000)
    with pytest.raises(CheckpointError, match=r"41\.10 GB.*3\.21 GB free"):
        check_free_disk(tmp_path / "new" / "folder", 41_100_000_000)
    check_free_disk(tmp_path, 3_200_000_000)
    monkeypatch.undo()
    assert files.free_bytes(tmp_path / "new" / "folder") > 0


def test_a_full_disk_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    """torch reports a full disk as a RuntimeError; the old file stays and no half file is left beside it."""
    old = a_file(tmp_path / "x.pt")

    def fill_up(tensors, path):
        Path(path).write_bytes(b"half a file")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space")

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(CheckpointError, match=r"x\.pt.*no space"):
        save_tensors(tmp_path / "x.pt", {"a": torch.ones(3)})
    assert open_tensors(tmp_path / "x.pt").keys() == old.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_saved_slice_has_the_size_of_the_slice(tmp_path):
    """torch.save writes the whole storage behind a view: eight ranks would each hold the whole layer."""
    whole = torch.randn(100_000)
    save_tensors(tmp_path / "x.pt", {"a": whole[:1000], "b": whole.view(1000, 100)[:, :1]})
    assert (tmp_path / "x.pt").stat().st_size < 12_000
    assert torch.equal(open_tensors(tmp_path / "x.pt")["b"], whole.view(1000, 100)[:, :1])


def test_an_interrupted_write_leaves_the_old_text(tmp_path):
    """Ctrl-C in the middle: the old content or the new, never a part, and no litter."""
    path = tmp_path / "x.txt"
    write_text_atomically(path, "old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["x.txt"]


KILLED = """
import sys, time
from pathlib import Path
from neox_lib.checkpoints.atomic import write_atomically

def slowly(temporary):
    temporary.write_bytes(b"new, but only half of i")
    print("writing", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), slowly)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_write_leaves_the_old_text(tmp_path):
    """Not even SIGKILL, after which nothing can be cleaned up, puts half a file under the final name."""
    path = tmp_path / "x.txt"
    path.write_text("old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_text() == "old"
