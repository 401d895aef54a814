"""`bench`: speed, compared with other libraries."""

import argparse


def add(commands) -> None:
    description = "Speed against transformers, CTranslate2 and llama.cpp on the same random weights, in turns, medians."
    parser = commands.add_parser("bench", help="measure speed", description=description)
    parser.add_argument(
        "--device", help="cuda: fp16 models made on the GPU, in eager mode and compiled (default: the CPU's precisions)"
    )
    parser.add_argument("--shapes", nargs="+", help="Pythia sizes, 20b or tiny (default: 160m; cuda: 1.4b 6.9b 20b)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "float16", "int8"],
        help="of the weights (default: float32 float16 int8)",
    )
    parser.add_argument(
        "--against",
        nargs="*",
        help="what to compare with, where it is installed (default: transformers ctranslate2 xllamacpp ik_llama_cpp; "
        "cuda: transformers, and compiled, which is transformers with a static cache and a compiled decode step)",
    )
    parser.add_argument("--prompts", nargs="+", type=int, help="tokens (default: 64 1024; cuda: 1024)")
    parser.add_argument("--positions", nargs="*", type=int, default=[], help="time a token there too, as 100 2000")
    parser.add_argument("--new-tokens", type=int, default=65, help="of a whole answer (default: 65)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that the medians are taken over (default: 3)")
    parser.add_argument("--no-load", action="store_true", help="leave out loading from disk")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it works; says little on speed")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print, line by line as results come."""
    from neox_lib.bench.baselines import BASELINES, PACKAGES
    from neox_lib.bench.measure import choose_baselines, format_errors, memory_bandwidth, run_bench, time_load
    from neox_lib.bench.table import HEADER, describe_machine, format_best, format_load, format_positions, format_row

    if arguments.quick:
        arguments.shapes, arguments.prompts, arguments.new_tokens, arguments.rounds = ["tiny"], [8, 32], 5, 2
    if arguments.device is not None:
        run_on_device(arguments)
        return
    arguments.shapes, arguments.prompts = arguments.shapes or ["160m"], arguments.prompts or [64, 1024]
    arguments.against = list(BASELINES) if arguments.against is None else arguments.against
    baselines = choose_baselines(arguments.against)
    bandwidth = memory_bandwidth(64 if arguments.quick else 512)
    print(describe_machine(bandwidth))
    for missing in [name for name in arguments.against if name not in baselines]:
        print(f"{missing} is not installed: not compared with it (pip install {PACKAGES.get(missing, missing)})")
    print(f"random weights, batch 1, {arguments.new_tokens} new tokens, median of {arguments.rounds} rounds in turns")
    print(HEADER, flush=True)
    rows = []
    plan = (arguments.shapes, arguments.dtypes, arguments.prompts, arguments.new_tokens, arguments.rounds, baselines)
    for row in run_bench(*plan):
        rows.append(row)
        print(format_row(row, bandwidth), flush=True)
    if any(row.theirs for row in rows):
        print(format_best(rows), flush=True)
    if "int8" in arguments.dtypes:
        print(format_errors(arguments.shapes[0], "ctranslate2" in baselines), flush=True)
    if arguments.positions:
        half = arguments.new_tokens // 2
        prompts = [max(1, position - half) for position in arguments.positions]
        plan = (arguments.shapes, arguments.dtypes, prompts, arguments.new_tokens, arguments.rounds, baselines)
        print(format_positions(list(run_bench(*plan)), arguments.new_tokens), flush=True)
    if not arguments.no_load:
        print(format_load(time_load(arguments.shapes[0], arguments.rounds)))


def run_on_device(arguments: argparse.Namespace) -> None:
    """The same on one device, in fp16: each shape against transformers, with the share of what a copy moves there."""
    import torch

    from neox_lib.bench.baselines import is_installed
    from neox_lib.bench.on_device import BASELINES, SHAPES, copy_bandwidth, describe_device, run_on
    from neox_lib.bench.table import HEADER, format_row
    from neox_lib.checkpoints.files import CheckpointError
    from neox_lib.loading import choose_device

    device = choose_device(arguments.device)
    against = list(BASELINES) if arguments.against is None else arguments.against
    unknown = set(against) - set(BASELINES)
    if unknown:
        raise ValueError(f"--device compares with {', '.join(BASELINES)}, not {', '.join(sorted(unknown))}")
    if against and not is_installed("transformers"):
        print("transformers is not installed: not compared with it (pip install transformers)")
        against = []
    bandwidth = copy_bandwidth(device, 64 if arguments.quick else 1024)
    print(describe_device(device, bandwidth))
    print(f"random weights, batch 1, {arguments.new_tokens} new tokens, median of {arguments.rounds} rounds in turns")
    print(HEADER, flush=True)
    plan = (arguments.prompts or [1024], arguments.new_tokens, arguments.rounds, against)
    for shape in arguments.shapes or SHAPES:
        try:
            for row in run_on(device, shape, *plan):
                print(format_row(row, bandwidth), flush=True)
        except (CheckpointError, torch.OutOfMemoryError) as error:
            print(f"{shape}: left out: {error}", flush=True)
