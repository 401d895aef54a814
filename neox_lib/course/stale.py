"""Old names that a learner's copy of a notebook still uses."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from neox_lib.course.imports import imported_names
from neox_lib.course.moved import step, successor


@dataclass
class Stale:
    """Old names: the new place of each, or its replacement if it is gone."""

    moved: dict[str, str] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.moved or self.gone)


def stale_names(cells: Iterable[dict]) -> Stale:
    """The old names that a notebook's cells import, or name in their metadata."""
    stale = Stale()
    for cell in cells:
        module = cell.get("metadata", {}).get("module")
        names = [module] if isinstance(module, str) else []
        if cell.get("cell_type") == "code":
            names += imported_names("".join(cell.get("source", "")))
        stale.gone |= {name: instead for name in names if (instead := successor(name)) is not None}
        stale.moved |= dict(filter(None, map(step, names)))
    return stale
