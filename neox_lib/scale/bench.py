"""How fast: our model against Hugging Face's on the same random weights, in turns, and against the machine's memory."""

import argparse
import contextlib
import io
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_lib.checkpoint import write_slim
from neox_lib.config import NeoXConfig, pythia, tiny
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.scale.linear import pack_half, use_fast_linear
from neox_lib.scale.loading import DTYPES, Precision, create_model

RIVALS = {"packed": "float16"}  # a dtype of ours alone, and which of theirs it is measured against
# generate(ids [1, T], new_tokens) -> token ids written
Generate = Callable[[Tensor, int], list[int]]


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
    """All rounds of one model shape, prompt length and dtype; `theirs` is empty without transformers."""

    shape: str
    prompt: int
    dtype: str
    ours: list[Timing]
    theirs: list[Timing]
    bytes_per_token: float  # what one decode step of ours has to read: weights, and keys and values


def median(timings: list[Timing], of: str) -> float:
    return statistics.median(getattr(timing, of) for timing in timings)


def ratio(slow: list[Timing], fast: list[Timing], of: str) -> float:
    """How many times the seconds of `fast` go into those of `slow`: the median over rounds, each compared in itself."""
    return statistics.median(getattr(a, of) / getattr(b, of) for a, b in zip(slow, fast, strict=True))


def memory_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes a second at which this machine reads memory that no cache holds: the best of several sums of a buffer."""
    buffer = torch.ones(megabytes * 2**18)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


def shape_config(shape: str) -> NeoXConfig:
    """ "tiny", the shape of the shipped model, or a Pythia size such as "160m"."""
    return tiny() if shape == "tiny" else pythia(shape)


def random_model(config: NeoXConfig, seed: int = 0) -> NeoXModel:
    """An fp32 model with matrices of standard deviation 0.02, GPT-NeoX's own start."""
    torch.manual_seed(seed)
    model = NeoXModel(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.02)
    return model


