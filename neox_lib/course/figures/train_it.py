"""The figures of notebook 10: shifted targets, the price of a probability, a slope, Adam's step, samples over time."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

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
    as_list,
    finish_axes,
    lines,
    new_figure,
)


def shifted_targets(tokens: Sequence[str]) -> Picture:
    """A window of T + 1 tokens: the model reads the first T, and each position is judged by the token after it."""
    figure = new_figure(11, 3.6)
    axes = figure.add_subplot()
    axes.set_xlim(-2.3, 1.7 * len(tokens))
    axes.set_ylim(-0.6, 3.8)
    axes.axis("off")
    for label, y in (("window", 3.3), ("model reads", 1.9), ("target", 0.2)):
        axes.text(-2.2, y, label, va="center", fontsize=FONT_SIZE)
    for place, token in enumerate(tokens):
        x = 1.7 * place + 0.75
        box(axes, x, 3.3, 1.4, token, "white")
        if place < len(tokens) - 1:
            box(axes, x, 1.9, 1.4, token, SKY)
            box(axes, x, 0.2, 1.4, tokens[place + 1], ORANGE)
            arrow(axes, (x, 1.5), (x, 0.65))
    pairs = "; ".join(f"{a} is judged by {b}" for a, b in itertools.pairwise(tokens))
    alt = f"A window of {len(tokens)} tokens. The model reads all but the last, the targets are all but the first"
    return Picture(figure, f"{alt}: {pairs}.")


def price_of(probabilities: dict[str, float]) -> Picture:
    """The curve -ln p from 0 to 1, with a dot and a name for each given probability."""
    figure = new_figure(9, 4.5)
    axes = figure.add_subplot()
    xs = [step / 400 for step in range(2, 401)]
    axes.plot(xs, [-math.log(x) for x in xs], color=BLUE, linewidth=2.4)
    for name, p in probabilities.items():
        axes.plot([p], [-math.log(p)], "o", color=VERMILION, markersize=9)
        place = (p + 0.02, -math.log(p) + 0.12)
        axes.annotate(f"{name}: {-math.log(p):.2f}", place, fontsize=FONT_SIZE)
    axes.set_xlim(0, 1.12)
    axes.set_ylim(0, 5)
    finish_axes(axes, "What a prediction costs", "probability that the model gave to the right token", "loss, nats")
    told = ", ".join(f"{name} {p:g} costs {-math.log(p):.2f}" for name, p in probabilities.items())
    return Picture(figure, f"The curve of minus ln p: steep near 0, and 0 at probability 1. Dots: {told}.")


def windows_of(length: int, starts: Sequence[int], tokens: int) -> Picture:
    """Where the windows of a batch lie in a stream of `tokens` ids, each one longer than `length`."""
    figure = new_figure(11, 1.1 + 0.34 * len(starts))
    axes = figure.add_subplot()
    axes.barh(0, tokens, left=0, height=0.6, color="#d9d9d9", edgecolor="black")
    for row, start in enumerate(starts, 1):
        axes.barh(row, length, left=start, height=0.7, color=BLUE, edgecolor=BLUE, linewidth=4)
        axes.plot([start, start], [0.3, row - 0.3], ":", color="#555555", linewidth=1)
    axes.set_ylim(len(starts) + 0.6, -0.6)
    axes.set_yticks([0, *range(1, len(starts) + 1)], ["stream", *(f"row {row}" for row in range(len(starts)))])
    axes.set_xlabel("token of the stream", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.spines[["top", "right"]].set_visible(False)
    alt = (
        f"A long bar, the stream of {tokens:,} tokens, and below it {len(starts)} short bars, the windows of "
        f"{length} tokens, each cut from another place: they start at {', '.join(f'{start:,}' for start in starts)}."
    )
    return Picture(figure, alt)


def slope_at(weights: Sequence[float], losses: Sequence[float], at: int, gradient: float) -> Picture:
    """The loss as one weight is varied, the tangent where the weight is now, and the direction of a step downhill."""
    figure = new_figure(9, 4.5)
    axes = figure.add_subplot()
    axes.plot(weights, losses, color=BLUE, linewidth=2.4, label="loss of one batch, all other weights fixed")
    here, loss = weights[at], losses[at]
    reach = (weights[-1] - weights[0]) / 4
    ends = [here - reach, here + reach]
    axes.plot(
        ends, [loss + gradient * (x - here) for x in ends], "--", color="black", linewidth=2, label="its slope here"
    )
    axes.plot([here], [loss], "o", color=VERMILION, markersize=10)
    step = -reach if gradient > 0 else reach
    low, span = min(losses), max(losses) - min(losses)
    style = {"arrowstyle": "-|>", "color": VERMILION, "linewidth": 3, "mutation_scale": 20}
    below = low - 0.13 * span
    axes.annotate("", xy=(here + step, below), xytext=(here, below), arrowprops=style)
    side = "left" if step > 0 else "right"
    axes.annotate("  step  ", (here + step, below), fontsize=FONT_SIZE, ha=side, va="center")
    axes.set_ylim(low - 0.22 * span, low + 1.25 * span)
    axes.legend(fontsize=FONT_SIZE, frameon=False, loc="upper center")
    finish_axes(axes, "Downhill, against the slope", "one weight", "loss, nats per token")
    where = "left" if gradient > 0 else "right"
    alt = (
        f"The loss over the values of one weight, a smooth curve. Where the weight is now the slope is {gradient:.2f}; "
        f"an arrow shows the step against it, to the {where}."
    )
    return Picture(figure, alt)


def adam_bars(gradients: Sequence[float], plain: Sequence[float], adam: Sequence[float]) -> Picture:
    """The size of a first step by SGD and by Adam for weights with very different gradients, on a log scale."""
    figure = new_figure(10, 4.6)
    axes = figure.add_subplot()
    places = range(len(gradients))
    for off, sizes, label, colour, hatch in ((-0.2, plain, "SGD", ORANGE, "//"), (0.2, adam, "Adam", BLUE, "")):
        drawn = axes.bar(
            [place + off for place in places], sizes, 0.38, color=colour, hatch=hatch, edgecolor="black", label=label
        )
        axes.bar_label(drawn, [f"{size:.2g}" for size in sizes], fontsize=FONT_SIZE, padding=3)
    axes.set_yscale("log")
    axes.set_ylim(min(*plain, *adam) / 2, max(*plain, *adam) * 8)
    axes.set_xticks(list(places), [f"gradient {gradient:g}" for gradient in gradients])
    axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish_axes(axes, "How far the first step moves each weight", "", "step (log scale)")
    told = "; ".join(
        f"gradient {g:g}: SGD {a:.2g}, Adam {b:.2g}" for g, a, b in zip(gradients, plain, adam, strict=True)
    )
    return Picture(
        figure, f"Pairs of bars on a log scale. {told}. SGD's steps differ as the gradients do, Adam's do not."
    )


def schedules(rates: Mapping[str, Sequence[float]]) -> Picture:
    """Learning rates over a run, each as a share of its highest."""
    curves = {name: ([step / len(each) for step in range(len(each))], each) for name, each in rates.items()}
    told = " ".join(
        f"{name}: rises over the first {each.index(max(each)) / len(each):.1%} and ends at {each[-1]:.2f} of it."
        for name, each in rates.items()
    )
    y_label = "learning rate, as a share of the highest"
    alt = f"Curves of the learning rate, which rise in a straight line to the highest and fall in an arc. {told}"
    return lines(curves, "Up, then down along half a cosine", "share of the run", y_label, alt)


def loss_falls(losses: Sequence[float], start: float, title: str, held_out: float | None = None) -> Picture:
    """A loss per step, with a line at ln V, and one at the loss on held-out text if it is given."""
    figure = new_figure(9, 4.5)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color=BLUE, linewidth=2.4, label="training loss")
    axes.axhline(start, color="#555555", linestyle=":", linewidth=2, label=f"ln V = {start:.2f}: knows nothing")
    if held_out is not None:
        label = f"held-out text at the end: {held_out:.2f}"
        axes.plot([len(losses)], [held_out], "D", color=VERMILION, markersize=10, label=label)
    axes.set_ylim(0, 1.12 * max(start, held_out or 0.0))
    axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish_axes(axes, title, "step", "loss, nats per token")
    told = "" if held_out is None else f" On held-out text it ends {'above' if held_out > start else 'below'} ln V."
    ends = f"The loss falls from {losses[0]:.1f}, near ln V = {start:.2f}, to {losses[-1]:.1f}"
    return Picture(figure, f"{ends} in {len(losses)} steps.{told}")


def losses_over_time(history: Sequence[dict]) -> Picture:
    """Training and held-out loss of a run so far; its first row, before the first step, has held-out loss only."""
    trained = [row for row in history if "loss" in row]
    curves = {
        "training, mean of 100 steps": ([row["step"] for row in trained], [row["loss"] for row in trained]),
        "held-out": ([row["step"] for row in history], [row["validation_loss"] for row in history]),
    }
    first, last = history[0], history[-1]
    alt = (
        f"Two curves that fall, steeply at first. Held-out loss goes from {first['validation_loss']:.1f} to "
        f"{last['validation_loss']:.1f} in {last['step']} steps."
    )
    return lines(curves, "A small model learns on a CPU", "step", "loss, nats per token", alt)


def samples_over_time(history: Sequence[dict], prompt: str, width: int = 84, lines: int = 2) -> Picture:
    """What a model wrote after `prompt` at the start and after every hundred steps, beside its validation loss."""
    figure = new_figure(13, 0.55 + 0.78 * len(history))
    axes = figure.add_subplot()
    axes.set_xlim(0, 13)
    axes.set_ylim(-len(history), 0.55)
    axes.axis("off")
    for x, head in ((0.1, "step"), (1.2, "loss"), (2.2, f"{prompt} ...")):
        axes.text(x, 0.25, head, va="center", fontsize=FONT_SIZE, fontweight="bold")
    texts = []
    for row, each in enumerate(history):
        if row % 2 == 0:
            axes.add_patch(Rectangle((0, -row - 1), 13, 1, facecolor="#eeeeee", edgecolor="none"))
        written = " ".join(each["sample"].removeprefix(prompt).split())
        shown = textwrap.wrap(written, width, max_lines=lines, placeholder=" ...")
        texts.append(" ".join(shown))
        axes.text(0.1, -row - 0.5, str(each["step"]), va="center", fontsize=FONT_SIZE)
        axes.text(1.2, -row - 0.5, f"{each['validation_loss']:.2f}", va="center", fontsize=FONT_SIZE)
        axes.text(2.2, -row - 0.5, "\n".join(shown), va="center", fontsize=FONT_SIZE + 1, family="monospace")
    told = " ".join(
        f"Step {each['step']}, loss {each['validation_loss']:.2f}: {text}"
        for each, text in zip(history, texts, strict=True)
    )
    return Picture(figure, f"A table of samples, which turn from random tokens into sentences. {told}")


def compared(curves: dict[str, Tensor | Sequence[float]], title: str, alt: str) -> Picture:
    """Losses of several versions per step, in two panels of up to four curves that share their axes."""
    figure = new_figure(12, 4.8)
    names = list(curves)
    groups = [names[: (len(names) + 1) // 2], [names[0], *names[(len(names) + 1) // 2 :]]]
    panels = figure.subplots(1, 2, sharey=True)
    styles = [("#000000", "-"), (BLUE, "--"), (VERMILION, "-."), (ORANGE, ":")]
    for panel, group in zip(panels, groups, strict=True):
        for name, (colour, style) in zip(group, styles, strict=False):
            losses = as_list(curves[name])
            panel.plot(range(1, len(losses) + 1), losses, style, color=colour, linewidth=2.6, label=name)
        panel.legend(fontsize=FONT_SIZE, frameon=False)
        finish_axes(panel, "", "step", "")
    panels[0].set_ylabel("training loss, nats per token", fontsize=FONT_SIZE)
    figure.suptitle(title, fontsize=FONT_SIZE + 1)
    return Picture(figure, alt)
