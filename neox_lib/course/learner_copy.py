"""The learner's own copy of the notebooks: made once, never overwritten, and compared with newer originals.

`notebooks/mine/.originals.json` holds the SHA-256 that each original had when it was copied. So "changed" means that
the content of the original differs; dates don't count, since a fresh clone resets them.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from neox_lib.checkpoints.atomic import write_bytes_atomically
from neox_lib.course.stale import Stale, stale_names

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
RECORD = ".originals.json"


@dataclass
class Report:
    """What one run did, as paths relative to the notebooks folder. `beside` maps a changed original to its new file,
    `stale` a copy to the names in it that have moved or are gone.
    """

    copied: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)
    stale: dict[str, Stale] = field(default_factory=dict)


def update_copy(originals: Path, mine: Path, refresh: bool = False) -> Report:
    """Bring `mine` up to date with `originals` without changing any file that is in it.

    A notebook or image that `mine` lacks is copied. A notebook whose original has changed since is reported; with
    `refresh` the new original is put beside it as NAME.new.ipynb, and is not reported again. A missing `originals`
    raises FileNotFoundError; a damaged record only means that differing copies are reported once more.
    """
    if not originals.is_dir():
        raise FileNotFoundError(f"{originals}: no such folder; the notebooks come with a clone, not with a pip install")
    mine.mkdir(parents=True, exist_ok=True)
    record = read_record(mine / RECORD)
    report = Report()
    for name in lesson_files(originals):
        content = (originals / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        copy = mine / name
        if not os.path.lexists(copy):
            write_bytes_atomically(copy, content)
            report.copied.append(name)
        elif record.get(name) != digest and copy.read_bytes() != content:
            report.changed.append(name)
            if not refresh:
                continue
            report.beside[name] = put_beside(copy, content).relative_to(mine).as_posix()
        record[name] = digest
    write_record(mine / RECORD, record)
    report.stale = stale_copies(mine)
    return report


def stale_copies(mine: Path) -> dict[str, Stale]:
    """The notebooks of a copy that use old names; originals put beside them and damaged files are skipped."""
    found = {}
    for path in sorted(mine.glob("*.ipynb")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if ".new" not in path.name and (stale := stale_names(json.loads(path.read_text("utf-8"))["cells"])):
                found[path.name] = stale
    return found


def lesson_files(originals: Path) -> list[str]:
    """The notebooks, the style of their slides, and everything under images/, as sorted relative paths with `/`."""
    images = (path for path in originals.glob("images/**/*") if path.is_file())
    found = [path.relative_to(originals) for pattern in ("*.ipynb", "rise.css") for path in originals.glob(pattern)]
    found += [path.relative_to(originals) for path in images]
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def put_beside(copy: Path, content: bytes) -> Path:
    """Write `content` as NAME.new.ipynb next to the copy, or NAME.new2.ipynb ... if that name is taken by other
    content.
    """
    number = 1
    while True:
        path = copy.with_name(f"{copy.stem}.new{number if number > 1 else ''}{copy.suffix}")
        if not os.path.lexists(path):
            write_bytes_atomically(path, content)
            return path
        if path.read_bytes() == content:
            return path
        number += 1


def read_record(path: Path) -> dict[str, str]:
    """The originals' digests by relative path; empty if there is no record or it is damaged."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(path: Path, record: dict[str, str]) -> None:
    content = json.dumps(record, indent=1, sort_keys=True) + "\n"
    write_bytes_atomically(path, content.encode("utf-8"))


def describe(report: Report, originals: Path, mine: Path, refresh: str = "make lab-refresh") -> str:
    """The report as text, one line per thing that the learner should know; `refresh` brings new originals."""
    lines = []
    if report.copied:
        lines.append(f"Copied to {mine}: {', '.join(report.copied)}. This is your copy; nothing here overwrites it.")
    for name in report.changed:
        if name in report.beside:
            lines.append(f"{name}: the newer original is beside your copy, as {report.beside[name]}.")
        elif name not in report.stale:
            lines.append(f"{name}: the original has changed since you copied it. To get it too: {refresh}")
    lines += describe_stale(report, refresh)
    if not lines:
        lines.append(f"{mine} is up to date." if lesson_files(originals) else f"No notebooks in {originals} yet.")
    return "\n".join(lines)


def describe_stale(report: Report, refresh: str, most: int = 3) -> list[str]:
    """Lines on the copies that use moved or removed names, with the first few of the moved ones."""
    lines = [
        f"{copy}: neox_lib.{name} is gone; neox_lib.{instead} replaces it."
        for copy, stale in report.stale.items()
        for name, instead in stale.gone.items()
    ]
    uses = Counter(entry for stale in report.stale.values() for entry in stale.moved.items())
    if uses:
        first = ", ".join(f"neox_lib.{old} is now neox_lib.{new}" for (old, new), _ in uses.most_common(most))
        more = f", and {len(uses) - most} more have moved" if len(uses) > most else ""
        copies = ", ".join(copy for copy, stale in report.stale.items() if stale.moved)
        lines.append(f"{copies}: names that your copy uses have moved: {first}{more}.")
    if (set(report.changed) & set(report.stale)) - set(report.beside):
        lines.append(f"Nothing is changed in your copies. To get the new originals beside them: {refresh}")
    elif lines:
        lines.append("Nothing is changed in your copies; the new originals are beside them, as NAME.new.ipynb.")
    return lines
