"""`info`: what a checkpoint is and what it costs, without reading its weights."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = "Config, parameters, bytes by precision and the files of a checkpoint, without loading its weights."
    parser = commands.add_parser("info", help="what a checkpoint is and what it costs", description=description)
    parser.add_argument("model", nargs="?", help="checkpoint folder (default: the model that ships with us)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    from neox_lib.checkpoint import describe_slim
    from neox_lib.files import SHIPPED_MODEL
    from neox_lib.scale.huggingface import HuggingFaceWeights, describe_huggingface
    from neox_lib.scale.loading import DTYPES
    from neox_lib.scale.weights import open_weights

    folder = Path(arguments.model) if arguments.model else SHIPPED_MODEL
    weights = open_weights(folder)
    config = weights.config
    for field in dataclasses.fields(config):
        print(f"{field.name:26} {getattr(config, field.name)}")
    print(f"{'parameters':26} {config.parameter_count():,}")
    print(f"{'stored as':26} {str(weights.dtype).removeprefix('torch.')}")
    for name, dtype in DTYPES.items():
        needed, cache = config.weight_bytes(dtype), config.kv_cache_bytes(1, dtype)
        print(f"{'in ' + name:26} {format_bytes(needed)} of weights, {format_bytes(cache)} of KV cache a token")
    print()
    rows = describe_huggingface(weights) if isinstance(weights, HuggingFaceWeights) else describe_slim(folder)
    width = max(24, *(len(row.part) for row in rows))
    for row in rows:
        print(f"{row.file:42} {row.part:{width}} {format_bytes(row.nbytes):>10}")


def format_bytes(count: int) -> str:
    """A byte count with a binary unit: 7045632 -> '6.7 MiB'."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:,.1f} {units[0]}"
