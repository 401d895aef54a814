"""`info`: what a checkpoint is and what it costs, without reading its weights."""

import argparse

from neox_lib.cli.generate import add_revision


def add(commands) -> None:
    description = (
        "Config, parameters, files, and for each precision the bytes, whether they fit into this machine's free "
        "memory, and how fast the model could be. Loads no weights, and fetches none of a model on the Hub."
    )
    parser = commands.add_parser("info", help="what a checkpoint is and what it costs", description=description)
    parser.add_argument(
        "model", nargs="?", help="checkpoint folder or file, or a name on the Hub (default: the shipped model)"
    )
    add_revision(parser)
    parser.add_argument("--preset", metavar="NAME", help="a shape instead of files: neox_20b, tiny, or 14m to 12b")
    parser.add_argument("--tokens", type=int, help="text that the cache holds (default: the whole context)")
    parser.add_argument("--gpu", type=float, metavar="GB", help="what a GPU with that many 10^9 bytes free would hold")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    from neox_lib.bench.measure import memory_bandwidth
    from neox_lib.checkpoints.files import SHIPPED_MODEL
    from neox_lib.config import format_bytes, preset
    from neox_lib.decoding.step import why_modules
    from neox_lib.hub import look_up
    from neox_lib.loading import threads_for
    from neox_lib.memory import available_memory
    from neox_lib.precision import format_card, format_needs
    from neox_lib.quantization.linear import dtype_name

    if arguments.preset is not None and arguments.model is not None:
        raise ValueError("give a checkpoint or --preset, not both")
    if arguments.preset is not None:
        config, source, files = preset(arguments.preset), None, []
    else:
        source = look_up(arguments.model or SHIPPED_MODEL, arguments.revision)
        config, files = source.config, source.files()
    tokens = config.max_position_embeddings if arguments.tokens is None else arguments.tokens
    if not 1 <= tokens <= config.max_position_embeddings:
        raise ValueError(f"--tokens must be from 1 to the context of {config.max_position_embeddings}, got {tokens}")
    for field in dataclasses.fields(config):
        print(f"{field.name:26} {getattr(config, field.name)}")
    print(f"{'parameters':26} {config.parameter_count():,}")
    if source is not None:
        dtypes = dict.fromkeys([source.dtype, source.float_dtype])  # of a quantized file two
        print(f"{'stored as':26} {', from '.join(map(dtype_name, dtypes))}")
        print(f"{'read from':26} {source}")
    reason = why_modules(config)
    print(f"{'decoding on a CPU':26} {'compiled loops' if reason is None else f'the modules ({reason})'}")
    print(f"{'threads on a CPU':26} {threads_for(config)}")
    print()
    if arguments.gpu is not None:
        print(f"a GPU with {arguments.gpu:g} GB free ({format_bytes(arguments.gpu * 1e9)}):")
        print(format_card(config, int(arguments.gpu * 1e9)))
    else:
        print(format_needs(config, tokens, available_memory(), memory_bandwidth(128, repeats=3)))
    if files:
        print()
    width = max([24, *(len(row.part) for row in files)])
    for row in files:
        print(f"{row.file:42} {row.part:{width}} {format_bytes(row.nbytes):>10}")
