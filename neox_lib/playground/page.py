"""The playground's page: values that flow to the browser, and messages that come back."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets

from neox_lib.playground import saved, views
from neox_lib.playground.state import State

FILES = Path(__file__).parents[1] / "assets" / "playground"
COSTS_PAUSE = 0.5  # minimum seconds between redraws of the chart while it grows
SAVED_PAUSE = 2.0  # and between copies of the whole text for a reload


def synced(kind: type[traitlets.TraitType], default):
    """A value sent to the page. Requests from the page arrive as messages, never as changed values."""
    return kind(default).tag(sync=True)


class Page(anywidget.AnyWidget):
    """What the browser shows of a State. Values flow one way only, so a reloaded page shows the same again."""

    _esm = FILES / "playground.js"
    _css = FILES / "playground.css"

    facts = synced(traitlets.Dict, {})
    settings = synced(traitlets.Dict, {})
    prompt = synced(traitlets.Unicode, "")
    prompt_view = synced(traitlets.Dict, {})
    text = synced(traitlets.Dict, {})  # the settled part of the text, and which branch it belongs to
    tail = synced(traitlets.List, [])
    marks = synced(traitlets.Dict, {})  # phase, status, error and chosen position
    bars = synced(traitlets.Dict, {})
    attention = synced(traitlets.Dict, {})
    lens = synced(traitlets.Dict, {})
    branches = synced(traitlets.List, [])
    costs = synced(traitlets.Dict, {})
    speed = synced(traitlets.Unicode, "")
    needs = synced(traitlets.Unicode, "")
    saved = synced(traitlets.Dict, {})  # everything, for the page to keep in case it is reloaded
    heard = synced(traitlets.Int, 0)  # the number of the last message received from the page

    on_closed: Callable[[], None] = staticmethod(lambda: None)  # called when either side closes the page

    def __init__(self, state: State):
        super().__init__()
        # ipykernel 7 sends a page's message to the subshell in which the kernel last wrote to it. After a reload that
        # one is gone and the message lost, Stop among them: so it goes to the subshell that the page addressed.
        if self.comm is not None:
            self.comm._reply_subshell_for = lambda data, default: default  # type: ignore[attr-defined]
            self.comm.on_close(lambda message: self.on_closed())
        self.state = state
        self.shown = views.Text(state.tokenizer)
        self.publishing = threading.RLock()  # callbacks and the worker's thread both publish
        self.costs_shown = self.saved_at = 0.0
        self.facts = views.facts_view(state)
        self.publish()

    def has_heard(self, number) -> None:
        """Acknowledge a message, so that the page can tell when the kernel is busy or gone."""
        with self.publishing:
            self.heard = max(self.heard, number if type(number) is int else 0)

    def close(self) -> None:
        """Close the page. The callback runs first, since work for a closed page would be wasted."""
        self.on_closed()
        super().close()

    def publish(self) -> None:
        """Update the page: while text streams only what grows, else everything. Unchanged values are not sent."""
        state = self.state
        with self.publishing, self.hold_sync():
            branch = state.branches.branch if len(state.branches) else None
            now = self.shown.view(branch)
            edge = [id(branch), len(now["settled"])]
            if self.text.get("edge") != edge:
                self.text = {"edge": edge, "rows": now["settled"]}
            self.tail = now["tail"]
            names = ("phase", "status", "error", "chosen")
            self.marks = {name: getattr(state, name) for name in names}
            self.bars = views.bars_view(state, self.shown)
            if state.phase != "writing" or time.monotonic() - self.costs_shown > COSTS_PAUSE:
                self.costs_shown = time.monotonic()
                self.costs = views.costs_view(state)
            if state.phase != "writing" or time.monotonic() - self.saved_at > SAVED_PAUSE:
                self.saved_at = time.monotonic()
                self.saved = saved.content(state)
            if state.phase != "writing":
                self.attention, self.lens = views.attention_view(state), views.lens_view(state)
                self.branches = views.branches_view(state)
                self.settings = vars(state.settings) | {}
                self.speed, self.needs = views.speed_view(state), views.needs_view(state)
                self.publish_prompt()

    def publish_prompt(self) -> None:
        """Send the prompt's tokens if they have changed, so a long prompt is not tokenized again for every token."""
        state = self.state
        key = [state.prompt, state.settings.tokens]
        if self.prompt_view.get("key") != key:
            self.prompt = state.prompt
            self.prompt_view = {"key": key} | views.prompt_view(state)
