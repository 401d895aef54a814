"""Loading a model of a billion parameters must not need the memory of two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from neox_lib.config import pythia
from neox_lib.layout import layer_file_name, parameter_shapes, place_of
from neox_lib.sharding import shard_shape

CONFIG = pythia("1b")
RANKS = 2

# Private memory is what no file backs: RssAnon and RssShmem. Pages of a mapped file are the system's to drop.
LOAD = """
import json, re, sys, threading, time
from neox_lib.checkpoint import load_slim

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
start = time.perf_counter()
model = load_slim(sys.argv[1])
seconds = time.perf_counter() - start
done.set()
watcher.join()
sizes = [parameter.nbytes for parameter in model.parameters()]
mapped = "model_states.pt" in open("/proc/self/maps").read()
print(json.dumps({"peak": peak, "model": sum(sizes), "largest": max(sizes), "seconds": seconds, "mapped": mapped}))
"""


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from /proc")
@pytest.mark.skipif(psutil.virtual_memory().available < 4e9, reason="needs 4 GB of free memory")
def test_loading_needs_the_model_and_one_tensor(tmp_path):
    """20B fits into 40 GB only when nothing is held twice: at most the model, its largest tensor and 0.4 GB, of which
    torch itself takes 0.15; and no file stays mapped."""
    write_large(tmp_path)
    result = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["model"] == CONFIG.weight_bytes(torch.float16) > 2e9
    assert found["model"] < found["peak"] <= found["model"] + found["largest"] + 0.4e9, found
    assert not found["mapped"], "the files are still mapped after loading"
    print(f"{found['model'] / found['seconds'] / 1e6:.0f} MB/s")
