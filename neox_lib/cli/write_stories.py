"""`write-stories`: a text to train and calibrate on, drawn from a model."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from neox_lib.cli.generate import add_model_arguments

ROWS, MOST_TOKENS = 32, 700  # stories written side by side; a longer one is left out


def add(commands) -> None:
    description = (
        "Draw stories from a model, each from its beginning to its end, and write them to a file with <|endoftext|> "
        "alone on a line between them, as `train` reads them. The same command writes the same stories."
    )
    parser = commands.add_parser("write-stories", help="a file of stories by a model", description=description)
    parser.add_argument("file", type=Path, help="where the stories go")
    add_model_arguments(parser)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="how much text at least (default: 1,000,000)")
    parser.add_argument("--temperature", type=float, default=0.8, help="above 0 (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same stories (default: 0)")
    parser.set_defaults(run=run)


def stories(model, tokenizer, temperature: float, seed: int) -> Iterator[str]:
    """Stories, one after another, each begun by the token that begins every text. One that does not end is left out.

    Raises ValueError for a model whose texts don't end.
    """
    from neox_lib.generation import prompt_ids, stream_generate
    from neox_lib.sampling import Sampling

    prompt = prompt_ids(tokenizer, "", model.config)
    most = min(MOST_TOKENS, model.config.max_position_embeddings - prompt.shape[1])
    while True:  # each row of a batch draws with a seed of its own, from `seed` on
        texts, ended = [""] * ROWS, [False] * ROWS
        for step in stream_generate(
            model, prompt.expand(ROWS, -1), most, tokenizer=tokenizer, sampling=Sampling(temperature, seed=seed)
        ):
            texts = [text + new for text, new in zip(texts, step.texts, strict=True)]
            ended = [token in model.config.eos_token_ids for token in step.token_ids]
        whole = [text.strip() for text, end in zip(texts, ended, strict=True) if end and text.strip()]
        if not whole:
            raise ValueError(f"none of {ROWS} texts ended within {most} tokens; give a model that writes short stories")
        yield from whole
        seed += ROWS


def run(arguments: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from neox_lib.checkpoints.atomic import write_atomically
    from neox_lib.loading import create_model, create_tokenizer
    from neox_lib.tokenizer import ENDOFTEXT

    if not arguments.temperature > 0:
        raise ValueError(f"temperature must be above 0, got {arguments.temperature}: at 0 all stories would be one")
    if arguments.bytes < 1:
        raise ValueError(f"bytes must be 1 or more, got {arguments.bytes}")
    model, revision = arguments.model, arguments.revision
    tokenizer = create_tokenizer(model, revision)
    model = create_model(model, device=arguments.device, dtype=arguments.dtype, revision=revision)
    count = size = 0

    def write(temporary: Path) -> None:
        nonlocal count, size
        bar = tqdm(total=arguments.bytes, unit="B", unit_scale=True)
        with bar, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for story in stories(model, tokenizer, arguments.temperature, arguments.seed):
                file.write(f"{ENDOFTEXT}\n{story}\n" if count else f"{story}\n")
                count, size = count + 1, size + len(f"{story}\n".encode())
                bar.update(min(arguments.bytes, size) - bar.n)
                if size >= arguments.bytes:
                    break

    write_atomically(arguments.file, write)
    print(f"{count:,} stories, {size:,} bytes, in {arguments.file}")
