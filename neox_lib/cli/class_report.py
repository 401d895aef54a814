"""`class-report`: the checks, run on what a class has handed in."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = (
        "Run the checks of the exercises on what students wrote: a folder, a zip file or loose notebooks for each. "
        "Each student's are checked in a copy, in a kernel with bounds on time, memory and output. This is no "
        "sandbox: what the students wrote runs with your rights, so don't check strangers' notebooks with it."
    )
    parser = commands.add_parser("class-report", help="check what a class has handed in", description=description)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what was handed in")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where the table goes (default: DIR/class-report.csv)")
    parser.add_argument("--seconds", type=float, default=60, help="what one exercise may take (default: 60)")
    parser.add_argument("--gib", type=float, default=2, help="memory that one student's pieces may take (default: 2)")
    parser.add_argument("--jobs", type=int, help="students at a time (default: as many as there are cores, up to 4)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.classroom.kernel import Limits
    from neox_lib.classroom.report import class_report

    if not (arguments.seconds > 0 and arguments.gib > 0 and (arguments.jobs or 1) > 0):
        raise ValueError("--seconds, --gib and --jobs must be more than 0")
    limits = Limits(seconds=arguments.seconds, memory=int(arguments.gib * 2**30))
    report = class_report(arguments.folder, limits, arguments.jobs)
    path = arguments.csv or arguments.folder / "class-report.csv"
    report.write_csv(path)
    print("\n\n".join(each for each in (report.table(), report.details()) if each))
    print(f"\nAll of it, exercise by exercise: {path}")
