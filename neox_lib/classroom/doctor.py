"""Checks a student's machine before class: what works, and in plain words how to fix what does not.

It needs no network, and runs even if torch or a piece of neox_lib is broken.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from neox_lib.classroom.machine import (
    NOTHING_INSTALLED,
    SET_UP,
    Finding,
    look_at_disk,
    look_at_memory,
    look_at_port,
    look_at_python,
)
from neox_lib.classroom.packages import (
    FOUND,
    look_at_libraries,
    look_at_model,
    look_at_packages,
    look_at_widgets,
    missing_packages,
)

QUICK = (look_at_python, look_at_memory, look_at_disk, look_at_port, look_at_packages)
IN_PROCESSES = (look_at_model, look_at_libraries, look_at_widgets)


def guarded(look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """The findings of one look; a look that itself fails is a finding too."""
    try:
        found = look()
    except Exception as error:
        found = Finding("doctor", "fix", f"{look.__name__} failed: {type(error).__name__}: {error}", SET_UP)
    return found if isinstance(found, list) else [found]


def examine() -> list[Finding]:
    """All findings, in the order in which a person would fix them.

    Takes a few seconds, a minute at most. If the libraries are not installed yet, that is the only finding.
    """
    if set(FOUND) <= set(missing_packages()):
        return [Finding("packages", "fix", "nothing is installed yet", NOTHING_INSTALLED)]
    with ThreadPoolExecutor(len(IN_PROCESSES)) as pool:
        waiting = [pool.submit(guarded, look) for look in IN_PROCESSES]
        quick = [finding for look in QUICK for finding in guarded(look)]
        return quick + [finding for each in waiting for finding in each.result()]


def report(findings: list[Finding], seconds: float) -> str:
    """The findings as a text, and a last line that says whether this machine is ready."""
    to_fix = sum(finding.state == "fix" for finding in findings)
    slow = any(finding.state == "slow" for finding in findings)
    verdict = "Ready for class."
    if to_fix or slow:
        verdict = f"{to_fix} to fix, then run this again." if to_fix else "Slow, not broken: run this once more."
    return "\n".join([*map(str, findings), "", f"{verdict} ({seconds:.0f} s)"])


def examine_and_report() -> tuple[str, bool]:
    """The text, and whether something must be fixed."""
    started = time.monotonic()
    findings = examine()
    return report(findings, time.monotonic() - started), any(finding.state == "fix" for finding in findings)
