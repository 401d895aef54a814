"""`student`: the series for students, without solutions and answers."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = (
        "Write the notebooks for students: without solutions, bug exhibits' answers and teacher's notes, exercises as "
        "stubs. The folder must be new or empty."
    )
    parser = commands.add_parser("student", help="the notebooks without their answers", description=description)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.classroom.student import write_student_edition

    print("\n".join(write_student_edition(arguments.out)))
    print(f"Wrote {arguments.out}. Students need no such folder: make lab EDITION=student opens a copy of their own.")
