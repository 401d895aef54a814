"""The figures of notebook 04: GELU, both wirings of a block, a block in numbers, and where two models part."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, VERMILION, Picture, Steps, lines, new_figure

BOX_HEIGHT = 0.62


def box(
    axes: Axes, x: float, y: float, width: float, label: str, colour: str = "white", height: float = BOX_HEIGHT
) -> None:
    """A labelled box, centred on (x, y)."""
    corner = (x - width / 2, y - height / 2)
    patch = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="black")
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


def gelu_curve() -> Picture:
    """GELU beside the curve with a corner, which keeps positive numbers and drops negative ones."""
    x = torch.linspace(-4, 4, 401)
    alt = (
        "GELU and ReLU against x from -4 to 4. ReLU is 0 up to x = 0 and then x, with a corner at 0. GELU follows it "
        "far out on both sides; between them it is smooth, and dips to about -0.17 near x = -0.75."
    )
    series = {"GELU(x)": (x, F.gelu(x)), "ReLU(x) = max(x, 0)": (x, x.relu())}
    return lines(series, "GELU is smooth where ReLU has a corner", "x, what goes in", "what comes out", alt)


def block_in_numbers(x: float, attended: float, bent: float) -> Steps:
    """A parallel block step by step, with numbers in place of vectors: what each branch reads, and what it adds."""
    steps = {
        "1 the stream": "Both branches will read x.",
        "2 attention": "Attention reads x and returns what it adds.",
        "3 the MLP": "The MLP reads x too, not what attention returned.",
        "4 the sum": "Both are added to the stream, in one place.",
    }
    pictures = {}
    for at, (label, words) in enumerate(steps.items()):
        figure = new_figure(10, 3.7)
        axes = figure.add_subplot()
        panel(axes, words, lowest=-1.75)
        values = ((1.1, "attention", attended, at >= 1, at == 1), (-1.1, "MLP", bent, at >= 2, at == 2))
        for height, part, returned, shown, now in values:
            width = 3 if now else 1.6
            arrow(axes, (1.2, 0), (1.2, height), (3.2, height), width=width)
            box(axes, 4.1, height, 1.7, part, ORANGE if now else "white")
            if shown:
                arrow(axes, (5.0, height), (9.2, height), (9.2, 0.25 if height > 0 else -0.25), width=width)
                axes.text(2.2, height + 0.28, f"reads {x:g}", ha="center", fontsize=FONT_SIZE + 1)
                axes.text(7.0, height + 0.28, f"returns {returned:g}", ha="center", fontsize=FONT_SIZE + 1)
        plus(axes, 9.2)
        axes.text(2.2, 0.22, f"x = {x:g}", ha="center", fontsize=FONT_SIZE + 1, fontweight="bold")
        if at == 3:
            total = f"{x:g} + {attended:g} + {bent:g} = {x + attended + bent:g}"
            axes.text(10.4, 0.75, total, ha="center", fontsize=FONT_SIZE + 1, fontweight="bold")
        axes.set_xlim(0, 11.6)
        alt = f"A parallel block in numbers. The stream holds x = {x:g}. {words}"
        if at >= 1:
            alt += f" Attention reads {x:g} and returns {attended:g}."
        if at >= 2:
            alt += f" The MLP reads {x:g} and returns {bent:g}."
        if at == 3:
            alt += f" The stream leaves with {x:g} + {attended:g} + {bent:g} = {x + attended + bent:g}."
        pictures[label] = Picture(figure, alt)
    return Steps(pictures, list(steps)[-1], "step")


def parity_curves(runs: Mapping[str, Mapping[str, float]], bound: float, alt: str) -> Picture:
    """The difference of two models at each step, a curve per run; each run maps a step's name to the difference."""
    names = list(next(iter(runs.values())))
    at = list(range(len(names)))
    curves = {label: (at, [max(value, 1e-8) for value in run.values()]) for label, run in runs.items()}
    curves |= {f"bound {bound:g}": (at, [bound] * len(at))}
    label = "difference / largest number"
    picture = lines(curves, "From a bug on, two models never agree again", "step", label, alt, log_y=True)
    (axes,) = picture.figure.axes
    axes.set_xticks(at, names, rotation=30, ha="right")
    axes.set_ylim(3e-9, 3e3)  # room for the names of the curves above them
    axes.legend(fontsize=FONT_SIZE, frameon=False, ncols=2, loc="upper left")
    return picture
