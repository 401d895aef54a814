"""`info`: what a checkpoint is and what it costs, without reading its weights."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = (
        "Config, parameters, files, and for each precision the bytes, whether they fit into this machine's free memory "
        "and how fast to expect the model. Loads no weights."
    )
    parser = commands.add_parser("info", help="what a checkpoint is and what it costs", description=description)
    parser.add_argument("model", nargs="?", help="checkpoint folder or int8 file (default: the model that ships)")
    parser.add_argument("--preset", metavar="NAME", help="a shape instead of files: neox_20b, tiny, or 14m to 12b")
    parser.add_argument("--tokens", type=int, help="text that the cache holds (default: the whole context)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    import psutil

    from neox_lib.bench.measure import memory_bandwidth
    from neox_lib.checkpoints.files import SHIPPED_MODEL
    from neox_lib.precision import format_needs, preset

    if arguments.preset is not None and arguments.model is not None:
        raise ValueError("give a checkpoint or --preset, not both")
    if arguments.preset is not None:
        config, stored, files = preset(arguments.preset), None, []
    else:
        config, stored, files = describe(Path(arguments.model) if arguments.model else SHIPPED_MODEL)
    tokens = config.max_position_embeddings if arguments.tokens is None else arguments.tokens
    if not 1 <= tokens <= config.max_position_embeddings:
        raise ValueError(f"--tokens must be from 1 to the context of {config.max_position_embeddings}, got {tokens}")
    for field in dataclasses.fields(config):
        print(f"{field.name:26} {getattr(config, field.name)}")
    print(f"{'parameters':26} {config.parameter_count():,}")
    if stored is not None:
        print(f"{'stored as':26} {stored}")
    print()
    print(format_needs(config, tokens, psutil.virtual_memory().available, memory_bandwidth(128, repeats=3)))
    if files:
        print()
    width = max(24, *(len(part) for _, part, _ in files)) if files else 0
    for file, part, nbytes in files:
        print(f"{file:42} {part:{width}} {format_bytes(nbytes):>10}")


def describe(path: Path):
    """Config, dtype in words and (file, part, bytes) of each file of a checkpoint."""
    from neox_lib.checkpoints.checkpoint import open_weights
    from neox_lib.checkpoints.huggingface.layout import is_huggingface
    from neox_lib.checkpoints.huggingface.reader import HuggingFaceWeights, describe_huggingface
    from neox_lib.checkpoints.quantized import find_int8, open_int8
    from neox_lib.checkpoints.slim.layout import is_slim
    from neox_lib.checkpoints.slim.reader import describe_slim

    if (found := find_int8(path)) is not None and not (is_slim(path) or is_huggingface(path)):
        file, config, source, _ = open_int8(found)
        words = str(source).removeprefix("torch.")
        return config, f"int8, from {words}", [(file.name, "the whole model", file.stat().st_size)]
    weights = open_weights(path)
    rows = describe_huggingface(weights) if isinstance(weights, HuggingFaceWeights) else describe_slim(path)
    files = [(row.file, row.part, row.nbytes) for row in rows]
    return weights.config, str(weights.dtype).removeprefix("torch."), files


def format_bytes(count: int) -> str:
    """A byte count with a binary unit: 7045632 -> '6.7 MiB'."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:,.1f} {units[0]}"
