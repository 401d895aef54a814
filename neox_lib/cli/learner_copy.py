"""`learner-copy`: the notebooks in a folder of your own, as `make lab` and `make lab-refresh` keep it."""

import argparse
import tempfile
from pathlib import Path


def add(commands) -> None:
    description = (
        "Copy new notebooks to notebooks/mine, your own folder, and report originals that have changed since. Never "
        "overwrites what is yours."
    )
    parser = commands.add_parser("learner-copy", help="your own copy of the notebooks", description=description)
    parser.add_argument(
        "--edition", choices=["student"], help="copy the student edition, without answers, to the folder student"
    )
    parser.add_argument("--refresh", action="store_true", help="put changed originals beside your copies")
    parser.add_argument("--originals", type=Path, help="folder to copy from (default: the notebooks of this clone)")
    parser.add_argument("--mine", type=Path, help="folder to copy to (default: the folder mine inside it, or student)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.course.learner_copy import NOTEBOOKS, describe, update_copy

    originals = arguments.originals or NOTEBOOKS
    mine = arguments.mine or originals / (arguments.edition or "mine")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.edition:
            from neox_lib.classroom.student import write_student_edition

            write_student_edition(Path(folder), originals)
            originals = Path(folder)
        again = "make lab-refresh" + (f" EDITION={arguments.edition}" if arguments.edition else "")
        print(describe(update_copy(originals, mine, arguments.refresh), originals, mine, again))
