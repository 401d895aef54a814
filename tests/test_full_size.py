"""The 20B rehearsal, on a small shape: every phase that the full size goes through, and what it must refuse."""

import json
import sys

import pytest
import torch

from neox_lib import cli
from neox_lib.__main__ import main
from neox_lib.bench import full_size
from neox_lib.bench.full_size import PHASES, drop_from_page_cache, in_page_cache, peak_resident, report
from neox_lib.bench.random_checkpoint import SMALL, ConsumedCheckpoint, random_tensors, shape_named, write_random
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import write_quantized
from neox_lib.checkpoints.slim.layout import is_slim
from neox_lib.config import neox_20b
from neox_lib.loading import create_model
from neox_lib.quantization.linear import QUANTIZED
from tests.small_models import load


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    path = tmp_path_factory.mktemp("full_size") / "slim"
    write_random(path, SMALL)
    return path


def test_the_shapes_are_the_real_ones():
    assert shape_named("neox_20b") == neox_20b() and neox_20b().parameter_count() == 20_554_567_680
    middle = shape_named("middle")
    assert (middle.hidden_size, middle.intermediate_size, middle.num_hidden_layers) == (6144, 24576, 2)


def test_random_weights_behave_like_those_of_a_fresh_model(slim):
    """Spread 0.02, no two matrices or rows alike, finite logits: else the speed of infinities would be measured."""
    model = load(slim, dtype=torch.float32)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    for name, matrix in matrices.items():
        assert 0.015 < matrix.std() < 0.025 and matrix.mean().abs() < 0.002, name
        assert not torch.equal(matrix[0], matrix[1])
    first, second = model.layers[0].mlp.dense_h_to_4h.weight, model.layers[1].mlp.dense_h_to_4h.weight
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05
    assert model(torch.arange(100)[None]).isfinite().all()


def test_a_large_matrix_repeats_the_block_and_never_a_row():
    """A row of the output matrix must not be the row above it: the block's length is no multiple of a row's."""
    from neox_lib.bench.random_checkpoint import BLOCK_NUMBERS

    for width in (6144, 24576, 18432, 2048):
        assert BLOCK_NUMBERS % width


def test_the_same_command_writes_the_same_weights():
    first, second = (dict(random_tensors(SMALL)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_the_disk_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("neox_lib.checkpoints.files.free_bytes", lambda folder: 30e9)
    assert main(["full-size", "write", str(tmp_path / "big")]) == 2
    assert "need 41.52 GB and the disk has 30.00 GB free" in capsys.readouterr().err
    assert not (tmp_path / "big" / "slim").exists()


def test_shards_are_removed_as_they_are_converted(tmp_path):
    """The room of a layer comes back before the last layer is read; the int8 model is the one of the kept shards."""
    write_random(tmp_path / "kept", SMALL)
    write_random(tmp_path / "slim", SMALL)
    left, checkpoint = [], ConsumedCheckpoint(tmp_path / "slim")
    for name, _ in checkpoint.tensors():
        left.append((name, len(list((tmp_path / "slim").glob("layer_*")))))
    counts = [count for _, count in left]
    assert counts[0] == 6 and counts == sorted(counts, reverse=True) and counts[-1] == 1
    assert not list((tmp_path / "slim").iterdir()) and not is_slim(tmp_path / "slim")
    write_random(tmp_path / "again", SMALL)
    removed = write_quantized(ConsumedCheckpoint(tmp_path / "again"), tmp_path / "a", freed_meanwhile=1_000_000)
    kept = write_quantized(open_checkpoint(tmp_path / "kept"), tmp_path / "b")
    assert removed.read_bytes() == kept.read_bytes()


def test_room_that_comes_back_meanwhile_counts(slim, tmp_path, monkeypatch):
    needed = open_checkpoint(slim).nbytes // 2
    monkeypatch.setattr("neox_lib.checkpoints.files.free_bytes", lambda folder: needed // 2)
    with pytest.raises(CheckpointError, match="the disk has"):
        write_quantized(open_checkpoint(slim), tmp_path / "out")
    write_quantized(open_checkpoint(slim), tmp_path / "out", freed_meanwhile=needed)
    assert create_model(tmp_path / "out", device="cpu")(torch.arange(9)[None]).isfinite().all()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_all_phases_run_one_after_another(tmp_path, monkeypatch, capsys, kind):
    """Written, converted, loaded cold and warm, 32 tokens written: each measured, and kept in one file.

    In one process here; `all` starts one for each.
    """
    monkeypatch.setitem(PHASES, "machine", lambda _: {"bandwidth": 1e10, "flops": {"8": 1e9, "40": 1e9}})
    more = ["--shape", "small", "--long-prompt", "40", "--delete-shards", "--dtype", kind]
    for phase in PHASES:
        assert main(["full-size", phase, str(tmp_path), *more]) == 0
        assert capsys.readouterr().err.count("\n") >= 1, "a phase at full size takes minutes and must say so"
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert list(results) == [*PHASES][:2] + [phase if kind == "int8" else f"{phase} {kind}" for phase in [*PHASES][2:]]
    text = "\n".join(report(results))
    results = {key.split()[0]: found for key, found in results.items()}
    assert all(results[phase]["peak"] > 50e6 and results[phase]["seconds_in_all"] >= 0 for phase in PHASES)
    assert len(results["warm"]["seconds"]) == 32 and results["warm"]["finite"]
    assert results["long"]["prompt"] == 40 and results["cold"]["prompt"] == 8
    layers = 3 * (4 * 128 * 128 + 2 * 128 * 512)
    assert results["warm"]["flops"] == 2 * (8 * layers + 512 * 128)
    file = tmp_path / kind / f"model.{kind}.safetensors"
    assert results["convert"]["bytes"] == file.stat().st_size
    assert file.stat().st_size - 512 * 128 * 2 - 10_000 < results["warm"]["read_per_token"] < file.stat().st_size
    for said in ("convert", "cold", ": 0.00 GB", "x its arithmetic", "s per token", "at 10.0 GB/s", "peak memory"):
        assert said in text, said


def test_all_starts_a_process_for_each_phase_and_ends_with_the_first_that_fails(tmp_path, monkeypatch, capsys):
    started = []

    def run(command):
        started.append(command[4])
        assert command[:4] == [sys.executable, "-m", "neox_lib", "full-size"] and "--shape=small" in command
        return type("Done", (), {"returncode": 2 if command[4] == "convert" else 0})

    monkeypatch.setattr(full_size.subprocess, "run", run)
    assert main(["full-size", "all", str(tmp_path), "--shape", "small"]) == 2
    assert started == ["machine", "write", "convert"] and "convert ended with exit code 2" in capsys.readouterr().err


def test_the_command_knows_the_phases():
    """It names them without importing them: `--help` must not wait for torch."""
    assert tuple(PHASES) == cli.full_size.PHASES


def test_a_phase_out_of_turn_is_one_line(tmp_path, capsys):
    for phase in ("convert", "cold", "warm"):
        assert main(["full-size", phase, str(tmp_path), "--shape", "small"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("neox_lib: ") and str(tmp_path) in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the page cache is asked the way of Linux")
def test_the_page_cache_is_seen(tmp_path):
    """Cold means from the disk: a file just written is in memory, one that was dropped is not."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 2**22)
    assert in_page_cache(file) == 1
    drop_from_page_cache(file)
    assert in_page_cache(file) < 0.5


def test_peak_memory_counts_mapped_and_own_pages():
    before = peak_resident()
    numbers = torch.ones(before // 4 + 30_000_000)
    assert peak_resident() >= before + 100e6 and len(numbers)
