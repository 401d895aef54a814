"""`download`: a model from the Hugging Face Hub."""

import argparse
import sys

from neox_lib.cli.generate import add_revision


def add(commands) -> None:
    description = (
        "Fetch a model's config, tokenizer and weights from the Hugging Face Hub. After an interruption, the same "
        "command continues behind the last whole file. Prints the folder to give to `--model`."
    )
    parser = commands.add_parser("download", help="fetch a model from the Hub", description=description)
    parser.add_argument("model", help="its name on the Hub, such as EleutherAI/pythia-70m")
    parser.add_argument(
        "--to",
        nargs="+",
        metavar=("FOLDER", "INT8_FOLDER"),
        help="a new folder (default: the Hub's cache); or int8 or int4 and perhaps a folder: quantized as it comes, "
        "shard by shard, so that the disk never holds all of the model",
    )
    add_revision(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib import hub
    from neox_lib.quantization.linear import QUANTIZED

    where, *rest = arguments.to or [None]
    if len(rest) > (where in QUANTIZED):
        raise ValueError("--to takes one folder, or int8 or int4 and one folder")
    try:
        if where in QUANTIZED:
            folder = hub.download_quantized(arguments.model, *rest, revision=arguments.revision, dtype=QUANTIZED[where])
        elif where is not None:
            folder = hub.download_to_folder(arguments.model, where, arguments.revision)
        else:
            folder = hub.download(arguments.model, arguments.revision)
        hub.bring_base(folder)
    except KeyboardInterrupt:
        print("\nneox_lib: stopped; complete files are kept, and the same command continues", file=sys.stderr)
        raise
    print(folder)
