"""What a class has handed in: a folder, a zip file or loose notebooks for each student, read and never changed."""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

LARGEST = 20 * 2**20  # bytes of one student's files; a notebook with its figures takes a third of a megabyte
PROGRESS = (".progress.json", "progress.json")


@dataclass
class Student:
    """One student's files, as `name in the folder -> content`, and what was odd about them."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def remark(self, words: str) -> None:
        if words not in self.remarks:
            self.remarks.append(words)

    def add(self, name: str, content: bytes) -> None:
        if sum(map(len, self.files.values())) + len(content) > LARGEST:
            self.remark(f"{name}: left out, the files exceed {LARGEST >> 20} MiB in total")
        else:
            self.files[name] = content

    def notebooks(self, series: dict[str, set[str]]) -> dict[str, str]:
        """Which file holds which notebook of the series: by its name, else by the exercises in it.

        `series` maps the stem of a notebook to the names that its exercises define.
        """
        found: dict[str, str] = {}
        for name in sorted(self.files, key=lambda name: (PurePosixPath(name).stem in series, name)):
            if name.endswith(".ipynb"):
                stem = next((stem for stem in series if stem in PurePosixPath(name).name), None) or self.by_content(
                    name, series
                )
                if stem is None:
                    self.remark(f"{name}: not a notebook of the series")
                    continue
                if stem in found:  # the file with the notebook's own name comes last, and stays
                    self.remark(f"{found[stem]}: ignored, {name} is the same notebook")
                found[stem] = name
        return found

    def by_content(self, name: str, series: dict[str, set[str]]) -> str | None:
        text = self.files[name].decode("utf-8", "replace")
        counts = {stem: sum(each in text for each in names) for stem, names in series.items()}
        best = max(counts, key=counts.__getitem__, default=None)
        return best if best is not None and counts[best] else None

    def predictions(self) -> dict[str, str] | None:
        """The chosen options by key, from the progress file; None where none was handed in or it can't be read."""
        for name in sorted(self.files):
            if PurePosixPath(name).name in PROGRESS:
                try:
                    chosen = json.loads(self.files[name])["predictions"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    chosen = None
                if isinstance(chosen, dict):
                    return {str(key): str(value) for key, value in chosen.items()}
                self.remark(f"{name}: not a readable progress file")
        return None


def wanted(name: str) -> bool:
    """Whether to read a file of a folder or zip: visible, and a relative path that stays inside."""
    path = PurePosixPath(name.replace("\\", "/"))
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts[:-1])
    inside = not path.is_absolute() and ".." not in path.parts and ":" not in name
    return inside and not hidden and (not path.name.startswith(".") or path.name in PROGRESS)


def read_folder(folder: Path) -> Student:
    student = Student(folder.name)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or not wanted(name):
            continue
        try:
            student.add(name, path.read_bytes() if path.stat().st_size <= LARGEST else bytes(LARGEST + 1))
        except OSError as error:
            student.remark(f"{name}: can't be read ({error.strerror})")
    return student


def read_zip(path: Path) -> Student:
    student = Student(path.stem)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.is_dir() and wanted(member.filename):
                    too_large = member.file_size > LARGEST  # by its own account; reading stops there anyway
                    with archive.open(member) as file:
                        student.add(member.filename, bytes(LARGEST + 1) if too_large else file.read(LARGEST + 1))
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError) as error:
        student.remark(f"{path.name}: can't be unpacked ({error})")
    return student


def read_class(folder: Path, stems: list[str]) -> Iterator[Student]:
    """The students of a folder, by name. A loose notebook belongs to the student in its file name.

    Raises ValueError for a folder that is missing or empty.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; it should hold a folder, a zip or notebooks for each student")
    students: dict[str, Student] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            each = read_folder(path)
        elif path.suffix == ".zip":
            each = read_zip(path)
        elif path.suffix == ".ipynb":
            each = Student(owner(path.stem, stems), {path.name: path.read_bytes()})
        else:
            continue
        known = students.setdefault(each.name, each)
        if known is not each:
            known.files |= each.files
            known.remarks += each.remarks
    if not students:
        raise ValueError(f"{folder}: nothing was handed in there: no folder, no zip, no notebook")
    yield from (students[name] for name in sorted(students))


def owner(stem: str, stems: list[str]) -> str:
    """The student's name in a loose notebook's file name.

    >>> owner("ada lovelace - 02_rotary", ["02_rotary"]), owner("02_rotary (grace)", ["02_rotary"])
    ('ada lovelace', 'grace')
    """
    for known in stems:
        stem = stem.replace(known, "")
    return re.sub(r"^[\W_]+|[\W_]+$", "", stem) or "no name"
