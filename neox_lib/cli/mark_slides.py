"""`mark-slides`: which cell of a notebook stands on which slide."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = (
        "Write into the notebooks' metadata which cell begins a slide, which goes on with it and which is left "
        "out. The cell tags slide-new and slide-skip overrule the rule."
    )
    parser = commands.add_parser("mark-slides", help="mark which cells begin a slide", description=description)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of the series")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something differs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from neox_lib.checkpoints.atomic import write_bytes_atomically
    from neox_lib.course.learner_copy import NOTEBOOKS
    from neox_lib.course.slides import marked

    paths = arguments.notebooks or sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    differing = {path: text for path in paths if (text := marked(path)) is not None}
    for path, text in differing.items():
        if not arguments.check:
            write_bytes_atomically(path, text.encode("utf-8"))
        print(f"{path.name}: {'its slide marks differ from the rule' if arguments.check else 'slides written'}")
    if arguments.check and differing:
        print("To write them: python -m neox_lib mark-slides")
    return 1 if arguments.check and differing else 0
