"""The playground's page: values that flow to the browser, and messages that come back."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets

from neox_lib.playground import views
from neox_lib.playground.state import State

FILES = Path(__file__).parents[1] / "assets" / "playground"
COSTS_PAUSE = 0.5  # seconds between two drawings of the chart while it grows


def synced(kind: type[traitlets.TraitType], default):
    """A value that flows to the page. What the page wants comes back as a message, never as a changed value."""
    return kind(default).tag(sync=True)


class Page(anywidget.AnyWidget):
    """What the browser shows of a State. All values flow one way, so that a reloaded page finds everything again."""

    _esm = FILES / "playground.js"
    _css = FILES / "playground.css"

    facts = synced(traitlets.Dict, {})
    settings = synced(traitlets.Dict, {})
    prompt = synced(traitlets.Unicode, "")
    prompt_view = synced(traitlets.Dict, {})
    text = synced(traitlets.Dict, {})  # the settled part, and a number that says whose it is
    tail = synced(traitlets.List, [])
    marks = synced(traitlets.Dict, {})  # phase, status, error, and where one looks
    bars = synced(traitlets.Dict, {})
    attention = synced(traitlets.Dict, {})
    branches = synced(traitlets.List, [])
    costs = synced(traitlets.Dict, {})
    speed = synced(traitlets.List, [])
    heard = synced(traitlets.Int, 0)  # the number of the page's last message that has arrived

    on_closed: Callable[[], None] = staticmethod(lambda: None)  # called when the page is taken away, by either side

    def __init__(self, state: State):
        super().__init__()
        # ipykernel 7 sends a page's message to the subshell in which the kernel last wrote to it. After a reload that
        # one is gone and the message lost, Stop among them: it should go where the page has addressed it.
        if self.comm is not None:
            self.comm._reply_subshell_for = lambda data, default: default  # type: ignore[attr-defined]
            self.comm.on_close(lambda message: self.on_closed())
        self.state = state
        self.shown = views.Text(state.tokenizer)
        self.publishing = threading.RLock()  # callbacks and the worker's thread both publish
        self.costs_shown = 0.0
        self.facts = views.facts_view(state)
        self.publish()

    def has_heard(self, number) -> None:
        """Tell the page that its message has arrived, so that it can say when the kernel is busy or gone."""
        with self.publishing:
            self.heard = max(self.heard, number if type(number) is int else 0)

    def close(self) -> None:
        """Take the page away. Whoever works for it is told first: nobody would see what they make."""
        self.on_closed()
        super().close()

    def publish(self) -> None:
        """Bring the page up to date: what grows while it streams, else everything; what is the same is not sent."""
        state = self.state
        with self.publishing, self.hold_sync():
            branch = state.branches.branch if len(state.branches) else None
            now = self.shown.view(branch)
            edge = [id(branch), len(now["settled"])]
            if self.text.get("edge") != edge:
                self.text = {"edge": edge, "given": now["given"], "rows": now["settled"]}
            self.tail = now["tail"]
            names = ("phase", "status", "error", "chosen")
            self.marks = {name: getattr(state, name) for name in names}
            self.bars = views.bars_view(state, self.shown)
            if state.phase != "writing" or time.monotonic() - self.costs_shown > COSTS_PAUSE:
                self.costs_shown = time.monotonic()
                self.costs = views.costs_view(state)
            if state.phase != "writing":
                self.attention = views.attention_view(state)
                self.branches = views.branches_view(state)
                self.settings = vars(state.settings) | {}
                self.speed = views.speed_view(state)
                self.publish_prompt()

    def publish_prompt(self) -> None:
        """The prompt's tokens, if they are not shown yet: a long prompt is not read again for every token."""
        state = self.state
        key = [state.prompt, state.settings.tokens]
        if self.prompt_view.get("key") != key:
            self.prompt = state.prompt
            self.prompt_view = {"key": key} | views.prompt_view(state)
