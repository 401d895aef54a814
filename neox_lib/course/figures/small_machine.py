"""The figures of notebook 08: int8 rows, a loop that computes eight products at once, two weights in a byte, speeds."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from neox_lib.course.figures.plots import FONT_SIZE, Picture, Steps, finish_axes, lines, new_figure

LIGHT, DARK = "#d3e9f8", "#e9a83a"  # told apart in grey too


def cell(axes: Axes, x: float, y: float, words: str, width: float = 1, colour: str = "white", bold: bool = False):
    """A box one high, its lower left corner at (x, y), with words in the middle."""
    box = Rectangle((x, y), width, 1, facecolor=colour, edgecolor="black", linewidth=2.6 if bold else 1.2)
    axes.add_patch(box)
    axes.text(x + width / 2, y + 0.47, words, ha="center", va="center", fontsize=FONT_SIZE)


def canvas(width: float, height: float, right: float, low: float, high: float, left: float = 0) -> tuple:
    """A figure without axes, its size in inches, and what is drawn on, in boxes."""
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.axis("off")
    return figure, axes


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "linewidth": 2, "color": "black", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 18}
    axes.annotate("", end, start, arrowprops=style)


def int8_rows(weights: Tensor, numbers: Tensor, scales: Tensor) -> Picture:
    """A small matrix `[out, in]` in fp32, and beside it int8 numbers and a scale per row; a byte is one unit wide."""
    rows, columns = weights.shape
    figure, axes = canvas(13, 1.1 + 0.62 * rows, 5 * columns + 9, -1.35 * rows + 0.2, 1.75, left=-0.2)
    right = 4 * columns + 2.5
    for x, width, words in (
        (0, 4 * columns, "weights in fp32: 4 bytes each"),
        (right, columns, "int8: 1 byte each"),
        (right + columns + 1, 4, "scale: 4 bytes"),
    ):
        axes.text(x + width / 2, 1.25, words, ha="center", fontsize=FONT_SIZE + 1, fontweight="bold")
    for row in range(rows):
        y = -1.35 * row
        largest = int(weights[row].abs().argmax())
        for column in range(columns):
            bold = column == largest
            cell(axes, 4 * column, y, f"{weights[row, column].item():g}", 4, LIGHT, bold)
            cell(axes, right + column, y, str(int(numbers[row, column])), 1, DARK, bold)
        arrow(axes, (4 * columns + 0.4, y + 0.5), (right - 0.4, y + 0.5))
        cell(axes, right + columns + 1, y, f"{scales[row].item():.4g}", 4)
        axes.text(right + columns + 0.5, y + 0.45, "\u00d7", ha="center", va="center", fontsize=FONT_SIZE + 3)
    told = "; ".join(
        f"{each} becomes {whole} times {scale:.4g}"
        for each, whole, scale in zip(weights_in_words(weights), numbers.int().tolist(), scales.tolist(), strict=True)
    )
    alt = f"Boxes as wide as their bytes. Each row of fp32 weights becomes int8 numbers and one scale: {told}."
    return Picture(figure, alt)


def weights_in_words(weights: Tensor) -> list[str]:
    return ["[" + ", ".join(f"{weight:g}" for weight in row) + "]" for row in weights.tolist()]


LANES = 8


def eight_at_once(weights: Sequence[int], x: Sequence[int]) -> Steps:
    """A sum of products of whole numbers as a loop with eight running totals makes it: a slider goes step by step."""
    last = len(weights) // LANES
    labels = [f"{step}" for step in range(1, last + 1)] + ["the sum"]
    pictures = {label: lanes_after(weights, x, step + 1) for step, label in enumerate(labels)}
    return Steps(pictures, labels[-2], "step")


def lanes_after(weights: Sequence[int], x: Sequence[int], step: int) -> Picture:
    """The eight totals after so many steps; one step more than there are eights adds the totals."""
    count, adding = len(weights), step > len(weights) // LANES
    steps = min(step, count // LANES)
    figure, axes = canvas(13, 4.6, count + 0.3, -6.2, 3.2, left=-2.2)
    fresh = range(0) if adding else range((steps - 1) * LANES, steps * LANES)
    for name, values, y in (("weights", weights, 1.6), ("x", x, 0.2)):
        axes.text(-0.3, y + 0.45, name, ha="right", va="center", fontsize=FONT_SIZE)
        for i, value in enumerate(values):
            colour = DARK if i in fresh else LIGHT if i < steps * LANES else "white"
            cell(axes, i, y, str(value), colour=colour, bold=i in fresh)
    totals = [sum(weights[i] * x[i] for i in range(lane, steps * LANES, LANES)) for lane in range(LANES)]
    left = fresh.start if fresh else 0
    axes.text(left - 0.3, -2.05, "8 totals", ha="right", va="center", fontsize=FONT_SIZE)
    for lane, total in enumerate(totals):
        if fresh:
            arrow(axes, (fresh[lane] + 0.5, 0.1), (left + lane + 0.5, -1.45))
        cell(axes, left + lane, -2.5, str(total), colour=DARK if fresh else LIGHT, bold=bool(fresh))
    alt = f"A row of {count} weights above the {count} numbers of x, and eight running totals below. "
    if fresh:
        title = f"Step {steps}: one instruction multiplies eight pairs and adds them to eight totals"
        alt += f"Step {steps} multiplies weights {fresh[0]} to {fresh[-1]} by their x and adds them to the eight totals"
        alt += f", which are then {totals}."
    else:
        title = f"At the end, once for the row: the eight totals are added, {sum(totals)}"
        arrow(axes, (LANES / 2, -2.6), (LANES / 2, -4.0))
        cell(axes, LANES / 2 - 1, -5.1, str(sum(totals)), 2, DARK, True)
        alt += f"After {steps} steps the totals are {totals}; they are added once, which gives {sum(totals)}."
    axes.set_title(title, fontsize=FONT_SIZE + 2)
    return Picture(figure, alt)


def one_byte(first: int, second: int, offset: int = 8) -> Picture:
    """Two whole numbers from -8 to 7, moved up by `offset`, in the low and in the high nibble of one byte."""
    figure, axes = canvas(10, 3.4, 9, -3.0, 2.6)
    low, high = first + offset, second + offset
    byte = 16 * high + low
    for start, number, moved, name, colour in (
        (0.4, second, high, "high nibble", LIGHT),
        (4.6, first, low, "low nibble", DARK),
    ):
        axes.text(start + 2, 2.0, f"{number} + {offset} = {moved}", ha="center", va="center", fontsize=FONT_SIZE + 2)
        arrow(axes, (start + 2, 1.55), (start + 2, 0.75))
        for place, bit in enumerate(f"{moved:04b}"):
            cell(axes, start + place, -0.4, bit, colour=colour)
        axes.text(start + 2, -0.9, name, ha="center", va="center", fontsize=FONT_SIZE, fontweight="bold")
    words = f"one byte, 8 bits: 16 \u00d7 {high} + {low} = {byte}"
    axes.text(4.5, -2.2, words, ha="center", va="center", fontsize=FONT_SIZE + 2)
    alt = (
        f"A byte of eight bits, {byte:08b}. Its high nibble, the first four bits, holds {second} + {offset} = {high}. "
        f"Its low nibble, the last four, holds {first} + {offset} = {low}. The byte is 16 times {high} plus {low}, "
        f"which is {byte}."
    )
    return Picture(figure, alt)


def bits_curve(percent: Mapping[str, Sequence[float]], bits: Sequence[int]) -> Picture:
    """Percent by which the perplexity is worse, a curve per way of rounding, on a logarithmic axis; a line at 1 %."""
    lowest = 0.1
    curves = {name: (bits, [max(each, lowest) for each in values]) for name, values in percent.items()}
    told = ". ".join(
        f"With {name}: " + ", ".join(f"{bit} bits {each:+.1f}" for bit, each in zip(bits, values, strict=True))
        for name, values in percent.items()
    )
    picture = lines(
        curves | {"1 % worse": (bits, [1] * len(bits))},
        "How many bits until it breaks?",
        "bits per weight",
        "perplexity, % above fp32 (log axis)",
        alt=f"Perplexity in percent above that of fp32, on a logarithmic axis, against bits per weight. {told}. A "
        "level line marks 1 percent.",
        log_y=True,
    )
    (axes,) = picture.figure.axes
    axes.set_yticks([0.1, 1, 10, 100, 1000], ["0.1 or less", "1", "10", "100", "1,000"])
    axes.set_xticks(bits)
    return picture


def reading_speeds(speeds: Mapping[str, float]) -> Picture:
    """Bytes of weights per second of each loop, as bars on a logarithmic axis; the last is what memory can do."""
    figure = new_figure(10, 1.3 + 0.62 * len(speeds))
    axes = figure.add_subplot()
    names, values = list(speeds)[::-1], [each / 1e9 for each in speeds.values()][::-1]
    drawn = axes.barh(names, values, color=[DARK] + [LIGHT] * (len(names) - 1), edgecolor="black", height=0.6)
    axes.bar_label(drawn, [f" {value:.2g}" for value in values], fontsize=FONT_SIZE)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, 4 * max(values))
    finish_axes(axes, "How fast each loop reads its weights", "GB/s (log axis)", "")
    axes.grid(axis="y", visible=False)
    told = ", ".join(f"{name} {value / 1e9:.2g}" for name, value in speeds.items())
    return Picture(figure, f"Bars on a logarithmic axis, gigabytes of weights read per second: {told}.")
