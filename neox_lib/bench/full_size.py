"""A full-size model on this machine: write random weights, quantize, load and run them, and measure each phase.

`python -m neox_lib full-size all FOLDER` makes a checkpoint of 20B's shapes (41 GB), converts it to int8 (21 GB), loads
that from disk and from memory, and writes text. Each phase runs in its own process, so its peak memory is its own too.
Results are printed and kept in FOLDER/results.json.
"""

import ctypes
import json
import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

PROMPT, NEW_TOKENS = 8, 32
STARTED = time.perf_counter()


@dataclass(frozen=True)
class Rehearsal:
    """What the phases share. `folder` holds slim/, int8/ or int4/, and results.json; `long_prompt` is in tokens."""

    folder: Path
    shape: str = "neox_20b"
    long_prompt: int = 128
    delete_shards: bool = False
    dtype: str = "int8"

    def key(self, phase: str) -> str:
        """The name of a phase's results: those of int4 stand beside int8's."""
        return phase if self.dtype == "int8" or phase in ("machine", "write") else f"{phase} {self.dtype}"


def say(text: str) -> None:
    """Print a line of progress, with the seconds since this process started."""
    print(f"[{time.perf_counter() - STARTED:7.1f} s] {text}", file=sys.stderr, flush=True)


def peak_resident() -> int:
    """Peak resident memory of this process in bytes, pages of mapped files included."""
    try:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    except (OSError, IndexError):  # no Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def in_page_cache(path: Path) -> float:
    """The share of a file that is in the page cache; nan where the system can't tell. Reads nothing itself.

    Uses `mincore`: even a non-blocking read would make the system read ahead.
    """
    if not sys.platform.startswith("linux"):
        return float("nan")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        pages = bytearray(-(-len(mapping) // mmap.PAGESIZE))
        begin, found = ctypes.c_char.from_buffer(mapping), ctypes.c_char.from_buffer(pages)
        length, mincore = ctypes.c_size_t(len(mapping)), ctypes.CDLL(None).mincore
        failed = mincore(ctypes.byref(begin), length, ctypes.byref(found))
        del begin, found  # a mapping that something points into can't be closed
    return float("nan") if failed else sum(page & 1 for page in pages) / len(pages)


def drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache, so that the next load comes from disk. Does nothing where that is not
    supported.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def multiply_rate(rows: int, hidden: int) -> float:
    """Operations per second of fp32 products: `rows` rows by matrices too large for any cache; the best of several."""
    input, weight = torch.randn(rows, hidden), torch.randn(max(hidden, 2**25 // hidden), hidden)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        F.linear(input, weight)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * weight.numel() / min(seconds)


def measure_machine(rehearsal: Rehearsal) -> dict:
    """The machine's speed: reading memory, and fp32 products with as many rows as the prompts have."""
    from neox_lib.bench.measure import memory_bandwidth
    from neox_lib.bench.random_checkpoint import shape_named
    from neox_lib.bench.table import describe_machine

    bandwidth, hidden = memory_bandwidth(), shape_named(rehearsal.shape).hidden_size
    say(describe_machine(bandwidth))
    rates = {str(rows): multiply_rate(rows, hidden) for rows in (PROMPT, rehearsal.long_prompt)}
    return {"bandwidth": bandwidth, "flops": rates, "machine": describe_machine(bandwidth), "system": platform.system()}


def write(rehearsal: Rehearsal) -> dict:
    from neox_lib.bench.random_checkpoint import shape_named, write_random

    config = shape_named(rehearsal.shape)
    say(f"writing {config.parameter_count():,} random weights, {config.weight_bytes(torch.float16) / 1e9:.1f} GB")
    write_random(rehearsal.folder / "slim", config)
    return {"bytes": config.weight_bytes(torch.float16)}


def convert(rehearsal: Rehearsal) -> dict:
    from neox_lib.bench.random_checkpoint import ConsumedCheckpoint
    from neox_lib.checkpoints.quantized import write_quantized
    from neox_lib.checkpoints.slim.reader import SlimCheckpoint
    from neox_lib.quantization.linear import QUANTIZED

    slim, target, dtype = rehearsal.folder / "slim", rehearsal.folder / rehearsal.dtype, QUANTIZED[rehearsal.dtype]
    say(
        f"converting to {rehearsal.dtype}"
        + (", removing each layer's files once read" if rehearsal.delete_shards else "")
    )
    if rehearsal.delete_shards:
        checkpoint = ConsumedCheckpoint(slim)
        file = write_quantized(checkpoint, target, freed_meanwhile=checkpoint.nbytes // 2, dtype=dtype)
    else:
        file = write_quantized(SlimCheckpoint(slim), target, dtype=dtype)
    return {"bytes": file.stat().st_size}


def file_of(rehearsal: Rehearsal) -> Path:
    """The quantized file of an earlier phase."""
    from neox_lib.checkpoints.quantized import find_quantized

    folder = rehearsal.folder / rehearsal.dtype
    file = find_quantized(folder)
    if file is None:
        raise ValueError(f"{folder}: no {rehearsal.dtype} model there; run the phases write and convert first")
    return file


def load_and_write(rehearsal: Rehearsal, prompt: int, new_tokens: int) -> dict:
    """Load the quantized file and write some tokens; returns the seconds of the load, the first token and each later
    one.
    """
    from neox_lib.generation import stream_generate
    from neox_lib.loading import create_model
    from neox_lib.quantization.linear import QuantizedLinear

    file = file_of(rehearsal)
    cached, started = in_page_cache(file), time.perf_counter()
    model = create_model(file, device="cpu")
    linears = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    matrices = sum(each.in_features * each.out_features for each in linears)
    output = model.final_linear.weight.numel()  # only the last token needs the scores
    read = sum(p.nbytes for p in model.parameters()) - model.word_embeddings.weight.nbytes
    load = time.perf_counter() - started
    say(f"loaded in {load:.2f} s with {cached:.0%} of the file in memory; prompt of {prompt} tokens")
    ids = torch.randint(model.config.tokenizer_vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    steps = []
    for step in stream_generate(model, ids, new_tokens, stop_token_ids=()):
        steps.append(step)
        if len(steps) in (1, new_tokens):
            say(f"token {len(steps)} after {step.seconds:.2f} s")
    seconds = [step.seconds for step in steps]
    result = {"cached": cached, "load": load, "prefill": seconds[0], "load_and_first_token": load + seconds[0]}
    result |= {"prompt": prompt, "finite": all(abs(step.log_probability) < 1e9 for step in steps)}
    if new_tokens > 2:
        result["seconds_per_token"] = statistics.median(
            seconds[2:]
        )  # the second still touches pages for the first time
        result["seconds"] = seconds
    result["read_per_token"] = read
    result["flops"] = 2 * (prompt * (matrices - output) + output)
    return result


def run_cold(rehearsal: Rehearsal) -> dict:
    file = file_of(rehearsal)
    drop_from_page_cache(file)
    return load_and_write(rehearsal, PROMPT, 1)


def run_warm(rehearsal: Rehearsal) -> dict:
    return load_and_write(rehearsal, PROMPT, NEW_TOKENS)


def run_long(rehearsal: Rehearsal) -> dict:
    return load_and_write(rehearsal, rehearsal.long_prompt, 1)


PHASES = {
    "machine": measure_machine,
    "write": write,
    "convert": convert,
    "cold": run_cold,
    "warm": run_warm,
    "long": run_long,
}


def report(results: dict) -> list[str]:
    """The results, one per line; ratios compare with the machine's own speed, 1.0 being ideal."""
    lines = []
    for phase, found in results.items():
        if phase.split()[0] in ("write", "convert"):
            speed = f"{found['bytes'] / 1e9:.2f} GB in {found['seconds_in_all']:.0f} s"
            lines.append(f"{phase}: {speed}, peak memory {found['peak'] / 2**30:.2f} GiB")
    machine = results.get("machine")
    for phase, found in results.items():
        if phase.split()[0] in ("cold", "warm", "long"):
            line = f"{phase}: {found['cached']:.0%} of the file in memory, load {found['load']:.2f} s"
            line += f", first token of a {found['prompt']}-token prompt {found['prefill']:.2f} s"
            if machine and not phase.startswith("cold"):
                ideal = found["flops"] / machine["flops"][str(found["prompt"])]
                line += f" ({found['prefill'] / ideal:.2f} x its arithmetic, {ideal:.2f} s)"
            lines.append(f"{line}, together {found['load_and_first_token']:.2f} s")
            if "seconds_per_token" in found:
                line = f"{phase}: {found['seconds_per_token']:.3f} s per token"
                if machine:
                    ideal = found["read_per_token"] / machine["bandwidth"]
                    line += f", {found['seconds_per_token'] / ideal:.2f} x {found['read_per_token'] / 1e9:.2f} GB at "
                    line += f"{machine['bandwidth'] / 1e9:.1f} GB/s"
                lines.append(line)
            lines.append(f"{phase}: peak memory {found['peak'] / 2**30:.2f} GiB, logits finite: {found['finite']}")
    return lines


def add_result(folder: Path, phase: str, found: dict) -> dict:
    """Add a phase's result to FOLDER/results.json, and return all results."""
    path = folder / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    results[phase] = found
    path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return results


def run_all(rehearsal: Rehearsal) -> int:
    """Run every phase in its own process. Stops at the first that fails, and returns its exit code."""
    more = [f"--shape={rehearsal.shape}", f"--long-prompt={rehearsal.long_prompt}", f"--dtype={rehearsal.dtype}"]
    more += ["--delete-shards"] if rehearsal.delete_shards else []
    for phase in PHASES:
        command = [sys.executable, "-m", "neox_lib", "full-size", phase, str(rehearsal.folder), *more]
        code = subprocess.run(command).returncode
        if code:
            say(f"{phase} ended with exit code {code}")
            return code
    return 0


def run_phase(phase: str, rehearsal: Rehearsal) -> list[str]:
    """Run one phase in this process and store its measurements; returns its lines of the report."""
    rehearsal.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found = PHASES[phase](rehearsal)
    found |= {"seconds_in_all": time.perf_counter() - started, "peak": peak_resident()}
    say(f"{phase} done, peak memory {found['peak'] / 2**30:.2f} GiB")
    lines = report(add_result(rehearsal.folder, rehearsal.key(phase), found))
    return [line for line in lines if line.startswith(f"{rehearsal.key(phase)}:")]
