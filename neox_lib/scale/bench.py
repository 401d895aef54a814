"""How fast: our model against Hugging Face's on the same random weights, in turns, and against the machine's memory."""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.model import NeoXModel
from neox_lib.scale.bench_table import (
    HEADER,
    LoadRow,
    Row,
    Timing,
    describe_machine,
    format_best,
    format_load,
    format_row,
)
from neox_lib.scale.contenders import (
    RIVALS,
    Generate,
    has_transformers,
    hugging_face_twin,
    our_generate,
    our_model,
    random_model,
    shape_config,
    their_generate,
)
from neox_lib.scale.loading import DTYPES, create_model
from neox_lib.slim_writer import write_slim


def memory_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes a second at which this machine reads memory that no cache holds: the best of several sums of a buffer."""
    buffer = torch.ones(megabytes * 2**18)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


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
