"""The figures of notebook 09: a pair of matrices on two devices, who keeps what, and where a block exchanges sums."""

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from torch import Tensor

from neox_lib.checkpoints.slim.partition import merge_rule
from neox_lib.course.figures.plots import FONT_SIZE, ORANGE, SKY, VERMILION, Picture, Steps, new_figure

ROWS = (1.1, -1.1)  # the heights of device 0 and device 1
BAND = 0.95  # half the height of a device's band


def box(axes: Axes, x: float, y: float, label: str, colour: str, half: float = 0.95) -> None:
    """A labelled part of the block, centred on (x, y); `half` of its width."""
    high = 0.3 * (1 + label.count("\n"))
    patch = FancyBboxPatch((x - half, y - high), 2 * half, 2 * high, boxstyle="round,pad=0.02", edgecolor="black")
    patch.set(facecolor=colour, zorder=3)
    axes.add_patch(patch)
    axes.text(x, y, label, ha="center", va="center", fontsize=FONT_SIZE, zorder=4)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """A line through the points, with an arrowhead at the last."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color="black", linewidth=1.5, solid_joinstyle="miter")
    style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def draw_all_reduce(axes: Axes, x: float, colour: str = VERMILION) -> None:
    """An all-reduce at x, across both devices."""
    axes.add_patch(Rectangle((x - 0.16, -2.05), 0.32, 4.1, facecolor=colour, edgecolor="black", zorder=5))
    axes.text(x, 2.15, "all-reduce", ha="center", va="bottom", fontsize=FONT_SIZE, fontweight="bold")


def panel(axes: Axes, title: str, start: str = "x", end: str = "new x") -> None:
    """Two devices, each a band with all of x at its left end."""
    axes.set_xlim(-0.2, 11.2)
    axes.set_ylim(-2.15, 2.75)
    axes.axis("off")
    axes.set_title(title, fontsize=FONT_SIZE + 1, loc="left")
    for number, y in enumerate(ROWS):
        band = Rectangle((0, y - BAND), 10.9, 2 * BAND, facecolor="#f1f1f1", edgecolor="#777777", linestyle="--")
        axes.add_patch(band)
        axes.text(0.1, y + BAND - 0.1, f"device {number}", ha="left", va="top", fontsize=FONT_SIZE)
        axes.text(0.9, y, start, ha="center", va="center", fontsize=FONT_SIZE + 3, fontweight="bold")
        axes.text(10.4, y, end, ha="center", va="center", fontsize=FONT_SIZE + 1, fontweight="bold")


def whole_numbers(values: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in values.tolist())


def column_then_row(x: Tensor, widen: Tensor, narrow: Tensor) -> Steps:
    """An MLP of two inner numbers on two devices, step by step: `narrow @ relu(widen @ x)`, all `[2]` and `[2, 2]`."""
    inner = (widen @ x).relu()
    partials = [narrow[:, device] * inner[device] for device in range(2)]
    total = whole_numbers(partials[0] + partials[1])
    steps = {
        "1 input": "Both devices hold all of x.",
        "2 column-parallel": "Each device's row of widen gives one inner number, finished.",
        "3 activation": "So ReLU can follow at once, without an exchange.",
        "4 row-parallel": "Each device's column of narrow gives a part of every output.",
        "5 all-reduce": "The one exchange: the parts are added, and both devices get the sum.",
    }
    pictures = {}
    for at, (label, words) in enumerate(steps.items()):
        figure = new_figure(11, 4.8)
        axes = figure.add_subplot()
        panel(axes, words, whole_numbers(x), total if at == 4 else "")
        for device, y in enumerate(ROWS):
            row, column = whole_numbers(widen[device]), whole_numbers(narrow[:, device])
            parts = [
                (2.95, 1.15, f"row {device} of widen\n{row}", SKY, (widen @ x)[device : device + 1]),
                (5.25, 0.6, "ReLU", "#dddddd", inner[device : device + 1]),
                (7.5, 1.15, f"column {device} of narrow\n{column}", ORANGE, partials[device]),
            ]
            for number, (place, half, name, colour, value) in enumerate(parts, start=1):
                box(axes, place, y, name, colour if at >= number else "white", half)
                arrow(axes, (place - half - 0.43, y), (place - half - 0.02, y))
                if at >= number:
                    text = f"= {whole_numbers(value)}"
                    axes.text(place, y - 0.79, text, ha="center", va="center", fontsize=FONT_SIZE + 1)
            arrow(axes, (8.67, y), (9.04, y))
        draw_all_reduce(axes, 9.2, VERMILION if at == 4 else "white")
        alt = (
            f"Two devices share an MLP, and both hold x = {whole_numbers(x)}. On each, from left to right: its row of "
            f"widen, ReLU, its column of narrow; then one all-reduce across both. {words}"
        )
        if at >= 1:
            alt += f" The inner numbers are {whole_numbers(inner)}, one on each device."
        if at >= 3:
            alt += f" The parts are ({whole_numbers(partials[0])}) and ({whole_numbers(partials[1])})."
        if at >= 4:
            alt += f" The sum is ({total}), on both."
        pictures[label] = Picture(figure, alt)
    return Steps(pictures, list(steps)[-1], "step")


KEPT = {  # what is drawn of a model: label -> key
    "embedding": "word_embeddings.weight",
    "query_key_value": "attention.query_key_value.weight",
    "dense": "attention.dense.weight",
    "dense_h_to_4h": "mlp.dense_h_to_4h.weight",
    "dense_4h_to_h": "mlp.dense_4h_to_h.weight",
    "bias of a dense": "attention.dense.bias",
    "norm": "input_layernorm.weight",
    "output": "final_linear.weight",
}
WORDS = {"rows": "column-parallel:\nrows", "columns": "row-parallel:\ncolumns", "sum": "the sum,\non rank 0"}


def who_keeps_what() -> Picture:
    """The tensors of a model as rectangles, each cut between two ranks as the library's rules of merging say."""
    figure = new_figure(13, 3.6)
    axes = figure.add_subplot()
    axes.set_xlim(-0.2, 2 * len(KEPT) - 0.2)
    axes.set_ylim(-1.2, 2.8)
    axes.axis("off")
    for place, (name, key) in enumerate(KEPT.items()):
        rule, left = merge_rule(key), 2.0 * place
        whole = Rectangle((left, 0.7), 1.6, 0.6, facecolor=SKY if rule == "sum" else "#dddddd", edgecolor="black")
        if rule in ("rows", "columns"):
            step_x, step_y = (0, 1) if rule == "rows" else (0.8, 0)
            width, height = 1.6 - step_x, 2 - step_y
            axes.add_patch(Rectangle((left, step_y), width, height, facecolor=SKY, edgecolor="black"))
            axes.add_patch(
                Rectangle((left + step_x, 0), width, height, facecolor=ORANGE, edgecolor="black", hatch="//")
            )
        else:
            axes.add_patch(whole)
        words = {"embedding": "rows", "output": "rows"}.get(name, WORDS.get(rule, "all of it,\non both"))
        axes.text(left + 0.8, 2.15, name, ha="center", va="bottom", fontsize=FONT_SIZE)
        axes.text(left + 0.8, -0.15, words, ha="center", va="top", fontsize=FONT_SIZE)
    looks = (("rank 0", SKY, ""), ("rank 1", ORANGE, "//"), ("both", "#dddddd", ""))
    handles = [Patch(label=label, edgecolor="black", facecolor=colour, hatch=hatch) for label, colour, hatch in looks]
    axes.legend(
        handles=handles, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=FONT_SIZE, frameon=False
    )
    alt = (
        "A model's tensors as rectangles, cut between two ranks. Rank 0 has the upper rows and rank 1 the lower of "
        "the embedding, query_key_value, dense_h_to_4h and the output matrix; rank 0 the left columns and rank 1 the "
        "right columns of dense and dense_4h_to_h. A bias of a dense is on rank 0 alone, a norm is whole on both."
    )
    return Picture(figure, alt)


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
