"""The figure of notebook 09: a block on two devices, and where they need an all-reduce."""

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from neox_lib.course.figures.plots import FONT_SIZE, ORANGE, SKY, VERMILION, Picture, new_figure

ROWS = (1.1, -1.1)  # the heights of device 0 and device 1
BAND = 0.95  # half the height of a device's band


def box(axes: Axes, x: float, y: float, label: str, colour: str) -> None:
    """A labelled part of the block, centred on (x, y)."""
    patch = FancyBboxPatch((x - 0.95, y - 0.3), 1.9, 0.6, boxstyle="round,pad=0.02", edgecolor="black", zorder=3)
    patch.set_facecolor(colour)
    axes.add_patch(patch)
    axes.text(x, y, label, ha="center", va="center", fontsize=FONT_SIZE, zorder=4)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """A line through the points, with an arrowhead at the last."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color="black", linewidth=1.5, solid_joinstyle="miter")
    style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def draw_all_reduce(axes: Axes, x: float) -> None:
    """An all-reduce at x, across both devices."""
    axes.add_patch(Rectangle((x - 0.16, -2.05), 0.32, 4.1, facecolor=VERMILION, edgecolor="black", zorder=5))
    axes.text(x, 2.15, "all-reduce", ha="center", va="bottom", fontsize=FONT_SIZE, fontweight="bold")


def panel(axes: Axes, title: str) -> None:
    """Two devices, each a band with all of x at its left end."""
    axes.set_xlim(-0.2, 11.2)
    axes.set_ylim(-2.15, 2.75)
    axes.axis("off")
    axes.set_title(title, fontsize=FONT_SIZE + 1, loc="left")
    for number, y in enumerate(ROWS):
        band = Rectangle((0, y - BAND), 10.9, 2 * BAND, facecolor="#f1f1f1", edgecolor="#777777", linestyle="--")
        axes.add_patch(band)
        axes.text(0.1, y + BAND - 0.1, f"device {number}", ha="left", va="top", fontsize=FONT_SIZE)
        axes.text(0.9, y, "x", ha="center", va="center", fontsize=FONT_SIZE + 3, fontweight="bold")
        axes.text(10.5, y, "new x", ha="center", va="center", fontsize=FONT_SIZE + 1, fontweight="bold")


def all_reduces() -> Picture:
    """The parallel and the sequential block on two devices, one above the other."""
    figure = new_figure(10, 7.4)
    above, below = figure.subplots(2, 1)
    panel(above, "Parallel residual: both branches read x, so each device adds its own parts")
    for y in ROWS:
        box(above, 4.2, y + 0.4, "own heads", SKY)
        box(above, 4.2, y - 0.4, "own MLP half", ORANGE)
        arrow(above, (1.2, y), (2.2, y), (2.2, y + 0.4), (3.2, y + 0.4))
        arrow(above, (2.2, y), (2.2, y - 0.4), (3.2, y - 0.4))
        arrow(above, (5.2, y + 0.4), (6.3, y + 0.4), (6.3, y + 0.17))
        arrow(above, (5.2, y - 0.4), (6.3, y - 0.4), (6.3, y - 0.17))
        above.text(6.3, y - 0.01, "+", ha="center", va="center", fontsize=FONT_SIZE + 6)
        arrow(above, (6.5, y), (8.2, y))
        arrow(above, (8.56, y), (9.9, y))
    draw_all_reduce(above, 8.4)
    panel(below, "Sequential residual: the MLP waits for attention's sum over both devices")
    for y in ROWS:
        box(below, 2.8, y, "own heads", SKY)
        box(below, 6.6, y, "own MLP half", ORANGE)
        arrow(below, (1.2, y), (1.8, y))
        arrow(below, (3.8, y), (4.5, y))
        arrow(below, (4.86, y), (5.6, y))
        arrow(below, (7.6, y), (8.2, y))
        arrow(below, (8.56, y), (9.9, y))
    draw_all_reduce(below, 4.7)
    draw_all_reduce(below, 8.4)
    alt = (
        "Two blocks, each on two devices that both hold all of x. Parallel: on each device, its own heads and its "
        "own half of the MLP read x, their results are added on the device, and one all-reduce across both devices "
        "follows. Sequential: one all-reduce follows the heads, and a second one follows the MLP."
    )
    return Picture(figure, alt)
