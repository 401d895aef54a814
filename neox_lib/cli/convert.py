"""`convert`: a checkpoint in another layout."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = (
        "Write a checkpoint, slim or Hugging Face's, in another layout; the model stays the same. slim: a file per "
        "layer and rank, as GPT-NeoX-20B was released. huggingface: safetensors, for transformers and others. int8: "
        "one file of half the bytes, rounded, for a small machine."
    )
    parser = commands.add_parser("convert", help="rewrite a checkpoint", description=description)
    parser.add_argument("source", type=Path, help="checkpoint folder to read")
    parser.add_argument("target", type=Path, help="folder to write; for int8 a folder or a NAME.int8.safetensors")
    parser.add_argument("--to", choices=("slim", "huggingface", "int8"), default="slim", help="layout (default: slim)")
    parser.add_argument(
        "--ranks", type=int, help="slim: tensor-parallel ranks; must divide heads, MLP width, vocabulary (default: 1)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.checkpoints import convert

    if arguments.ranks is not None and arguments.to != "slim":
        raise ValueError(f"--ranks belongs to --to slim; {arguments.to} has no ranks")
    if arguments.to == "huggingface":
        convert.convert_to_huggingface(arguments.source, arguments.target)
        print(f"wrote {arguments.target}, for AutoModelForCausalLM.from_pretrained and the like")
    elif arguments.to == "int8":
        file = convert.convert_to_int8(arguments.source, arguments.target)
        print(f"wrote {file}, {file.stat().st_size / 1e9:.2f} GB; generate --model {arguments.target} runs it")
    else:
        ranks = 1 if arguments.ranks is None else arguments.ranks
        convert.convert_to_slim(arguments.source, arguments.target, ranks)
        print(f"wrote {arguments.target} with {ranks} rank{'s' if ranks > 1 else ''}")
