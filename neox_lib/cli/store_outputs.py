"""`store-outputs`: run notebooks and keep what they show."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = (
        "Run notebooks from top to bottom and store their outputs, in a form that does not change when nothing has: no "
        "timings, no live widgets. A cell that fails leaves its file as it was. The minutes of each notebook "
        "of the series are computed, and written where they are said. `make outputs` does it for the series."
    )
    parser = commands.add_parser("store-outputs", help="run notebooks, keep their outputs", description=description)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import os
    import tempfile

    from neox_lib.course.learner_copy import NOTEBOOKS
    from neox_lib.course.minutes import write_minutes
    from neox_lib.course.store import run_and_store

    for path in arguments.notebooks:
        with tempfile.TemporaryDirectory() as folder:  # nobody's earlier answers may get into the outputs
            os.environ["NEOX_PROGRESS"] = str(Path(folder) / "progress.json")
            run_and_store(path)
        if path.resolve().parent == NOTEBOOKS:
            write_minutes(path.resolve())
        print(f"stored {path}")
