"""The command line: python -m neox_lib generate | info | train | convert | bench | promote."""

import argparse
import contextlib
import os
import sys
from pathlib import Path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="checkpoint folder (default: the model that ships with us)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default: auto)")


def add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="continue a text", description="Continue a text, token by token.")
    parser.add_argument("prompt", nargs="?", help="the text to continue; - reads it from standard input")
    add_model_arguments(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer JSON (default: the one in the model's folder)")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens whose probabilities reach P")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same text (default: 0)")
    parser.add_argument("--no-cache", action="store_true", help="compute every token anew, to see what the cache saves")
    parser.add_argument("--no-stop", action="store_true", help="go on past <|endoftext|>")
    parser.set_defaults(run=generate)


def generate(arguments: argparse.Namespace) -> None:
    """Stream the continuation to stdout and one line of speed to stderr. Ctrl-C ends it and keeps the text so far."""
    from neox_lib.generation import ENDOFTEXT_ID, prompt_ids, stream_generate
    from neox_lib.sampling import Sampling
    from neox_lib.scale.loading import create_model
    from neox_lib.tokenizer import create_tokenizer

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt or ""
    tokenizer = create_tokenizer(arguments.tokenizer or arguments.model)
    input_ids = prompt_ids(tokenizer, text)
    model = create_model(arguments.model, not arguments.no_cache, arguments.device, arguments.dtype)
    stop = () if arguments.no_stop else (ENDOFTEXT_ID,)
    steps = stream_generate(
        model, input_ids, arguments.tokens, tokenizer=tokenizer, sampling=sampling, stop_token_ids=stop
    )
    seconds: list[float] = []
    print(text, end="", flush=True)
    try:
        for step in steps:
            seconds.append(step.seconds)
            print(step.text, end="", flush=True)
    finally:  # also after Ctrl-C: what was written stays, and so does its speed
        print(flush=True)
        print(speed_line(model, input_ids.shape[1], seconds), file=sys.stderr)


def speed_line(model, prompt_tokens: int, seconds: list[float]) -> str:
    """One line: model, prefill milliseconds, tokens a second of the steps after the first."""
    weight = model.word_embeddings.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    line = f"[{model.config.parameter_count() / 1e6:,.1f} M parameters, {dtype}, {weight.device.type}"
    if seconds:
        line += f"; prefill of {prompt_tokens} tokens {seconds[0] * 1e3:.0f} ms"
    if len(seconds) > 1:
        line += f"; {len(seconds)} new tokens, {(len(seconds) - 1) / sum(seconds[1:]):.0f} tokens/s"
    return line + "]"


def add_info(commands) -> None:
    description = "Config, parameters, bytes by precision and the files of a checkpoint, without loading its weights."
    parser = commands.add_parser("info", help="what a checkpoint is and what it costs", description=description)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: the model that ships with us)")
    parser.set_defaults(run=info)


def info(arguments: argparse.Namespace) -> None:
    import dataclasses

    from neox_lib.checkpoint import describe_slim, stored_dtype
    from neox_lib.files import SHIPPED_MODEL
    from neox_lib.release import read_config
    from neox_lib.scale.loading import DTYPES

    folder = Path(arguments.model) if arguments.model else SHIPPED_MODEL
    config = read_config(folder)
    for field in dataclasses.fields(config):
        print(f"{field.name:26} {getattr(config, field.name)}")
    print(f"{'parameters':26} {config.parameter_count():,}")
    print(f"{'stored as':26} {str(stored_dtype(folder)).removeprefix('torch.')}")
    for name, dtype in DTYPES.items():
        weights, cache = config.weight_bytes(dtype), config.kv_cache_bytes(1, dtype)
        print(f"{'in ' + name:26} {format_bytes(weights)} of weights, {format_bytes(cache)} of KV cache a token")
    print()
    for row in describe_slim(folder):
        print(f"{row.file:42} {row.part:24} {format_bytes(row.nbytes):>10}")


def format_bytes(count: int) -> str:
    """A byte count with a binary unit: 7045632 -> '6.7 MiB'."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:,.1f} {units[0]}"


def window_schedule(text: str) -> tuple[float, tuple[int, ...]]:
    """ "0.9:256,2048" -> (0.9, (256, 2048))."""
    share, _, lengths = text.partition(":")
    return float(share), tuple(int(length) for length in lengths.split(","))


def add_train(commands) -> None:
    description = (
        "Train a model of the shipped one's shape on story files (<|endoftext|> alone on a line between stories) and "
        "write it as a slim checkpoint. Called again with the same words it goes on where it was stopped."
    )
    parser = commands.add_parser("train", help="train a small model on stories", description=description)
    parser.add_argument("folder", help="where the state and the finished model go")
    parser.add_argument("--stories", nargs="+", required=True, type=Path, metavar="FILE", help="the main text")
    parser.add_argument("--mix", nargs="*", default=[], type=Path, metavar="FILE", help="text for variety")
    parser.add_argument("--validation", required=True, type=Path, metavar="FILE", help="held-out stories")
    parser.add_argument("--tokens", dest="total_tokens", type=int, metavar="N", help="how many tokens to train on")
    parser.add_argument("--mix-share", type=float, help="which share of the windows comes from --mix")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="another run, to begin with its weights")
    parser.add_argument(
        "--windows",
        nargs="+",
        type=window_schedule,
        metavar="SHARE:LENGTHS",
        help="window lengths that take turns from a share of the steps on, such as 0:256,256,2048 0.9:2048",
    )
    parser.add_argument("--learning-rate", type=float, help="the highest learning rate")
    parser.add_argument("--weight-decay", type=float, help="how hard the matrices are pulled towards zero")
    parser.add_argument("--dropout", type=float, help="share of each branch's output that is dropped while training")
    parser.add_argument("--seed", type=int, help="of the first weights and of the order of windows")
    parser.add_argument("--ranks", type=int, default=2, help="tensor-parallel ranks of the files (default: 2)")
    parser.set_defaults(run=train)


def give_tokenizer(folder: Path, stories: list[Path], start_from: Path | None) -> None:
    """Put a tokenizer into a run's folder, if it has none: the one its first weights know, else one learned anew."""
    import shutil

    from neox_lib.config import tiny
    from neox_lib.scoring import stories_of
    from neox_lib.tokenizer import find_tokenizer, save_tokenizer, train_tokenizer

    if (folder / "tokenizer.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if start_from is not None:
        shutil.copy(find_tokenizer(start_from), folder / "tokenizer.json")
        return
    print("training the tokenizer")
    texts = [story for path in stories for story in stories_of(path.read_text("utf-8"))]
    save_tokenizer(train_tokenizer(texts, tiny().vocab_size), folder / "tokenizer.json")


def train(arguments: argparse.Namespace) -> None:
    import dataclasses
    import shutil

    import torch

    from neox_lib import training
    from neox_lib.config import tiny
    from neox_lib.lesson import plots
    from neox_lib.scale.loading import create_model
    from neox_lib.scoring import bits_per_byte, stories_of
    from neox_lib.slim_writer import write_slim
    from neox_lib.tokenizer import create_tokenizer

    folder, finished = Path(arguments.folder), Path(arguments.folder) / "model"
    if arguments.windows:
        arguments.windows = tuple(arguments.windows)
    words = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(training.TrainingPlan)}
    given = {name: value for name, value in words.items() if value is not None}
    plan = dataclasses.replace(training.TrainingPlan(), **given)
    give_tokenizer(folder, arguments.stories, arguments.start_from)
    tokenizer = create_tokenizer(folder)
    stories, mix, validation = (
        training.read_streams(tokenizer, paths) for paths in (arguments.stories, arguments.mix, [arguments.validation])
    )
    print(f"{len(stories):,} tokens of stories, {len(mix):,} to mix in, {len(validation):,} held out")
    config = dataclasses.replace(tiny(), tokenizer_vocab_size=tokenizer.get_vocab_size())
    sample = training.spread_sample(validation, 16, config.max_position_embeddings)
    model, history = training.train(config, plan, stories, mix, sample, folder, arguments.start_from)
    plots.loss_curves(history).savefig(folder / "curves.png")
    shutil.rmtree(finished, ignore_errors=True)  # of an earlier call; this folder is ours alone
    write_slim(model.to(torch.float16), finished, arguments.ranks, spread_seed=plan.seed)
    shutil.copy(folder / "tokenizer.json", finished)
    held_out = stories_of(arguments.validation.read_text("utf-8"))
    bits = bits_per_byte(create_model(finished), tokenizer, held_out)
    print(f"{bits:.4f} bits per byte on {arguments.validation.name}, by the finished model in {finished}")


def add_convert(commands) -> None:
    description = "Rewrite a slim checkpoint with another number of tensor-parallel ranks; the model stays the same."
    parser = commands.add_parser("convert", help="rewrite a checkpoint", description=description)
    parser.add_argument("source", type=Path, help="checkpoint folder to read")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--ranks", type=int, required=True, help="must divide heads, MLP width and padded vocabulary")
    parser.set_defaults(run=convert)


def convert(arguments: argparse.Namespace) -> None:
    import shutil

    from neox_lib.slim_writer import convert_slim
    from neox_lib.tokenizer import find_tokenizer

    convert_slim(arguments.source, arguments.target, arguments.ranks)
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(find_tokenizer(arguments.source), arguments.target)
    print(f"wrote {arguments.target} with {arguments.ranks} rank{'s' if arguments.ranks > 1 else ''}")


def add_bench(commands) -> None:
    description = "Speed against Hugging Face transformers on the same random weights, alternating, medians."
    parser = commands.add_parser("bench", help="measure speed", description=description)
    parser.add_argument("--shapes", nargs="+", default=["160m"], help="Pythia sizes or tiny (default: 160m)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "float16", "packed"],
        help="of the weights; packed: float16 laid out anew, for long sessions (default: float32 float16 packed)",
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 1024], help="tokens (default: 64 1024)")
    parser.add_argument("--new-tokens", type=int, default=65, help="of a whole answer (default: 65)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that the medians are taken over (default: 3)")
    parser.add_argument("--no-load", action="store_true", help="leave out loading from disk")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it works; says little on speed")
    parser.set_defaults(run=bench)


