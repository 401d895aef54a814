"""The bench's results and how they are shown: rows of timings, ratios, a table."""

import contextlib
import platform
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from neox_lib.bench.baselines import BASELINES, PACKAGES, is_installed
from neox_lib.quantization.linear import QUANTIZED


@dataclass(frozen=True)
class Timing:
    """Seconds of one answer: `first` to its first token (the prefill), `whole` to the last of its `new_tokens`."""

    first: float
    whole: float
    new_tokens: int

    @property
    def per_token(self) -> float:
        """Seconds of one decode step: the difference of the long and the short generation."""
        return (self.whole - self.first) / (self.new_tokens - 1)


@dataclass(frozen=True)
class Row:
    """All rounds of one model shape, prompt length and dtype, against one baseline or, where there is none, alone."""

    shape: str
    prompt: int
    dtype: str
    baseline: str  # "transformers", "ctranslate2" or ""
    ours: list[Timing]
    theirs: list[Timing]
    bytes_per_token: float  # bytes that one of our decode steps reads: weights, keys and values
    busy: float = 0.0  # the largest share of the machine's time that others took in a round


@dataclass(frozen=True)
class LoadRow:
    """Seconds from a folder on disk to the first token, one per round."""

    shape: str
    ours: list[float]
    theirs: list[float]


def median(timings: list[Timing], of: str) -> float:
    return statistics.median(getattr(timing, of) for timing in timings)


def ratio(slow: list[Timing], fast: list[Timing], of: str) -> float:
    """How many times as long `slow` takes as `fast`: the median of the ratios of each round."""
    return statistics.median(getattr(a, of) / getattr(b, of) for a, b in zip(slow, fast, strict=True))


def describe_machine(bandwidth: float) -> str:
    """The machine, how busy it is, and the versions: processor, threads, memory speed, load, Python, libraries."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    versions = f"torch {torch.__version__}"
    versions += "".join(
        f", {library} {version(PACKAGES.get(library, library))}" for library in BASELINES if is_installed(library)
    )
    return (
        f"{processor}, {torch.get_num_threads()} threads, memory read at {bandwidth / 1e9:.1f} GB/s, load "
        f"{psutil.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {versions}"
    )


COLUMNS = f" {'ours':>8} {'theirs':>8} {'ratio':>6}"
HEADER = (
    f"{'':>38} {'prefill, ms':>24} {'decode, tokens/s':>24} {'whole answer, ms':>24}  memory\n"
    f"{'shape':>6} {'prompt':>6} {'dtype':<11} {'against':<12}{3 * COLUMNS}  share  busy"
)


def format_speed(seconds: float | None, of: str) -> str:
    """Milliseconds of a prefill or an answer, tokens per second of a decode step, "-" for a missing side."""
    if seconds is None:
        return f"{'-':>8}"
    if seconds <= 0:
        return f"{'noise':>8}"
    return f"{1 / seconds:>8.1f}" if of == "per_token" else f"{seconds * 1e3:>8.0f}"


def format_row(row: Row, bandwidth: float) -> str:
    """One line of the table: ours, theirs and the ratio, above 1 where ours is faster; "noise" where the difference of
    the long and the short generation came out negative, as it can on a busy machine.
    """
    cells = [f"{row.shape:>6} {row.prompt:>6} {row.dtype:<11} {row.baseline or '-':<12}"]
    for of in ("first", "per_token", "whole"):
        seconds = [median(side, of) if side else None for side in (row.ours, row.theirs)]
        cells += [format_speed(value, of) for value in seconds]
        comparable = row.theirs and all(value is not None and value > 0 for value in seconds)
        cells.append(f"{ratio(row.theirs, row.ours, of):>5.2f}x" if comparable else f"{'-':>6}")
    step = median(row.ours, "per_token")
    share = f" {row.bytes_per_token / step / bandwidth:>6.0%}" if step > 0 else f"{'-':>7}"
    return " ".join(cells) + share + f" {row.busy:>5.0%}"


def format_best(rows: list[Row]) -> str:
    """A line per shape, prompt and baseline: each side in its fastest dtype, int8 and int4 apart."""
    lines = []
    for shape, prompt, baseline in dict.fromkeys((row.shape, row.prompt, row.baseline) for row in rows if row.theirs):
        group = [row for row in rows if (row.shape, row.prompt, row.baseline) == (shape, prompt, baseline)]
        for kind in ("float", *QUANTIZED):
            found = [row for row in group if (row.dtype if row.dtype in QUANTIZED else "float") == kind]
            if found:
                best = [f"{what} {best_ratio(found, of)}" for of, what in MEASURES.items()]
                lines.append(f"{shape}, prompt {prompt}, {kind}, best dtypes, against {baseline}: {', '.join(best)}")
    return "\n".join(lines)


MEASURES = {"first": "prefill", "per_token": "decode", "whole": "whole answer"}


def best_ratio(rows: list[Row], of: str) -> str:
    """How many times faster our fastest dtype is than theirs, "noise" where a difference came out negative."""
    theirs, ours = (
        min(sides, key=lambda side: median(side, of))
        for sides in ([row.theirs for row in rows], [row.ours for row in rows])
    )
    return f"{ratio(theirs, ours, of):.2f}x" if min(median(theirs, of), median(ours, of)) > 0 else "noise"


def format_positions(rows: list[Row], new_tokens: int) -> str:
    """For rows that differ only in the prompt: milliseconds per token in the middle of the answer."""
    lines = []
    for shape, dtype, baseline in dict.fromkeys((row.shape, row.dtype, row.baseline) for row in rows):
        group = [row for row in rows if (row.shape, row.dtype, row.baseline) == (shape, dtype, baseline)]
        for side in ("ours", baseline) if baseline else ("ours",):
            steps = [median(row.ours if side == "ours" else row.theirs, "per_token") * 1e3 for row in group]
            places = ", ".join(
                f"{step:.1f} ms at {row.prompt + new_tokens // 2}" for row, step in zip(group, steps, strict=True)
            )
            lines.append(f"{shape}, {dtype}, {side}: a token takes {places}; {steps[-1] / steps[0]:.2f} times as long")
    return "\n".join(lines)


def format_load(row: LoadRow) -> str:
    ours = statistics.median(row.ours)
    line = f"{row.shape}, load fp16 from disk and write one token: ours {ours:.2f} s"
    if not row.theirs:
        return line
    faster = statistics.median(a / b for a, b in zip(row.theirs, row.ours, strict=True))
    return f"{line}, theirs {statistics.median(row.theirs):.2f} s, {faster:.2f}x"
