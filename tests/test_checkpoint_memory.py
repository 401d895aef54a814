"""Loading a model of a billion parameters must not need the memory of two, nor converting it the memory of one."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.checkpoints.huggingface.config import huggingface_fields
from neox_lib.checkpoints.huggingface.layout import their_name
from neox_lib.checkpoints.safetensors_writer import lay_out
from neox_lib.checkpoints.slim.layout import layer_file_name, place_of
from neox_lib.checkpoints.slim.partition import shard_shape
from neox_lib.config import NeoXConfig, parameter_shapes, pythia

CONFIG = pythia("1b")
RANKS = 2

# Private memory is what no file backs: RssAnon and RssShmem. Pages of a mapped file are the system's to drop.
WATCH = """
import json, re, sys, threading, time
import torch
from neox_lib.checkpoints.build import build_model
from neox_lib.checkpoints.convert import convert_to_gguf, convert_to_huggingface, convert_to_slim
from neox_lib.checkpoints.opening import open_checkpoint

def private_bytes():
    status = open("/proc/self/status").read()
    return sum(int(re.search(name + r":\\s+(\\d+) kB", status)[1]) * 1024 for name in ("RssAnon", "RssShmem"))

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.003):
        peak = max(peak, private_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
before, start = private_bytes(), time.perf_counter()
result = {work}
seconds = time.perf_counter() - start
done.set()
watcher.join()
sizes = [parameter.nbytes for parameter in result.parameters()] if result else []
mapped = any(name in open("/proc/self/maps").read() for name in ("model_states.pt", ".safetensors", ".gguf"))
print(json.dumps({"peak": peak, "model": sum(sizes), "largest": max(sizes, default=0), "seconds": seconds,
                  "mapped": mapped, "before": before}))
"""
LOAD = "build_model(open_checkpoint(sys.argv[1]))"
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from /proc")


def watched(work: str, *paths: Path, first: str = "") -> dict:
    """What a process saw that did the work, an expression over these paths; before it was watched, it did `first`."""
    watch = WATCH.replace("{work}", work).replace("peak, done", f"{first}\npeak, done", 1)
    command = [sys.executable, "-c", watch, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def write_large(folder: Path) -> None:
    """A checkpoint of 2.02 GB that takes 0.26 GB of disk: blocks have one shape and so have ranks, so their files are
    links to one file each."""
    keys: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in parameter_shapes(CONFIG).items():
        index, key = place_of(name, CONFIG.num_hidden_layers)
        keys.setdefault(index, {})[key] = shard_shape(key, shape, RANKS)
    written: dict[str, Path] = {}
    for index, shapes in keys.items():
        for rank in range(RANKS):
            path = folder / layer_file_name(index, rank)
            if str(shapes) in written:
                os.link(written[str(shapes)], path)
            else:
                torch.save({key: torch.full(shape, 0.25, dtype=torch.float16) for key, shape in shapes.items()}, path)
                written[str(shapes)] = path
    (folder / "config.json").write_text(CONFIG.to_json())


def write_hollow_huggingface(folder: Path, config: NeoXConfig) -> None:
    """A safetensors file of that shape whose weights are all zero, which a file system keeps without their bytes."""
    specs = {their_name(name): (torch.float16, shape) for name, shape in parameter_shapes(config).items()}
    start, _, nbytes = lay_out(specs, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(nbytes)
    (folder / "config.json").write_text(json.dumps(huggingface_fields(config, torch.float16)))


@pytest.mark.slow
@needs_proc
@pytest.mark.skipif(psutil.virtual_memory().available < 4e9, reason="needs 4 GB of free memory")
@pytest.mark.parametrize("layout", ["slim", "huggingface"])
def test_loading_needs_the_model_and_one_tensor(tmp_path, layout):
    """20B fits into 40 GB only when nothing is held twice: at most the model, its largest tensor and 0.4 GB, of which
    torch itself takes 0.15; and no file stays mapped."""
    if layout == "slim":
        write_large(tmp_path)
    else:
        write_hollow_huggingface(tmp_path, CONFIG)
    found = watched(LOAD, tmp_path)
    assert found["model"] == CONFIG.weight_bytes(torch.float16) > 2e9
    assert found["model"] < found["peak"] <= found["model"] + found["largest"] + 0.4e9, found
    assert not found["mapped"], "the files are still mapped after loading"
    print(f"{found['model'] / found['seconds'] / 1e6:.0f} MB/s")


@pytest.mark.gpu
@needs_proc
def test_loading_onto_a_gpu_takes_one_tensor_of_the_hosts_memory(tmp_path):
    """A rented machine often has more memory on its GPU than beside it. 1 GiB is for torch and the driver."""
    write_large(tmp_path)
    found = watched(f"{LOAD[:-1]}, 'cuda')", tmp_path, first="torch.zeros(1, device='cuda')")
    assert found["model"] == CONFIG.weight_bytes(torch.float16)
    assert found["peak"] - found["before"] <= found["largest"] + 2**30, found


@pytest.mark.slow
@needs_proc
@pytest.mark.skipif(psutil.disk_usage(tempfile.gettempdir()).free < 4e9, reason="needs 4 GB of free disk")
def test_converting_holds_a_part_of_the_model_at_a_time(tmp_path):
    """Files of 41 GB are converted on machines that could never hold them: beside torch's 0.3 GB at most three copies
    of the largest tensor, far less than the model."""
    config = pythia("410m")
    for name in ("hollow", "slim", "back"):
        (tmp_path / name).mkdir()
    write_hollow_huggingface(tmp_path / "hollow", config)
    largest, whole = 2 * config.vocab_size * config.hidden_size, config.weight_bytes(torch.float16)
    to_slim = "convert_to_slim(sys.argv[1], sys.argv[2], ranks=2)"
    (tmp_path / "hollow" / "tokenizer.json").write_bytes((SHIPPED_MODEL / "tokenizer.json").read_bytes())
    to_gguf, to_huggingface = "convert_to_gguf(*sys.argv[1:]) and None", "convert_to_huggingface(*sys.argv[1:])"
    for work, *paths in (
        (to_slim, "hollow", "slim"),
        (to_gguf, "slim", "m.gguf"),
        (to_huggingface, "m.gguf", "back"),
    ):
        found = watched(work, *(tmp_path / name for name in paths))
        assert found["peak"] <= 0.3e9 + 3 * largest < 0.9 * whole, (work, found)
        print(f"{found['peak'] / 1e6:.0f} MB at most, {whole / found['seconds'] / 1e6:.0f} MB/s")