def in_precision(model: NeoXModel, dtype: torch.dtype) -> NeoXModel:
    """The same weights as `create_model` would hold them in `dtype` on a CPU, with its fast layers."""
    precision = Precision(dtype, torch.float32, "")
    with torch.device("meta"):
        copy = NeoXModel(model.config)
    state = {name: tensor.to(precision.dtype_of(name)) for name, tensor in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        copy.final_linear.weight = copy.word_embeddings.weight
    return use_fast_linear(copy.requires_grad_(False).eval())


def our_model(model: NeoXModel, dtype: str) -> NeoXModel:
    """The same weights in one of DTYPES, or "packed"."""
    if dtype == "packed":
        return pack_half(in_precision(model, torch.float16))
    return in_precision(model, DTYPES[dtype])


def hugging_face_twin(model: NeoXModel, dtype: torch.dtype) -> Any:
    """A Hugging Face GPTNeoXForCausalLM with the same weights, all in `dtype`; in fp32 it shares their memory.

    Raises ImportError without transformers.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("max_position_embeddings", "layer_norm_eps", "hidden_act", "use_parallel_residual", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": config.rotary_emb_base, "partial_rotary_factor": config.rotary_pct}
    same = {name: getattr(config, name) for name in names}
    same |= {"rope_parameters": rope, "attn_implementation": "sdpa"}
    twin = GPTNeoXForCausalLM(GPTNeoXConfig(**same))
    ours = {"embed_in": "word_embeddings", "final_layer_norm": "norm", "lm_head": "final_linear"}
    ours["embed_out"] = "final_linear"
    state = {}
    for name in twin.state_dict():
        owner, _, rest = name.removeprefix("gpt_neox.").partition(".")
        state[name] = model.state_dict()[f"{ours.get(owner, owner)}.{rest}"].to(dtype)
    twin.load_state_dict(state, assign=True)
    twin.generation_config.eos_token_id = None  # both sides write all the tokens asked for
    twin.generation_config.pad_token_id = 0
    return twin.requires_grad_(False).eval()


def our_generate(model: NeoXModel) -> Generate:
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        return [step.token_id for step in stream_generate(model, ids, new_tokens, stop_token_ids=())]

    return generate


def their_generate(model: Any) -> Generate:
    @torch.inference_mode()
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True}
        return model.generate(ids, max_new_tokens=new_tokens, **more)[0, ids.shape[1] :].tolist()

    return generate


def time_answer(generate: Generate, ids: Tensor, new_tokens: int) -> Timing:
    """Two generations, of 1 and of `new_tokens` tokens. Raises RuntimeError when one comes out shorter than asked."""
    seconds = []
    for asked in (1, new_tokens):
        started = time.perf_counter()
        written = generate(ids, asked)
        seconds.append(time.perf_counter() - started)
        if len(written) != asked:
            raise RuntimeError(f"{len(written)} tokens came where {asked} were asked for: the speeds would be wrong")
    return Timing(seconds[0], seconds[1], new_tokens)


def has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def bytes_per_token(model: NeoXModel, prompt: int, new_tokens: int) -> float:
    """Bytes that a decode step must read: every weight but the embedding's other rows, and half-way through, the cache.

    Counts all weights in the precision of the matrices and the cache in that of the activations.
    """
    config, embedding = model.config, model.word_embeddings.weight
    weights = config.weight_bytes(embedding.dtype) - (0 if config.tie_word_embeddings else embedding.nbytes)
    return weights + config.kv_cache_bytes(prompt + new_tokens // 2, model.norm.weight.dtype)


def run_bench(
    shapes: list[str], dtypes: list[str], prompts: list[int], new_tokens: int = 65, rounds: int = 3
) -> Iterator[Row]:
    """Rows, each as soon as it is measured: every shape, prompt length and dtype, ours and theirs in turns.

    The dtype "packed" is float16 after `pack_half`, against their float16. Raises ValueError for a shape or dtype that
    is not known.
    """
    unknown = set(dtypes) - {*DTYPES, *RIVALS}
    if unknown:
        raise ValueError(f"bench knows the dtypes {', '.join([*DTYPES, *RIVALS])}, not {', '.join(sorted(unknown))}")
    if new_tokens < 2 or rounds < 1:
        raise ValueError(f"bench needs at least 2 new tokens and 1 round, got {new_tokens} and {rounds}")
    with_theirs = has_transformers()
    for shape in shapes:
        model = random_model(shape_config(shape))
        ours = {dtype: our_model(model, dtype) for dtype in dtypes}
        sides = {("ours", dtype): our_generate(ours[dtype]) for dtype in dtypes}
        rivals = dict.fromkeys(RIVALS.get(dtype, dtype) for dtype in dtypes) if with_theirs else {}
        sides |= {("theirs", dtype): their_generate(hugging_face_twin(model, DTYPES[dtype])) for dtype in rivals}
        order = sorted(sides, key=lambda key: (RIVALS.get(key[1], key[1]), key))  # the two sides of a dtype in turn
        for prompt in prompts:
            ids = torch.randint(model.config.tokenizer_vocab_size, (1, prompt))
            timings: dict[tuple[str, str], list[Timing]] = {key: [] for key in sides}
            for key in order:
                sides[key](ids[:, :8], 2)  # first calls set things up
            for _ in range(rounds):
                for key in order:
                    timings[key].append(time_answer(sides[key], ids, new_tokens))
            for dtype in dtypes:
                read = bytes_per_token(ours[dtype], prompt, new_tokens)
                theirs = timings.get(("theirs", RIVALS.get(dtype, dtype)), [])
                yield Row(shape, prompt, dtype, timings["ours", dtype], theirs, read)


@dataclass(frozen=True)
class LoadRow:
    """Seconds from a folder on disk to the first token, each round's."""

    shape: str
    ours: list[float]
    theirs: list[float]


def time_load(shape: str, rounds: int = 3) -> LoadRow:
    """Load fp16 weights from a temporary folder and write one token, which reads every weight that a load put off.

    Ours from a slim folder of one rank, theirs from safetensors; in turns, from the file cache of the system.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64)
    model = random_model(shape_config(shape)).half()
    loaders: dict[str, Callable[[], Generate]] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        slim, safetensors = Path(temporary, "slim"), Path(temporary, "safetensors")
        write_slim(model, slim, ranks=1)
        loaders["ours"] = lambda: our_generate(create_model(slim, device="cpu", dtype="float16"))
        if has_transformers():
            from transformers import GPTNeoXForCausalLM, logging

            logging.disable_progress_bar()
            hugging_face_twin(model, torch.float16).save_pretrained(safetensors)
            read = {"dtype": torch.float16, "local_files_only": True}
            loaders["theirs"] = lambda: their_generate(GPTNeoXForCausalLM.from_pretrained(safetensors, **read))
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(rounds + 1):
            for side, load in loaders.items():
                started = time.perf_counter()
                load()(ids, 1)
                if number > 0:  # the first round brings the files into the cache
                    seconds[side].append(time.perf_counter() - started)
    return LoadRow(shape, seconds["ours"], seconds["theirs"])


def describe_machine(bandwidth: float) -> str:
    """What was measured on: the processor, threads, memory speed, and the versions."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    versions = f"torch {torch.__version__}"
    if has_transformers():
        import transformers

        versions += f", transformers {transformers.__version__}"
    return (
        f"{processor}, {torch.get_num_threads()} threads, memory read at {bandwidth / 1e9:.1f} GB/s; "
        f"Python {platform.python_version()}, {versions}"
    )


def format_row(row: Row, bandwidth: float) -> str:
    """One line of the table: ours, theirs and the ratio, above 1 where ours is faster; "noise" where the difference of
    the long and the short generation came out negative, as it can on a busy machine.
    """
    cells = [f"{row.shape:>6} {row.prompt:>6} {row.dtype:<9}"]
    for of in ("first", "per_token", "whole"):
        seconds = [median(side, of) if side else None for side in (row.ours, row.theirs)]
        cells += [format_speed(value, of) for value in seconds]
        comparable = row.theirs and all(value is not None and value > 0 for value in seconds)
        cells.append(f"{ratio(row.theirs, row.ours, of):>5.2f}x" if comparable else f"{'-':>6}")
    step = median(row.ours, "per_token")
    return " ".join(cells) + (f" {row.bytes_per_token / step / bandwidth:>6.0%}" if step > 0 else f"{'-':>7}")


def format_speed(seconds: float | None, of: str) -> str:
    """Milliseconds of a prefill or an answer, tokens a second of a decode step, "-" for a side that is not there."""
    if seconds is None:
        return f"{'-':>8}"
    if seconds <= 0:
        return f"{'noise':>8}"
    return f"{1 / seconds:>8.1f}" if of == "per_token" else f"{seconds * 1e3:>8.0f}"


HEADER = (
    f"{'':>23} {'prefill, ms':>24} {'decode, tokens/s':>24} {'whole answer, ms':>24}  memory\n"
    f"{'shape':>6} {'prompt':>6} {'dtype':<9}" + 3 * f" {'ours':>8} {'theirs':>8} {'ratio':>6}" + "  share"
)


def format_best(rows: list[Row]) -> str:
    """Across dtypes, a line a prompt: the whole answer, each side in its faster dtype, and our prefill from 16-bit
    weights against their fp32 one, which is their fast one."""
    lines = []
    for shape, prompt in dict.fromkeys((row.shape, row.prompt) for row in rows if row.theirs):
        group = [row for row in rows if (row.shape, row.prompt) == (shape, prompt)]
        ours = min((row.ours for row in group), key=lambda side: median(side, "whole"))
        theirs = min((row.theirs for row in group), key=lambda side: median(side, "whole"))
        line = f"{shape}, prompt {prompt}: whole answer, each in its better dtype {ratio(theirs, ours, 'whole'):.2f}x"
        by_dtype = {row.dtype: row for row in group}
        for dtype in ("float16", "packed", "bfloat16"):
            if dtype in by_dtype and "float32" in by_dtype:
                prefill = ratio(by_dtype["float32"].theirs, by_dtype[dtype].ours, "first")
                line += f"; prefill, our {dtype} against their float32 {prefill:.2f}x"
        lines.append(line)
    return "\n".join(lines)


def format_load(row: LoadRow) -> str:
    ours = statistics.median(row.ours)
    line = f"{row.shape}, load fp16 from disk and write one token: ours {ours:.2f} s"
    if not row.theirs:
        return line
    faster = statistics.median(a / b for a, b in zip(row.theirs, row.ours, strict=True))
    return f"{line}, theirs {statistics.median(row.theirs):.2f} s, {faster:.2f}x"


def format_table(rows: list[Row], bandwidth: float) -> str:
    """The table of all rows, with the comparisons across dtypes under it."""
    lines = [HEADER, *(format_row(row, bandwidth) for row in rows), format_best(rows)]
    return "\n".join(line for line in lines if line)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print, line by line as results come."""
    if arguments.quick:
        arguments.shapes, arguments.prompts, arguments.new_tokens, arguments.rounds = ["tiny"], [8, 32], 5, 2
    bandwidth = memory_bandwidth(64 if arguments.quick else 512)
    print(describe_machine(bandwidth))
    if not has_transformers():
        print("transformers is not installed: ours alone (pip install transformers for the comparison)")
    print(f"random weights, batch 1, {arguments.new_tokens} new tokens, median of {arguments.rounds} rounds in turns")
    print(HEADER, flush=True)
    rows = []
    for row in run_bench(arguments.shapes, arguments.dtypes, arguments.prompts, arguments.new_tokens, arguments.rounds):
        rows.append(row)
        print(format_row(row, bandwidth), flush=True)
    if any(row.theirs for row in rows):
        print(format_best(rows), flush=True)
    if not arguments.no_load:
        print(format_load(time_load(arguments.shapes[0], arguments.rounds)))
