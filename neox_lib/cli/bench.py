"""`bench`: how fast, against others."""

import argparse


def add(commands) -> None:
    description = (
        "Speed against Hugging Face transformers and CTranslate2 on the same random weights, alternating, medians."
    )
    parser = commands.add_parser("bench", help="measure speed", description=description)
    parser.add_argument("--shapes", nargs="+", default=["160m"], help="Pythia sizes or tiny (default: 160m)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "float16", "packed", "int8", "packed-int8"],
        help="of the weights; packed: float16, or int8, laid out anew for long sessions (default: all but bfloat16)",
    )
    parser.add_argument(
        "--against",
        nargs="*",
        default=["transformers", "ctranslate2"],
        help="what to compare with, where it is installed (default: transformers ctranslate2)",
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 1024], help="tokens (default: 64 1024)")
    parser.add_argument("--positions", nargs="*", type=int, default=[], help="time a token there too, as 100 2000")
    parser.add_argument("--new-tokens", type=int, default=65, help="of a whole answer (default: 65)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that the medians are taken over (default: 3)")
    parser.add_argument("--no-load", action="store_true", help="leave out loading from disk")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it works; says little on speed")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.bench import measure as bench

    bench.run(arguments)
