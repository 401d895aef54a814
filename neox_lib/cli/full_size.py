"""`full-size`: write, quantize, load and run a model of 20B's shapes on this machine."""

import argparse
from pathlib import Path

PHASES = ("machine", "write", "convert", "cold", "warm", "long")


def add(commands) -> None:
    description = (
        "Write random weights in the shapes of GPT-NeoX-20B (41 GB), convert them to int8 (21 GB) or int4 (12 GB), "
        "load that from disk and from memory, and write text, measuring each phase. Results are printed and kept in "
        "FOLDER/results.json; remove the folder afterwards."
    )
    parser = commands.add_parser("full-size", help="try 20B's size on this machine", description=description)
    parser.add_argument("phase", choices=("all", *PHASES), help="all runs each of the others in a process of its own")
    parser.add_argument("folder", type=Path, help="holds slim/, int8/ or int4/, and results.json")
    parser.add_argument(
        "--shape", default="neox_20b", help="neox_20b, middle, small or a Pythia size (default: neox_20b)"
    )
    parser.add_argument("--dtype", choices=("int8", "int4"), default="int8", help="of the matrices (default: int8)")
    parser.add_argument("--delete-shards", action="store_true", help="remove each layer's files once converted")
    parser.add_argument("--long-prompt", type=int, default=128, help="tokens of the long prompt (default: 128)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int | None:
    from neox_lib.bench.full_size import Rehearsal, run_all, run_phase

    more = arguments.long_prompt, arguments.delete_shards, arguments.dtype
    rehearsal = Rehearsal(arguments.folder, arguments.shape, *more)
    if arguments.phase == "all":
        return run_all(rehearsal)
    print("\n".join(run_phase(arguments.phase, rehearsal)), flush=True)
    return None
