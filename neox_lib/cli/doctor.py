"""`doctor`: whether this machine is ready for class."""

import argparse


def add(commands) -> None:
    description = (
        "Look at this machine before class: Python, memory, disk, packages, widgets, a port, and whether the shipped "
        "model writes, and how fast. Takes seconds, at most a minute or so, and needs no network. Exit code 1 when "
        "something must be fixed."
    )
    parser = commands.add_parser("doctor", help="is this machine ready for class?", description=description)
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    from neox_lib.classroom.doctor import examine_and_report

    text, to_fix = examine_and_report()
    print(text)
    return 1 if to_fix else 0
