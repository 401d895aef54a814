"""The prompt playground: generation in a thread, what a session knows and does, its views, and its page.

May import inspection and every room above it; the command line imports it. Learners import `Playground`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox_lib.playground.widget import Playground

__all__ = ["Playground"]


def __getattr__(name: str):  # the page needs anywidget; the thread that notebook 07 builds does not
    if name != "Playground":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from neox_lib.playground.widget import Playground

    return Playground
