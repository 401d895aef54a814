"""Measuring speed: our model in turns with the baselines, on the same random weights, and against the memory's
speed.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from neox_lib.bench.baselines import (
    BASELINES,
    ctranslate2_logits,
    ctranslate2_twin,
    hugging_face_generate,
    hugging_face_twin,
    is_installed,
    make_baseline,
)
from neox_lib.bench.candidates import OURS, Generate, our_generate, our_model, random_model
from neox_lib.bench.table import LoadRow, Row, Timing
from neox_lib.cache import KVCache
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.config import preset
from neox_lib.loading import create_model
from neox_lib.model import NeoXModel

Side = tuple[str, str]  # a baseline's name, "" for ours, and its dtype


def memory_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second at which this machine reads uncached memory: the best of several sums over a buffer."""
    buffer = torch.ones(megabytes * 2**18)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


def time_answer(generate: Generate, ids: Tensor, new_tokens: int) -> Timing:
    """Time two generations, of 1 and of `new_tokens` tokens. Raises RuntimeError if one is shorter than asked for."""
    seconds = []
    for asked in (1, new_tokens):
        started = time.perf_counter()
        written = generate(ids, asked)
        seconds.append(time.perf_counter() - started)
        if len(written) != asked:
            raise RuntimeError(f"{len(written)} tokens came instead of {asked}: the speeds would be wrong")
    return Timing(seconds[0], seconds[1], new_tokens)


BUSY = 0.05  # of the machine's time: with less in others' hands, a round counts
TRIES = 5  # of a round on a busy machine


def times_of_others() -> tuple[float, float]:
    """Seconds of all processors since the machine started: spent by others than this process or stolen from the
    machine, and altogether.
    """
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # in user and nice too
    return everything - idle - own.user - own.system, everything


def measure_round(sides: dict[Side, Generate], ids: Tensor, new_tokens: int) -> tuple[dict[Side, Timing], float]:
    """Each side's answer, in turns, and the share of the machine's time that others took meanwhile. A round with more
    than BUSY of it is measured again, TRIES times at most; the quietest counts.
    """
    rounds = []
    for _ in range(TRIES):
        others, everything = times_of_others()
        timings = {key: time_answer(generate, ids, new_tokens) for key, generate in sides.items()}
        others, everything = (
            after - before for after, before in zip(times_of_others(), (others, everything), strict=True)
        )
        rounds.append((timings, max(0.0, others / everything) if everything else 0.0))
        if rounds[-1][1] <= BUSY:
            break
    return min(rounds, key=lambda found: found[1])


