"""The figures of notebook 11: exits of the logit lens, grids of layer by token, bars of what each part adds, heads."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from neox_lib.course.figures.parallel_residual import arrow, box
from neox_lib.course.figures.plots import (
    BLUE,
    FONT_SIZE,
    ORANGE,
    SKY,
    VERMILION,
    Picture,
    finish_axes,
    new_figure,
)


def visible(token: str) -> str:
    """A token as a label: its leading space as a low line, and not too long."""
    shown = token.replace(" ", "_").replace("\n", "\\n").replace("$", r"\$")
    return shown if len(shown) <= 9 else shown[:8] + "…"


def lens_exits(words: Sequence[str]) -> Picture:
    """The stream through the layers, with an exit after each, and the word that comes out there."""
    figure = new_figure(11, 4)
    axes = figure.add_subplot()
    axes.set_xlim(0, 2 * len(words) + 0.6)
    axes.set_ylim(-0.7, 3.9)
    axes.axis("off")
    arrow(axes, (0.2, 0), (2 * len(words) + 0.4, 0), colour=BLUE, width=3)
    box(axes, 0.75, 0, 1.0, "embed", SKY)
    for depth, word in enumerate(words):
        exit_at = 1.6 + 2 * depth
        if depth:
            box(axes, exit_at - 1, 0, 1.0, f"layer {depth - 1}", SKY)
        last = depth == len(words) - 1
        arrow(axes, (exit_at, 0), (exit_at, 1.25), width=3 if last else 1.6)
        box(axes, exit_at, 1.75, 1.5, "last norm\noutput", ORANGE, height=0.9)
        arrow(axes, (exit_at, 2.25), (exit_at, 2.95), width=3 if last else 1.6)
        weight = "bold" if last else "normal"
        axes.text(exit_at, 3.25, visible(word), ha="center", va="center", fontsize=FONT_SIZE + 1, fontweight=weight)
    alt = (
        f"The residual stream runs from the embedding through {len(words) - 1} layers. After each of them an exit "
        "leads up through the same last norm and output matrix to a word. The last exit is the model itself."
    )
    return Picture(figure, alt)


def draw_grid(axes: Axes, values: Tensor, texts: Sequence[Sequence[str]], lowest: float, highest: float):
    """A text in each cell, on its colour; row 0 at the bottom, as the stream runs upwards."""
    image = axes.imshow(values.numpy(), cmap="cividis", aspect="auto", vmin=lowest, vmax=highest, origin="lower")
    middle = (lowest + highest) / 2
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            ink = "black" if values[row, column].item() > middle else "white"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=FONT_SIZE - 1)
    return image


def token_grid(
    values: Tensor,
    texts: Sequence[Sequence[str]],
    tokens: Sequence[str],
    title: str,
    y_label: str,
    unit: str,
    alt: str,
) -> Picture:
    """Layer by token: `[rows, T]` as colours from dark (low) to bright (high), with a text in each cell; cells below 0
    have a frame.
    """
    rows = len(values)
    figure = new_figure(11.5, 1.9 + 0.45 * rows)
    axes = figure.add_subplot()
    shown = [[visible(text) for text in line] for line in texts]
    image = draw_grid(axes, values, shown, values.min().item(), values.max().item())
    for row, column in (values < 0).nonzero().tolist():
        axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="white", linewidth=2.5))
    finish_axes(axes, title, "token that is read, and its position", y_label)
    axes.grid(False)
    axes.set_xticks(range(len(tokens)), [f"{visible(token)}\n{place}" for place, token in enumerate(tokens)])
    axes.set_yticks(range(rows))
    scale = figure.colorbar(image, ax=axes, pad=0.01)
    scale.set_label(unit, fontsize=FONT_SIZE)
    scale.ax.tick_params(labelsize=FONT_SIZE - 1)
    return Picture(figure, alt)


def contributions(added: Mapping[str, float], title: str, unit: str) -> Picture:
    """What each part adds, from the first at the top; what takes away is hatched. The last bar is the sum."""
    names, values = [*added, "sum"], [*added.values(), sum(added.values())]
    figure = new_figure(9, 1.2 + 0.29 * len(names))
    axes = figure.add_subplot()
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        colour, hatch = (BLUE, "") if value >= 0 else (VERMILION, "//")
        colour = ORANGE if name == "sum" else colour
        axes.barh(place, value, height=0.72, color=colour, hatch=hatch, edgecolor="black")
        side = {"ha": "left", "x": value + 0.08} if value >= 0 else {"ha": "right", "x": value - 0.08}
        axes.text(y=place, s=f"{value:+.2f}", va="center", fontsize=FONT_SIZE - 1, **side)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    finish_axes(axes, title, unit, "")
    axes.grid(False)
    largest = sorted(added, key=lambda name: -abs(added[name]))[:3]
    told = ", ".join(f"{name} {added[name]:+.2f}" for name in largest)
    alt = f"A bar for each of {len(added)} parts, and their sum, {values[-1]:+.2f}, in {unit}. The largest: {told}."
    return Picture(figure, alt)


def induction(tokens: Sequence[str] = ("A", "B", "C", "D", "A", "?")) -> Picture:
    """Two heads that together continue a repetition: one looks one back, the other for the token behind the first A."""
    figure = new_figure(9.5, 3.9)
    axes = figure.add_subplot()
    axes.set_xlim(-0.6, 9.4)
    axes.set_ylim(-2.05, 2.0)
    axes.axis("off")
    second = len(tokens) - 2
    for place, token in enumerate(tokens):
        colour = {0: ORANGE, second: ORANGE, 1: SKY, len(tokens) - 1: SKY}.get(place, "white")
        box(axes, 1.7 * place, 0, 1.0, token, colour)
        axes.text(1.7 * place, -0.55, str(place), ha="center", va="center", fontsize=FONT_SIZE - 1)
    style = {"arrowstyle": "-|>", "linewidth": 2.6, "mutation_scale": 18, "shrinkA": 4, "shrinkB": 4}
    back = style | {"connectionstyle": "arc3,rad=0.5", "color": VERMILION, "linestyle": "--"}
    axes.annotate("", xy=(0.05, 0.33), xytext=(1.65, 0.33), arrowprops=back)
    text = "1. previous-token head:\nB notes that A came before it"
    axes.text(-0.5, 1.35, text, ha="left", va="center", fontsize=FONT_SIZE)
    found = style | {"connectionstyle": "arc3,rad=-0.35", "color": BLUE}
    axes.annotate("", xy=(1.75, -0.75), xytext=(1.7 * second, -0.75), arrowprops=found)
    text = "2. induction head: A looks for a token that came after an A, finds B, and says B"
    axes.text(4.2, -1.85, text, ha="center", va="center", fontsize=FONT_SIZE)
    alt = (
        "Six tokens: A, B, C, D, A, and one to predict. A dashed arrow from B back to the first A: a previous-token "
        "head writes into B that A came before it. A second arrow from the later A back to B: an induction head looks "
        "for a token that came after an A, finds B, and predicts B."
    )
    return Picture(figure, alt)


def head_maps(maps: Mapping[str, Tensor], unit: str, alt: str) -> Picture:
    """Maps of layer by head side by side on one scale, each number in its cell; layer 0 at the bottom."""
    lowest = min(0.0, *(each.min().item() for each in maps.values()))
    highest = max(each.max().item() for each in maps.values())
    rows = max(len(each) for each in maps.values())
    figure = new_figure(5.6 * len(maps), 1.7 + 0.42 * rows)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (title, values) in zip(panels, maps.items(), strict=True):
        draw_grid(axes, values, [[f"{each:.2f}" for each in row] for row in values.tolist()], lowest, highest)
        finish_axes(axes, title, "head", "layer")
        axes.grid(False)
        axes.set_xticks(range(values.shape[1]))
        axes.set_yticks(range(values.shape[0]))
    scale = figure.colorbar(panels[0].images[0], ax=list(panels), pad=0.02)
    scale.set_label(unit, fontsize=FONT_SIZE)
    scale.ax.tick_params(labelsize=FONT_SIZE - 1)
    return Picture(figure, alt)


def learning_to_copy(history: Sequence[Mapping[str, float]]) -> Picture:
    """Loss above, scores of the best heads below, over the steps of training."""
    figure = new_figure(8, 5.2)
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in history]
    for axes, curves in (
        (above, {"new": ("new tokens", VERMILION, "--"), "repeated": ("repeated tokens", BLUE, "-")}),
        (below, {"previous": ("previous-token head", VERMILION, "--"), "induction": ("induction head", BLUE, "-")}),
    ):
        for key, (label, colour, style) in curves.items():
            axes.plot(steps, [row[key] for row in history], style, color=colour, linewidth=2.4, label=label)
        axes.legend(fontsize=FONT_SIZE, framealpha=0.9, edgecolor="none", loc="center right")
    finish_axes(above, "The loss falls when the heads appear", "", "loss, nats per token")
    finish_axes(below, "", "step of training", "best head's score, 0 to 1")
    half = next((row["step"] for row in history if row["repeated"] < history[0]["repeated"] / 2), steps[-1])
    alt = (
        f"Above, the loss over {steps[-1]} steps: on new tokens it stays where it began, on repeated tokens it falls "
        f"steeply before step {half}. Below, the scores of the best previous-token head and the best induction head: "
        "both rise at the same time as the loss falls."
    )
    return Picture(figure, alt)


def loss_by_position(losses: Mapping[str, Tensor], period: int, guess: float, alt: str) -> Picture:
    """Loss of each token of a repeated text, `[T - 1]`, for several models; `guess` is that of knowing nothing."""
    figure = new_figure(9.5, 4.6)
    axes = figure.add_subplot()
    for (label, values), (colour, style) in zip(losses.items(), ((BLUE, "-"), (VERMILION, "--")), strict=False):
        axes.plot(range(1, len(values) + 1), values.tolist(), style, color=colour, linewidth=2.4, label=label)
    axes.axhline(guess, color="#555555", linestyle=":", linewidth=2, label="every token equally likely")
    axes.axvline(period, color="black", linewidth=1.2)
    axes.text(
        period + 0.3, 0.97, "from here on it repeats", transform=axes.get_xaxis_transform(), va="top", fontsize=13
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=FONT_SIZE, framealpha=0.9, edgecolor="none", loc="lower left")
    finish_axes(axes, "Random tokens, twice", "position of the token", "loss, nats")
    return Picture(figure, alt)
