"""`promote`: the notebooks' pieces into the library."""

import argparse
from pathlib import Path


def add(commands) -> None:
    description = (
        "Write the pieces that the notebooks build into the library. A piece that can't be imported is taken back. "
        "`git diff neox_lib` shows what changed, `git checkout neox_lib` takes it back."
    )
    parser = commands.add_parser("promote", help="move the notebooks' pieces into the library", description=description)
    parser.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="such as notebooks/mine, your copy")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--check", action="store_true", help="change nothing; show differences, exit 1 if any")
    direction.add_argument("--pull", action="store_true", help="the other way: library to notebooks, for authors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from neox_lib.course import promote

    folder = arguments.folder or promote.NOTEBOOKS
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of notebooks")
    if arguments.check:
        found = promote.differences(folder)
        print("\n".join(found) if found else "Notebooks and library agree.")
        return 1 if found else 0
    changed = promote.pull(folder) if arguments.pull else promote.promote(folder)
    print(f"Changed: {', '.join(changed)}." if changed else "Nothing to change: notebooks and library agree.")
    if arguments.pull:
        return 0
    older = promote.of_older_originals(promote.collect(folder))
    if older:
        names = ", ".join(f"{each.module}.{each.definition.name}" for each in older[:3])
        more = f" and {len(older) - 3} more" if len(older) > 3 else ""
        print(
            f"Left out, as your copy is older than the library and you did not change them: {names}{more}. "
            "make lab-refresh puts the new originals beside your copy."
        )
    if changed:
        print("Restart the kernels of other notebooks: they still hold the old pieces.")
    return 0
