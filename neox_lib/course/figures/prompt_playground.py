"""The figures of notebook 07: who works and who waits, as timelines, and a small page with its still form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, SKY, VERMILION, Picture, new_figure

WAITING = {"facecolor": "white", "hatch": "///"}


@dataclass(frozen=True)
class SmallPage:
    """A widget, and what a reader without a kernel sees in its place: `words`."""

    widget: Any
    words: str

    def _repr_mimebundle_(self, **_) -> dict:
        return self.widget._repr_mimebundle_() | {"text/html": f"<p><i>{self.words}</i></p>", "text/plain": self.words}


def lanes(axes: Axes, title: str, names: Sequence[str], end: float) -> None:
    """One lane per name, the first on top, from time 0 to `end`."""
    axes.set_xlim(0, end)
    axes.set_ylim(len(names) - 0.35, -0.65)
    axes.set_yticks(range(len(names)), names, fontsize=FONT_SIZE)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, fontsize=FONT_SIZE + 1, loc="left")


def bar(axes: Axes, lane: int, start: float, length: float, label: str = "", **look) -> None:
    """Work, or waiting, in a lane; the label stands in the bar."""
    axes.barh(lane, length, left=start, height=0.62, edgecolor="black", **look)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if look.get("hatch") else None
    axes.text(start + length / 2, lane, label, ha="center", va="center", fontsize=FONT_SIZE, bbox=box)


def streaming() -> Picture:
    """Six tokens, once shown together at the end and once as they come."""
    figure = new_figure(11, 4.4)
    above, below = figure.subplots(2, 1)
    lanes(above, "All at the end: the reader waits", ["model", "page"], 13.4)
    lanes(below, "Streamed: each token is drawn as soon as it is there", ["model", "page"], 13.4)
    for token in range(6):
        bar(above, 0, 1.8 * token, 1.8, f"token {token + 1}", facecolor=SKY)
        bar(below, 0, 2.2 * token, 1.8, f"token {token + 1}", facecolor=SKY)
        bar(below, 1, 2.2 * token + 1.8, 0.4, facecolor=ORANGE)
    bar(above, 1, 0, 10.8, "nothing to see", **WAITING)
    bar(above, 1, 10.8, 0.4, facecolor=ORANGE)
    below.set_xlabel("time", fontsize=FONT_SIZE)
    alt = (
        "Two timelines of a model and a page, from left to right. Above, the model makes six tokens while the page "
        "waits, and the page draws once at the end. Below, the page draws for a short moment after each token; in that "
        "moment the model waits."
    )
    return Picture(figure, alt)


def who_waits() -> Picture:
    """Generate and then Stop are pressed: the loop inside the callback, and the loop in a thread."""
    figure = new_figure(11, 5.4)
    above, below = figure.subplots(2, 1, height_ratios=[2, 3])
    lanes(above, "The loop runs inside the callback", ["kernel", "queue"], 12)
    bar(above, 0, 0.4, 8.6, "Generate: 50 tokens", facecolor=SKY)
    bar(above, 1, 3.4, 5.6, "Stop waits", **WAITING)
    bar(above, 0, 9, 1.1, "Stop", facecolor=ORANGE)
    lanes(below, "The callback starts a thread, and returns", ["kernel", "queue", "thread"], 12)
    bar(below, 0, 0.4, 0.6, facecolor=SKY)
    below.text(1.1, 0, "Generate", ha="left", va="center", fontsize=FONT_SIZE)
    bar(below, 0, 3.4, 1.1, "Stop", facecolor=ORANGE)
    bar(below, 2, 1, 2.9, "tokens", facecolor=SKY)
    for axes in (above, below):
        axes.axvline(3.4, color=VERMILION, linestyle="--", linewidth=2)
        axes.text(3.5, -0.48, "Stop is pressed", ha="left", va="center", fontsize=FONT_SIZE - 1, color="black")
    below.text(4.1, 2, "the flag is up: the loop ends", ha="left", va="center", fontsize=FONT_SIZE)
    below.set_xlabel("time", fontsize=FONT_SIZE)
    alt = (
        "Two timelines in which Stop is pressed at the same moment. Above, the kernel is busy with Generate's 50 "
        "tokens; Stop waits in the queue and runs after the last token. Below, Generate's callback returns at once and "
        "a thread makes the tokens; Stop runs at once in the kernel, and the thread ends after its token."
    )
    return Picture(figure, alt)


def updates(token_ms: int, tokens: int, pause_ms: int) -> Picture:
    """When tokens come and when a throttle lets the page be drawn, in milliseconds; and one draw at the end."""
    times = [token_ms * number for number in range(1, tokens + 1)]
    shown: list[int] = []
    for now in times:
        if not shown or now - shown[-1] >= pause_ms:
            shown.append(now)
    late = [now for now in times if now > shown[-1]]
    figure = new_figure(11, 3.4)
    axes = figure.add_subplot()
    lanes(axes, "Every token is taken, few are drawn, and the end is drawn", ["taken", "drawn"], times[-1] + 24)
    for now in times:
        look = {"color": VERMILION, "linewidth": 4} if now in late else {"color": BLUE, "linewidth": 2}
        axes.plot([now, now], [-0.3, 0.3], **look)  # type: ignore[arg-type]
    for now in shown:
        axes.plot([now, now], [0.7, 1.3], color="black", linewidth=5)
    axes.plot([times[-1] + 3] * 2, [0.7, 1.3], color=VERMILION, linewidth=8)
    axes.text(times[-1] + 6, 1, "at\nthe end", ha="left", va="center", fontsize=FONT_SIZE)
    axes.set_xticks(range(0, times[-1] + 1, pause_ms))
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.set_xlabel("milliseconds", fontsize=FONT_SIZE)
    alt = (
        f"{tokens} tokens, one every {token_ms} ms, as thin lines; below them {len(shown)} draws, {pause_ms} ms apart "
        f"or a little more. The last {len(late)} tokens come after the last of these draws; one more draw at the end "
        "shows them."
    )
    return Picture(figure, alt)
