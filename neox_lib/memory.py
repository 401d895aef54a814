"""How much memory is free: on the system, and within the limit of the container that we run in.

JupyterHub, Binder and Docker give each user a control group (cgroup) with a limit, and kill what exceeds it without a
message; the system's own figures ignore that limit.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that a program can still take."""
    import psutil  # late: the doctor reads this file before anything is installed

    return min([psutil.virtual_memory().available, *free_in_groups()])


def free_in_groups() -> Iterator[int]:
    """Bytes left in each control group of this process that has a limit, its own and its parents.

    File pages count as free, as they do for the system: they are dropped when memory is short. The two versions of
    cgroups differ in their file names; a container may see its own group at the root, or under the host's path.
    """
    lines = []
    with contextlib.suppress(OSError):
        lines = OWN_GROUPS.read_text("utf-8").splitlines()
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            top, limit, used, files = GROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, used, files = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / own.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError, IndexError):  # no such group, or "max": no limit
                most = int((folder / limit).read_text("utf-8"))
                statistics = dict(row.split() for row in (folder / "memory.stat").read_text("utf-8").splitlines())
                cached = sum(int(statistics.get(f"{files}{kind}_file", 0)) for kind in ("inactive", "active"))
                yield max(0, most - max(0, int((folder / used).read_text("utf-8")) - cached))