def bench(arguments: argparse.Namespace) -> None:
    from neox_lib.scale.bench import run

    run(arguments)


def add_promote(commands) -> None:
    description = (
        "Write the pieces that the notebooks build into the library. A piece that can't be imported is taken back. "
        "`git diff neox_lib` shows what changed, `git checkout neox_lib` takes it back."
    )
    parser = commands.add_parser("promote", help="move the notebooks' pieces into the library", description=description)
    parser.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="such as notebooks/mine, your copy")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--check", action="store_true", help="change nothing; show differences, exit 1 if any")
    direction.add_argument("--pull", action="store_true", help="the other way: library to notebooks, for authors")
    parser.set_defaults(run=promote)


def promote(arguments: argparse.Namespace) -> int:
    from neox_lib.lesson import promote

    folder = arguments.folder or promote.NOTEBOOKS
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of notebooks")
    if arguments.check:
        found = promote.differences(folder)
        print("\n".join(found) if found else "Notebooks and library agree.")
        return 1 if found else 0
    changed = promote.pull(folder) if arguments.pull else promote.promote(folder)
    print(f"Changed: {', '.join(changed)}." if changed else "Nothing to change: notebooks and library agree.")
    if changed and not arguments.pull:
        print("Restart the kernels of other notebooks: they still hold the old pieces.")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m neox_lib", description="Run and rebuild GPT-NeoX models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_generate, add_info, add_train, add_convert, add_bench, add_promote):
        add(commands)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run a command. Errors that a user can mend are one line on stderr and exit code 2; Ctrl-C is 130."""
    arguments = build_parser().parse_args(words)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"neox_lib: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
