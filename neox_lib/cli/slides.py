"""`slides`: a notebook of your copy as live slides."""

import argparse


def add(commands) -> None:
    description = (
        "Show a notebook of your copy, notebooks/mine, as live slides in a browser. Further arguments go to "
        "JupyterLab, such as --no-browser or --port=8890."
    )
    parser = commands.add_parser(
        "slides", help="show a notebook as slides", description=description, allow_abbrev=False
    )
    parser.add_argument("notebook", nargs="?", default="", help="how its name begins, such as 02")
    parser.add_argument("--lesson", type=int, metavar="N", help="begin where this lesson of TEACHING.md begins")
    parser.set_defaults(run=run, passes_on=True)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.course.learner_copy import NOTEBOOKS
    from neox_lib.course.present import find_lesson, find_notebook, show

    own = NOTEBOOKS / "mine"
    if arguments.lesson is None:
        notebook, cell = find_notebook(arguments.notebook, own), 0
    else:
        notebook, cell = find_lesson(arguments.lesson, own, NOTEBOOKS / "TEACHING.md")
    show(notebook, cell, arguments.further)
