"""`generate`: continue a text, token by token."""

import argparse
import codecs
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "stop_strings")


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
    parser.add_argument(
        "--dtype", default="auto", help="auto, float32, float16, bfloat16, int8 or int4 (default: auto)"
    )


def add(commands) -> None:
    parser = commands.add_parser("generate", help="continue a text", description="Continue a text, token by token.")
    parser.add_argument("prompt", nargs="?", help="the text to continue; - reads it from standard input")
    add_model_arguments(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer JSON (default: the one in the model's folder)")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens whose probabilities reach P"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the likeliest"
    )
    parser.add_argument("--seed", type=int, help="the same seed draws the same text (default: 0)")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1, tokens of the text so far are less likely"
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", dest="stop_strings", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--defaults",
        action="store_true",
        help="write as the model's generation_config.json says, except for what is given here",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="converse in the form of the model's chat template, a line per turn, until the end of input (Ctrl-D)",
    )
    parser.add_argument("--no-cache", action="store_true", help="recompute every token, to see what the cache saves")
    parser.add_argument("--no-stop", action="store_true", help="go on past the end of a text")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Stream the continuation to stdout and one line of speed to stderr. Ctrl-C ends it and keeps the text so far.

    If torchrun started several processes, each is one rank of the model that they share.
    """
    from neox_lib.chat import Chat, create_chat_template
    from neox_lib.generation import prompt_ids, stream_generate
    from neox_lib.loading import create_sampling, create_tokenizer, use_tokenizer
    from neox_lib.sampling import Sampling
    from neox_lib.tokenizer import encode_text

    alone = "LOCAL_RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1
    if not alone:
        from neox_lib.distributed.loading import create_rank_model as create_model
        from neox_lib.distributed.ranks import as_rank, read_once

        place, share = as_rank(arguments.device), read_once
    else:
        from neox_lib.loading import create_model

        place, share = contextlib.nullcontext(), lambda read: read()
    with place:
        given = {name: value for name in SAMPLING if (value := vars(arguments)[name]) is not None}
        sampling = Sampling(**given)
        if arguments.chat and arguments.prompt == "-":
            raise ValueError("--chat reads its turns from standard input as it is; leave out the -")
        text = share(read_stdin) if arguments.prompt == "-" else arguments.prompt or ""
        source, revision = arguments.model, arguments.revision
        beside = (arguments.tokenizer,) if arguments.tokenizer else (source, revision)
        tokenizer = create_tokenizer(*beside)
        encode_text(tokenizer, text)  # a prompt that can't be read is refused before the model is
        template = create_chat_template(*beside) if arguments.chat else None
        if arguments.defaults:
            sampling = replace(create_sampling(source, revision), **given)
        warn_of_idle(sampling, given)
        model = create_model(source, not arguments.no_cache, arguments.device, arguments.dtype, revision)
        if arguments.tokenizer:
            use_tokenizer(model, tokenizer)
        stop = () if arguments.no_stop else None
        if template is not None:
            chat = Chat(model, tokenizer, template, sampling, stop_token_ids=stop)
            converse(chat, text, share, arguments.tokens, go_on=alone and sys.stdin.isatty())
        else:
            ids = prompt_ids(tokenizer, text, model.config)
            print(text, end="", flush=True)
            steps = stream_generate(
                model, ids, arguments.tokens, tokenizer=tokenizer, sampling=sampling, stop_token_ids=stop
            )
            with telling_speed(model, ids.shape[1]) as seconds:
                for step in steps:
                    seconds.append(step.seconds)
                    print(step.text, end="", flush=True)


def warn_of_idle(sampling, given: dict) -> None:
    """Say on stderr which of the settings given have no effect."""
    idle = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "min_p", "seed") if name in given]
    if sampling.temperature == 0 and idle:
        print(
            f"neox_lib: {', '.join(idle)}: without effect at temperature 0, which takes the likeliest token; give "
            "--temperature too",
            file=sys.stderr,
        )


@contextlib.contextmanager
def telling_speed(model, prompt_tokens: int) -> Iterator[list[float]]:
    """Seconds of steps, to be filled in; their line goes to stderr however the steps end, after Ctrl-C too."""
    seconds: list[float] = []
    try:
        yield seconds
    finally:
        print(flush=True)
        print(speed_line(model, prompt_tokens, seconds), file=sys.stderr)


def converse(chat, first: str, share: Callable, tokens: int, go_on: bool) -> None:
    """A turn for each line of standard input, beginning with `first` if there is one, until input ends. With `go_on`
    Ctrl-C ends a reply, which is kept as it is; otherwise, and between replies, it ends the conversation.
    """
    text = first or share(read_turn)
    while text is not None:
        if text.strip():
            try:
                with (
                    contextlib.closing(chat.send(text, tokens)) as steps,
                    telling_speed(chat.model, chat.unread) as seconds,
                ):
                    for step in steps:
                        seconds.append(step.seconds)
                        print(step.text, end="", flush=True)
            except KeyboardInterrupt:
                if not go_on:
                    raise
        text = share(read_turn)


def read_turn() -> str | None:
    """The next line of standard input, without a byte order mark or the CR of Windows' line ends; None at its end."""
    terminal = sys.stdin.isatty()
    try:
        return input("> " if terminal else "").removeprefix("\ufeff").removesuffix("\r")
    except EOFError:
        print(end="\n" if terminal else "")
        return None


def read_stdin() -> str:
    """All text of standard input. Windows PowerShell puts a byte order mark in front, which says how it is encoded."""
    content = sys.stdin.buffer.read()
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((marks[mark] for mark in marks if content.startswith(mark)), sys.stdin.encoding)
    return content.decode(encoding, sys.stdin.errors or "strict").replace("\r\n", "\n").replace("\r", "\n")


def speed_line(model, prompt_tokens: int, seconds: list[float]) -> str:
    """One line: model, prefill milliseconds, tokens per second of the steps after the first."""
    from neox_lib.quantization.linear import dtype_name

    weight = model.layers[0].attention.dense.weight  # a quantized model's embedding is not
    line = f"[{model.config.parameter_count() / 1e6:,.1f} M parameters, {dtype_name(weight.dtype)}"
    line += f", {weight.device.type}"
    ranks = getattr(model.config, "ranks", 1)  # of a model that several devices share
    line += f", {ranks} ranks" if ranks > 1 else ""
    if seconds:
        line += f"; prefill of {prompt_tokens} tokens {seconds[0] * 1e3:.0f} ms"
    if len(seconds) > 1:
        line += f"; {len(seconds)} new tokens, {(len(seconds) - 1) / sum(seconds[1:]):.0f} tokens/s"
    return line + "]"
