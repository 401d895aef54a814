"""The figure of notebook 04: where the MLP's arrow starts in a sequential and in a parallel block."""

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, VERMILION, Picture, new_figure

BOX_HEIGHT = 0.62


def box(axes: Axes, x: float, y: float, width: float, label: str, colour: str = "white") -> None:
    """A labelled box, centred on (x, y)."""
    corner = (x - width / 2, y - BOX_HEIGHT / 2)
    patch = FancyBboxPatch(corner, width, BOX_HEIGHT, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="black")
    patch.set_zorder(3)
    axes.add_patch(patch)
    axes.text(x, y, label, ha="center", va="center", fontsize=FONT_SIZE, zorder=4)


def arrow(axes: Axes, *points: tuple[float, float], colour: str = "black", width: float = 1.6) -> None:
    """A line through the points, with an arrowhead at the last."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color=colour, linewidth=width, solid_joinstyle="miter")
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def plus(axes: Axes, x: float) -> None:
    """The place on the stream where a branch is added."""
    axes.plot([x], [0], "o", markersize=20, color="white", markeredgecolor="black", zorder=3)
    axes.text(x, -0.01, "+", ha="center", va="center", fontsize=FONT_SIZE + 4, zorder=4)


def panel(axes: Axes, title: str, lowest: float) -> None:
    """The residual stream from left to right, in axes that reach down to `lowest`."""
    axes.set_xlim(0, 11)
    axes.set_ylim(lowest, 1.75)
    axes.axis("off")
    axes.set_title(title, fontsize=FONT_SIZE + 1, loc="left")
    axes.text(0.2, 0, "x", ha="center", va="center", fontsize=FONT_SIZE + 3, fontweight="bold")
    arrow(axes, (0.4, 0), (10.8, 0), colour=BLUE, width=3)


def wirings() -> Picture:
    """Both blocks, one above the other: the same four parts, with the path into the MLP in bold."""
    figure = new_figure(9, 5.6)
    above, below = figure.subplots(2, 1, height_ratios=[2.4, 3.5])
    panel(above, "Sequential: the MLP reads x plus attention's output", lowest=-0.65)
    for start, norm, part, colour in ((0.8, "norm 1", "attention", "black"), (5.6, "norm 2", "MLP", VERMILION)):
        bold = 3 if part == "MLP" else 1.6
        arrow(above, (start, 0), (start, 1.1), (start + 0.45, 1.1), colour=colour, width=bold)
        arrow(above, (start + 1.8, 1.1), (start + 2.2, 1.1), colour=colour, width=bold)
        arrow(above, (start + 3.7, 1.1), (start + 4.1, 1.1), (start + 4.1, 0.22))
        box(above, start + 1.15, 1.1, 1.3, norm)
        box(above, start + 2.95, 1.1, 1.5, part, ORANGE if part == "MLP" else "white")
        plus(above, start + 4.1)
    panel(below, "Parallel: the MLP reads x, as attention does", lowest=-1.75)
    for height, norm, part, colour in ((1.1, "norm 1", "attention", "black"), (-1.1, "norm 2", "MLP", VERMILION)):
        bold = 3 if part == "MLP" else 1.6
        arrow(below, (0.8, 0), (0.8, height), (3.0, height), colour=colour, width=bold)
        arrow(below, (4.3, height), (5.2, height), colour=colour, width=bold)
        arrow(below, (6.7, height), (9.7, height), (9.7, 0.22 if height > 0 else -0.22))
        box(below, 3.65, height, 1.3, norm)
        box(below, 5.95, height, 1.5, part, ORANGE if part == "MLP" else "white")
    plus(below, 9.7)
    alt = (
        "Two wirings of the same parts along the residual stream x. Sequential: attention reads x through "
        "norm 1 and is added to it; the MLP reads that sum through norm 2, and is added to it. Parallel: attention "
        "reads x through norm 1, the MLP reads the same x through norm 2, and both are added in one place."
    )
    return Picture(figure, alt)
