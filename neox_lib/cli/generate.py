"""`generate`: continue a text, token by token."""

import argparse
import codecs
import contextlib
import functools
import os
import sys


def add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision",
        default="main",
        help="branch, tag or commit of a name on the Hub, such as step1000 (default: main)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="checkpoint folder or file, or a name on the Hub (default: the shipped model)",
    )
    add_revision(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 or int8 (default: auto)")


def add(commands) -> None:
    parser = commands.add_parser("generate", help="continue a text", description="Continue a text, token by token.")
    parser.add_argument("prompt", nargs="?", help="the text to continue; - reads it from standard input")
    add_model_arguments(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer JSON (default: the one in the model's folder)")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens whose probabilities reach P")
    parser.add_argument("--seed", type=int, help="the same seed draws the same text (default: 0)")
    parser.add_argument("--no-cache", action="store_true", help="recompute every token, to see what the cache saves")
    parser.add_argument("--no-stop", action="store_true", help="go on past the end of a text")
    parser.add_argument(
        "--pack", action="store_true", help="on a CPU, rearrange fp16 or int8 weights first: pays off in long texts"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Stream the continuation to stdout and one line of speed to stderr. Ctrl-C ends it and keeps the text so far.

    If torchrun started several processes, each is one rank of the model that they share.
    """
    from neox_lib.generation import prompt_ids, stream_generate
    from neox_lib.loading import create_tokenizer, use_tokenizer
    from neox_lib.sampling import Sampling
    from neox_lib.tokenizer import encode_text

    if "LOCAL_RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        from neox_lib.distributed.loading import create_rank_model as create_model
        from neox_lib.distributed.ranks import as_rank, read_once

        place, read = as_rank(arguments.device), functools.partial(read_once, read_stdin)
    else:
        from neox_lib.loading import create_model

        place, read = contextlib.nullcontext(), read_stdin
    with place:
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed or 0)
        idle = [
            f"--{name}" for name in ("top-k", "top-p", "seed") if vars(arguments)[name.replace("-", "_")] is not None
        ]
        if arguments.temperature == 0 and idle:
            print(
                f"neox_lib: {', '.join(idle)}: without effect at temperature 0, which takes the likeliest token; give "
                "--temperature too",
                file=sys.stderr,
            )
        text = read() if arguments.prompt == "-" else arguments.prompt or ""
        source, revision = arguments.model, arguments.revision
        tokenizer = create_tokenizer(arguments.tokenizer) if arguments.tokenizer else create_tokenizer(source, revision)
        encode_text(tokenizer, text)  # a prompt that can't be read is refused before the model is
        model = create_model(source, not arguments.no_cache, arguments.device, arguments.dtype, revision)
        if arguments.tokenizer:
            use_tokenizer(model, tokenizer)
        input_ids = prompt_ids(tokenizer, text, model.config)
        if arguments.pack:
            from neox_lib.decoding.int8_packing import pack

            pack(model)
        stop = () if arguments.no_stop else None
        steps = stream_generate(
            model, input_ids, arguments.tokens, tokenizer=tokenizer, sampling=sampling, stop_token_ids=stop
        )
        seconds: list[float] = []
        print(text, end="", flush=True)
        try:
            for step in steps:
                seconds.append(step.seconds)
                print(step.text, end="", flush=True)
        finally:  # also after Ctrl-C: the text and its speed are kept
            print(flush=True)
            print(speed_line(model, input_ids.shape[1], seconds), file=sys.stderr)


def read_stdin() -> str:
    """All text of standard input. Windows PowerShell puts a byte order mark in front, which says how it is encoded."""
    content = sys.stdin.buffer.read()
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((marks[mark] for mark in marks if content.startswith(mark)), sys.stdin.encoding)
    return content.decode(encoding, sys.stdin.errors or "strict").replace("\r\n", "\n").replace("\r", "\n")


def speed_line(model, prompt_tokens: int, seconds: list[float]) -> str:
    """One line: model, prefill milliseconds, tokens per second of the steps after the first."""
    weight = model.layers[0].attention.dense.weight  # an int8 model's embedding is not in int8
    dtype = str(weight.dtype).removeprefix("torch.")
    line = f"[{model.config.parameter_count() / 1e6:,.1f} M parameters, {dtype}, {weight.device.type}"
    ranks = getattr(model.config, "ranks", 1)  # of a model that several devices share
    line += f", {ranks} ranks" if ranks > 1 else ""
    if seconds:
        line += f"; prefill of {prompt_tokens} tokens {seconds[0] * 1e3:.0f} ms"
    if len(seconds) > 1:
        line += f"; {len(seconds)} new tokens, {(len(seconds) - 1) / sum(seconds[1:]):.0f} tokens/s"
    return line + "]"
