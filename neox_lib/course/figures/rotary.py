"""The figures of notebook 02: two hands that turn with position, and which numbers of a head are partners."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.patches import Circle, FancyArrowPatch, Rectangle, Wedge
from torch import Tensor

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, SKY, VERMILION, Picture, finish_axes, new_figure

LEGEND = "solid: query     dashed: key     grey: the angle between them"


def hands(places: Sequence[tuple[int, int]], speed: float) -> Picture:
    """One dial per (query position, key position): both hands start at the right and turn `speed` radians per position.

    Both have length 1, so their score is the cosine of the angle between them.
    """
    figure = new_figure(4.4 * len(places), 4.4)
    parts = []
    for axes, (query, key) in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        axes.set_xlim(-1.25, 1.25)
        axes.set_ylim(-1.25, 1.25)
        axes.set_aspect("equal")
        axes.axis("off")
        axes.add_patch(Circle((0, 0), 1, fill=False, color="#999999"))
        first, last = sorted(math.degrees(position * speed) for position in (query, key))
        axes.add_patch(Wedge((0, 0), 0.45, first, last, facecolor="#dddddd"))
        for position, colour, style in ((query, BLUE, "-"), (key, VERMILION, "--")):
            tip = (math.cos(position * speed), math.sin(position * speed))
            hand = FancyArrowPatch((0, 0), tip, arrowstyle="-|>", mutation_scale=20, shrinkA=0, shrinkB=0)
            hand.set(color=colour, linewidth=3, linestyle=style)
            axes.add_patch(hand)
        distance, score = query - key, math.cos((query - key) * speed)
        title = f"query at {query}, key at {key}"
        axes.set_title(f"{title}\ndistance {distance}, score {score:.2f}", fontsize=FONT_SIZE + 1)
        parts.append(f"{title}: {abs(distance) * speed:.1f} radians between the hands, score {score:.2f}")
    figure.supxlabel(LEGEND, fontsize=FONT_SIZE)
    return Picture(figure, f"Dials with two hands, one for the query and one for the key. {'; '.join(parts)}.")


@dataclass(frozen=True)
class TurningPair:
    """Two sliders that turn a query's and a key's hand; where no kernel runs them, two dials side by side."""

    speed: float = 0.5

    def _repr_mimebundle_(self, **_) -> dict:
        static = hands(((3, 1), (8, 6)), self.speed)._repr_mimebundle_()
        return (self.widget()._repr_mimebundle_() or {}) | static

    def widget(self):
        """The sliders, and the dial whose hands they turn."""
        import ipywidgets

        query = ipywidgets.IntSlider(3, 0, 20, description="query at")
        key = ipywidgets.IntSlider(1, 0, 20, description="key at")
        dial = ipywidgets.HTML()

        def draw(_=None) -> None:
            dial.value = hands(((query.value, key.value),), self.speed)._repr_mimebundle_()["text/html"]

        query.observe(draw, "value")
        key.observe(draw, "value")
        draw()
        return ipywidgets.VBox([query, key, dial])


def comebacks(distances: Tensor, one: Tensor, together: Tensor) -> Picture:
    """Scores against distance, of one pair (thin) and of all pairs together (thick): each a `[distances]` tensor."""
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    axes.plot(distances.numpy(), one.numpy(), "--", color=BLUE, linewidth=1.3, label="pair 0 alone")
    axes.plot(distances.numpy(), together.numpy(), "-", color=VERMILION, linewidth=3, label="all pairs")
    title = "One hand comes round again, all of them together do not"
    finish_axes(axes, title, "distance between query and key, tokens", "score (1 for the same place)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=FONT_SIZE, frameon=False)
    alt = (
        f"Two curves over distances up to {int(distances[-1])} tokens. Pair 0 alone swings between {one.min():.0f} and "
        f"1 and comes close to 1 about every 6 tokens. All pairs together start at 1, fall, swing gently, and reach "
        f"{together[1:].max():.2f} at most after that."
    )
    return Picture(figure, alt)


def partners(layouts: Mapping[str, Sequence[tuple[int, int]]], head_dim: int) -> Picture:
    """The numbers of a head as a row of boxes, an arc between the partners of each pair; one row per layout.

    Boxes without a partner are white: they are not turned.
    """
    figure = new_figure(9, 1.8 * len(layouts))
    for axes, (name, pairs) in zip(figure.subplots(len(layouts), 1, squeeze=False)[:, 0], layouts.items(), strict=True):
        axes.set_xlim(-0.2, head_dim + 0.2)
        axes.set_ylim(-0.1, 2.2)
        axes.axis("off")
        axes.set_title(name, fontsize=FONT_SIZE + 1, loc="left")
        turning = {number for pair in pairs for number in pair}
        for number in range(head_dim):
            colour = SKY if number in turning else "white"
            axes.add_patch(Rectangle((number + 0.05, 0), 0.9, 0.9, facecolor=colour, edgecolor="black"))
            axes.text(number + 0.5, 0.45, str(number), ha="center", va="center", fontsize=FONT_SIZE)
        for first, second in pairs:
            bend = -0.35 if second - first > 1 else -0.9
            arc = FancyArrowPatch((first + 0.5, 0.95), (second + 0.5, 0.95), connectionstyle=f"arc3,rad={bend}")
            arc.set(arrowstyle="<->", mutation_scale=12, linewidth=2, color=BLUE)
            axes.add_patch(arc)
    told = "; ".join(f"{name}: " + ", ".join(f"{a} with {b}" for a, b in pairs) for name, pairs in layouts.items())
    return Picture(
        figure, f"Rows of {head_dim} numbered boxes with an arc between partners. {told}. The others have no partner."
    )
