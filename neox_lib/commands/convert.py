"""`convert`: the same model in other files."""

import argparse
import contextlib
from pathlib import Path


def add(commands) -> None:
    description = "Rewrite a slim checkpoint with another number of tensor-parallel ranks; the model stays the same."
    parser = commands.add_parser("convert", help="rewrite a checkpoint", description=description)
    parser.add_argument("source", type=Path, help="checkpoint folder to read")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--ranks", type=int, required=True, help="must divide heads, MLP width and padded vocabulary")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import shutil

    from neox_lib.slim_writer import convert_slim
    from neox_lib.tokenizer import find_tokenizer

    convert_slim(arguments.source, arguments.target, arguments.ranks)
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(find_tokenizer(arguments.source), arguments.target)
    print(f"wrote {arguments.target} with {arguments.ranks} rank{'s' if arguments.ranks > 1 else ''}")
