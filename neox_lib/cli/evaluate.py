"""`evaluate`: a model's scores on the tasks of lm-evaluation-harness."""

import argparse
from pathlib import Path

from neox_lib.cli.generate import add_model_arguments


def add(commands) -> None:
    description = (
        "Scores on tasks of lm-evaluation-harness (pip install lm-eval), which downloads their questions. Five need no "
        "download, since they are built from the texts of this package: tales_last_word, tales_ending, tales_text, "
        "stories_last_word and stories_ending. Stopped, and typed again, the command goes on where it was."
    )
    parser = commands.add_parser("evaluate", help="scores on benchmarks", description=description)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names, or YAML files of tasks")
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at a time (default: 8)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first questions of each task, to try it")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved questions before each (default: the task's)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="keeps answers and results (default: evaluation/NAME of the model)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"evaluate needs the package lm-eval ({error}); install it: pip install lm-eval") from None

    from neox_lib.evaluation.harness import evaluate, score_lines
    from neox_lib.loading import create_model, create_tokenizer

    tokenizer = create_tokenizer(arguments.model, arguments.revision)
    model = create_model(arguments.model, device=arguments.device, dtype=arguments.dtype, revision=arguments.revision)
    name = "tiny" if arguments.model is None else Path(arguments.model).name
    folder = arguments.output or Path("evaluation") / name
    results = evaluate(
        model,
        tokenizer,
        arguments.tasks,
        folder,
        arguments.batch_size,
        arguments.limit,
        arguments.num_fewshot,
    )
    print(*score_lines(results), sep="\n")
    print(f"kept in {folder}")
