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
    parser.set_defaults(run=run, passes_on=True)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.course.learner_copy import NOTEBOOKS
    from neox_lib.course.present import find_notebook, show

    show(find_notebook(arguments.notebook, NOTEBOOKS / "mine"), arguments.further)
