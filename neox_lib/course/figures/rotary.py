"""The figures of notebook 02: hands that turn with position, and which numbers of a head are partners."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.patches import Circle, FancyArrowPatch, Rectangle, Wedge
from torch import Tensor

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, SKY, VERMILION, Picture, finish_axes, new_figure

LEGEND = "solid: query     dashed: key     grey: the angle between them"


def empty_dial(axes) -> None:
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    axes.axis("off")
    axes.add_patch(Circle((0, 0), 1, fill=False, color="#999999"))


def draw_hand(axes, angle: float, colour: str, style: str = "-") -> None:
    tip = (math.cos(angle), math.sin(angle))
    hand = FancyArrowPatch((0, 0), tip, arrowstyle="-|>", mutation_scale=20, shrinkA=0, shrinkB=0)
    hand.set(color=colour, linewidth=3, linestyle=style)
    axes.add_patch(hand)


def hands(places: Sequence[tuple[int, int]], frequency: float) -> Picture:
    """One dial per (query position, key position): both hands start at the right.

    They turn by `frequency` radians per position and have length 1, so the score is the cosine of the angle between.
    """
    figure = new_figure(4.4 * len(places), 4.4)
    parts = []
    for axes, (query, key) in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        empty_dial(axes)
        first, last = sorted(math.degrees(position * frequency) for position in (query, key))
        axes.add_patch(Wedge((0, 0), 0.45, first, last, facecolor="#dddddd"))
        for position, colour, style in ((query, BLUE, "-"), (key, VERMILION, "--")):
            draw_hand(axes, position * frequency, colour, style)
        distance, score = query - key, math.cos((query - key) * frequency)
        title = f"query at {query}, key at {key}"
        axes.set_title(f"{title}\ndistance {distance}, score {score:.2f}", fontsize=FONT_SIZE + 1)
        parts.append(f"{title}: {abs(distance) * frequency:.1f} radians between the hands, score {score:.2f}")
    figure.supxlabel(LEGEND, fontsize=FONT_SIZE)
    return Picture(figure, f"Dials with two hands, one for the query and one for the key. {'; '.join(parts)}.")


@dataclass(frozen=True)
class TurningPair:
    """Two sliders that turn a query's and a key's hand; where no kernel runs them, two dials side by side."""

    frequency: float = 0.5

    def _repr_mimebundle_(self, **_) -> dict:
        static = hands(((3, 1), (8, 6)), self.frequency)._repr_mimebundle_()
        return (self.widget()._repr_mimebundle_() or {}) | static

    def widget(self):
        """The sliders, and the dial whose hands they turn."""
        import ipywidgets

        query = ipywidgets.IntSlider(3, 0, 20, description="query at")
        key = ipywidgets.IntSlider(1, 0, 20, description="key at")
        dial = ipywidgets.HTML()

        def draw(_=None) -> None:
            dial.value = hands(((query.value, key.value),), self.frequency)._repr_mimebundle_()["text/html"]

        query.observe(draw, "value")
        key.observe(draw, "value")
        draw()
        return ipywidgets.VBox([query, key, dial])


def clock(frequencies: Mapping[int, float], positions: Sequence[int]) -> Picture:
    """A row of dials per position, a dial per pair, `{pair: radians per position}`; all hands start at the right."""
    figure = new_figure(2.3 * len(frequencies), 2.2 * len(positions))
    grid = figure.subplots(len(positions), len(frequencies), squeeze=False)
    for row, position in zip(grid, positions, strict=True):
        for axes, (pair, frequency) in zip(row, frequencies.items(), strict=True):
            empty_dial(axes)
            draw_hand(axes, position * frequency, BLUE)
            turns = position * frequency / (2 * math.pi)
            axes.set_title(f"position {position}, pair {pair}\n{turns:.2f} turns", fontsize=FONT_SIZE)
    told = "; ".join(
        f"position {position}: "
        + ", ".join(f"pair {pair} {position * each / (2 * math.pi):.2f}" for pair, each in frequencies.items())
        for position in positions
    )
    return Picture(figure, f"Dials with one hand each. Turns made at each position. {told}.")


@dataclass(frozen=True)
class Clock:
    """A slider over the positions that turns the hands of several pairs; where no kernel runs it, two positions."""

    frequencies: Mapping[int, float]
    max_positions: int

    def _repr_mimebundle_(self, **_) -> dict:
        static = clock(self.frequencies, (0, 10))._repr_mimebundle_()
        return (self.widget()._repr_mimebundle_() or {}) | static

    def widget(self):
        """The slider, and the dials whose hands it turns."""
        import ipywidgets

        position = ipywidgets.IntSlider(0, 0, self.max_positions - 1, description="position", layout={"width": "60%"})
        dials = ipywidgets.HTML()

        def draw(_=None) -> None:
            dials.value = clock(self.frequencies, (position.value,))._repr_mimebundle_()["text/html"]

        position.observe(draw, "value")
        draw()
        return ipywidgets.VBox([position, dials])


def cosines_by_position(cosines: Tensor, positions: Tensor) -> Picture:
    """Where each hand points, as brightness: `[pairs, positions]` cosines over increasing positions, on a log axis."""
    figure = new_figure(9, 4.8)
    axes = figure.add_subplot()
    pairs = range(len(cosines))
    image = axes.pcolormesh(positions.numpy(), list(pairs), cosines.numpy(), shading="nearest", cmap="cividis")
    scale = figure.colorbar(image, ax=axes)
    scale.set_label("cosine of the angle", fontsize=FONT_SIZE)
    scale.ax.tick_params(labelsize=FONT_SIZE - 1)
    finish_axes(axes, "Where each hand points", "position in the text (logarithmic)", "pair (0 is the fastest)")
    axes.grid(False)
    axes.set_xscale("log")
    axes.set_yticks(list(pairs))
    axes.invert_yaxis()
    moves = [int(positions[(row < 0).int().argmax()]) if (row < 0).any() else None for row in cosines]
    told = ", ".join(f"pair {pair} at {place or 'none of these positions'}" for pair, place in enumerate(moves))
    return Picture(figure, f"Heat map, one row per pair. Each hand has made a quarter turn and points back: {told}.")


def comebacks(distances: Tensor, one: Tensor, together: Tensor) -> Picture:
    """Scores against distance, of one pair (thin) and of all pairs together (thick): each a `[distances]` tensor."""
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    axes.plot(distances.numpy(), one.numpy(), "--", color=BLUE, linewidth=2, label="pair 0 alone")
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
