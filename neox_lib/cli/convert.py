"""`convert`: a checkpoint in another layout."""

import argparse
from pathlib import Path

from neox_lib.cli.generate import add_revision

LAYOUTS = ("slim", "huggingface", "gguf", "int8", "int4")
GGUF_DTYPES = ("float32", "float16", "bfloat16", "q8_0", "q4_0")


def add(commands) -> None:
    description = (
        "Write a checkpoint, slim, Hugging Face's or GGUF, in another layout; the model stays the same, and a LoRA "
        "adapter becomes one with its base model. slim: a file per layer and rank, as GPT-NeoX-20B was released. "
        "huggingface: safetensors, for transformers and others. gguf: one file, its tokenizer included, for llama.cpp, "
        "Ollama and LM Studio. int8, int4: one file of half the bytes, or less than a third, rounded, for a small "
        "machine."
    )
    parser = commands.add_parser("convert", help="rewrite a checkpoint", description=description)
    parser.add_argument("source", help="checkpoint to read: a folder, a NAME.gguf, or a name on the Hub")
    add_revision(parser)
    parser.add_argument("target", type=Path, help="folder to write; also NAME.gguf, NAME.int8.safetensors")
    parser.add_argument("--to", choices=LAYOUTS, default="slim", help="layout (default: slim)")
    parser.add_argument(
        "--ranks", type=int, help="slim: tensor-parallel ranks; must divide heads, MLP width, vocabulary (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=GGUF_DTYPES, help="gguf: of the matrices; q8_0 and q4_0 are rounded (default: as they are)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.checkpoints import convert
    from neox_lib.hub import local_path
    from neox_lib.quantization.linear import QUANTIZED

    if arguments.ranks is not None and arguments.to != "slim":
        raise ValueError(f"--ranks belongs to --to slim; {arguments.to} has no ranks")
    if arguments.dtype is not None and arguments.to != "gguf":
        raise ValueError(f"--dtype belongs to --to gguf; {arguments.to} keeps the dtype or has only one")
    source = local_path(arguments.source, arguments.revision)
    if arguments.to == "huggingface":
        convert.convert_to_huggingface(source, arguments.target)
        print(f"wrote {arguments.target}, for AutoModelForCausalLM.from_pretrained and the like")
    elif arguments.to == "gguf":
        file = convert.convert_to_gguf(source, arguments.target, arguments.dtype)
        size = f"{file.stat().st_size / 1e9:.2f} GB"
        print(f"wrote {file}, {size}; llama-completion --model {file} and generate --model {file} run it")
    elif arguments.to in QUANTIZED:
        file = convert.convert_to_quantized(source, arguments.target, QUANTIZED[arguments.to])
        print(f"wrote {file}, {file.stat().st_size / 1e9:.2f} GB; generate --model {arguments.target} runs it")
    else:
        ranks = 1 if arguments.ranks is None else arguments.ranks
        convert.convert_to_slim(source, arguments.target, ranks)
        print(f"wrote {arguments.target} with {ranks} rank{'s' if ranks > 1 else ''}")
