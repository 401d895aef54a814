"""`promote`: the notebooks' pieces into the library."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox_lib.course.promote import Promoted


def add(commands) -> None:
    description = (
        "Write the pieces that the notebooks build into the library. A piece that can't be imported is rolled back; "
        "one that fails its exercise's check is kept, and the exit status is 1. "
        "`git diff neox_lib` shows what changed, `git checkout neox_lib` undoes it."
    )
    parser = commands.add_parser("promote", help="move the notebooks' pieces into the library", description=description)
    parser.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="such as notebooks/mine, your copy")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--check", action="store_true", help="change nothing; show differences, exit 1 if any")
    direction.add_argument(
        "--pull", action="store_true", help="copy from the library to the notebooks instead, for authors"
    )
    parser.set_defaults(run=run)


def left_out(older: "list[Promoted]") -> str:
    """One line on the pieces of a copy that are unchanged from an older original."""
    names = ", ".join(f"{each.module}.{each.definition.name}" for each in older[:3])
    more = f" and {len(older) - 3} more" if len(older) > 3 else ""
    return (
        f"Left out, since your text is the old original's and the library's is newer: {names}{more}. "
        "make lab-refresh puts the new originals beside your copy."
    )


def run(arguments: argparse.Namespace) -> int:
    from neox_lib.course import promote
    from neox_lib.course.after_promotion import failures_in_a_fresh_process

    folder = arguments.folder or promote.NOTEBOOKS
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of notebooks")
    if arguments.check:
        found, older = promote.differences(folder), promote.of_older_originals(promote.collect(folder))
        if found or not older:
            print("\n".join(found) if found else "Notebooks and library agree.")
        if older:
            print(left_out(older))
        return 1 if found else 0
    changed = promote.pull(folder) if arguments.pull else promote.promote(folder)
    older = [] if arguments.pull else promote.of_older_originals(promote.collect(folder))
    if changed:
        print(f"Changed: {', '.join(changed)}.")
    else:
        print("Nothing to change." if older else "Nothing to change: notebooks and library agree.")
    if older:
        print(left_out(older))
    if changed and not arguments.pull:
        if stale := promote.older_copies(folder, changed):
            print(
                f"{', '.join(stale)}: these copies were written for an older library. If it fails now, git checkout "
                "neox_lib restores the library."
            )
        print("Restart the kernels of other notebooks: they still hold the old pieces.")
        if failing := failures_in_a_fresh_process(changed):
            print(f"{failing}\nThe library holds your text all the same; git checkout neox_lib takes it back.")
            return 1
    return 0