def bytes_per_token(model: NeoXModel, prompt: int, new_tokens: int) -> float:
    """Bytes that a decode step must read, half-way through the answer: the weights, one row of the embedding, the
    cache.
    """
    embedding, config = model.word_embeddings.weight, model.config
    tied = config.tie_word_embeddings
    weights = sum(tensor.nbytes for tensor in model.parameters() if tied or tensor is not embedding)
    return weights + config.kv_cache_bytes(prompt + new_tokens // 2, model.norm.weight.dtype)


def choose_baselines(names: list[str]) -> list[str]:
    """Those of the named libraries that are installed. Raises ValueError for an unknown one."""
    unknown = set(names) - set(BASELINES)
    if unknown:
        raise ValueError(f"bench measures against {', '.join(BASELINES)}, not {', '.join(sorted(unknown))}")
    return [name for name in names if is_installed(name)]


def run_bench(
    shapes: list[str],
    dtypes: list[str],
    prompts: list[int],
    new_tokens: int = 65,
    rounds: int = 3,
    against: Sequence[str] = tuple(BASELINES),
) -> Iterator[Row]:
    """Yields a Row as soon as it is measured: each shape, prompt length and dtype, ours in turns with each baseline.

    Raises ValueError for an unknown shape, dtype or baseline.
    """
    unknown = set(dtypes) - set(OURS)
    if unknown:
        raise ValueError(f"bench knows the dtypes {', '.join(OURS)}, not {', '.join(sorted(unknown))}")
    if new_tokens < 2 or rounds < 1:
        raise ValueError(f"bench needs at least 2 new tokens and 1 round, got {new_tokens} and {rounds}")
    baselines = choose_baselines(list(against))
    for shape in shapes:
        model = random_model(preset(shape))
        ours = {dtype: our_model(model, dtype) for dtype in dtypes}
        sides = {("", dtype): our_generate(ours[dtype]) for dtype in dtypes}
        wanted = [
            (baseline, BASELINES[baseline][dtype])
            for baseline in baselines
            for dtype in dtypes
            if dtype in BASELINES[baseline]
        ]
        sides |= {(baseline, dtype): make_baseline(baseline, model, dtype) for baseline, dtype in dict.fromkeys(wanted)}
        for prompt in prompts:
            ids = torch.randint(model.config.tokenizer_vocab_size, (1, prompt))
            timings: dict[Side, list[Timing]] = {key: [] for key in sides}
            busy = []
            for generate in sides.values():
                generate(ids[:, :8], 2)  # warm-up
            for _ in range(rounds):
                found, share = measure_round(sides, ids, new_tokens)
                busy.append(share)
                for key, timing in found.items():
                    timings[key].append(timing)
            for dtype in dtypes:
                read = bytes_per_token(ours[dtype], prompt, new_tokens)
                for baseline in [name for name in baselines if dtype in BASELINES[name]] or [""]:
                    theirs = timings[baseline, BASELINES[baseline][dtype]] if baseline else []
                    yield Row(shape, prompt, dtype, baseline, timings["", dtype], theirs, read, max(busy))


def time_load(shape: str, rounds: int = 3) -> LoadRow:
    """Load fp16 weights from a temporary folder and write one token, which reads every weight that was loaded lazily.

    Ours from a slim folder of one rank, theirs from safetensors; in turns, with the files in the page cache.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64)
    model = random_model(preset(shape)).half()
    loaders: dict[str, Callable[[], Generate]] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        slim, safetensors = Path(temporary, "slim"), Path(temporary, "safetensors")
        write_slim(model, slim, ranks=1)
        loaders["ours"] = lambda: our_generate(create_model(slim, device="cpu", dtype="float16"))
        if is_installed("transformers"):
            from transformers import GPTNeoXForCausalLM, logging

            logging.disable_progress_bar()
            hugging_face_twin(model, torch.float16).save_pretrained(safetensors)
            read = {"dtype": torch.float16, "local_files_only": True}
            loaders["theirs"] = lambda: hugging_face_generate(GPTNeoXForCausalLM.from_pretrained(safetensors, **read))
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(rounds + 1):
            for side, load in loaders.items():
                started = time.perf_counter()
                load()(ids, 1)
                if number > 0:  # the first round fills the page cache
                    seconds[side].append(time.perf_counter() - started)
    return LoadRow(shape, seconds["ours"], seconds["theirs"])


def format_errors(shape: str, with_ctranslate2: bool, tokens: int = 128) -> str:
    """How far int8 moves the logits of random weights from those of fp32, ours and CTranslate2's: mean and worst."""
    model = random_model(preset(shape))
    ids = torch.randint(model.config.tokenizer_vocab_size, (1, min(tokens, model.config.max_position_embeddings)))
    with torch.inference_mode():
        exact = model(ids)[0]
        cache = KVCache(model.config, 1, ids.shape[1], ids.device, torch.float32)
        ours = our_model(model, "int8")(ids, cache)[0]  # a cache, since without one no loop runs
    sides = {"ours": ours}
    if with_ctranslate2:
        sides["ctranslate2"] = ctranslate2_logits(ctranslate2_twin(model, "int8"), ids)
    errors = {name: (logits - exact).abs() / exact.std() for name, logits in sides.items()}
    found = ", ".join(f"{name} {each.mean():.4f} and {each.max():.3f}" for name, each in errors.items())
    return f"{shape}, int8 logits off by (mean and worst, in standard deviations of the logits): {found}"
