"""The figures of notebook 12: surprise, two measures, windows over a text, endings, and intervals."""

from collections.abc import Mapping, Sequence

from matplotlib.patches import Rectangle

from neox_lib.course.figures.plots import (
    BLUE,
    FONT_SIZE,
    ORANGE,
    SKY,
    VERMILION,
    Picture,
    Steps,
    finish_axes,
    new_figure,
)
from neox_lib.evaluation.likelihood import windows

READ, SCORED = "#d3e9f8", "#e9a83a"  # light and dark, in grey too


def surprise_bars(tokens: Sequence[str], bits: Sequence[float]) -> Picture:
    """One bar per token of a text: how many bits it took, -log2 of its probability; a line at their mean."""
    figure = new_figure(11, 4.6)
    axes = figure.add_subplot()
    mean = sum(bits) / len(bits)
    drawn = axes.bar(range(len(bits)), bits, color=SKY, edgecolor="black", linewidth=0.8)
    axes.bar_label(drawn, [f"{each:.1f}" for each in bits], fontsize=FONT_SIZE - 1, padding=2)
    axes.axhline(mean, color=VERMILION, linestyle="--", linewidth=2, label=f"mean, {mean:.1f} bits")
    axes.set_xticks(range(len(bits)), [each.strip() for each in tokens], rotation=0)
    axes.legend(fontsize=FONT_SIZE, framealpha=0.9, edgecolor="none")
    axes.margins(y=0.12)
    finish_axes(axes, "How much does each token surprise the model?", "token, in the order of the text", "bits")
    most = max(range(len(bits)), key=bits.__getitem__)
    alt = (
        f"A bar for each of {len(bits)} tokens, in bits. The highest, {bits[most]:.1f}, is that of "
        f"{tokens[most].strip()}; the mean is {mean:.1f}."
    )
    return Picture(figure, alt)


def two_measures(perplexities: Mapping[str, float], bits: Mapping[str, float]) -> Picture:
    """The same models by perplexity per token, left, and by bits per byte, right: the order turns round."""
    figure = new_figure(12, 4.4)
    rows = (("perplexity per token", perplexities, "{:,.0f}"), ("bits per byte of text", bits, "{:.2f}"))
    for axes, (label, values, form) in zip(figure.subplots(1, 2), rows, strict=True):
        best = min(values, key=lambda name: values[name])
        drawn = axes.bar(list(values), list(values.values()), width=0.6, color=SKY, edgecolor="black")
        for bar, name in zip(drawn, values, strict=True):
            if name == best:
                bar.set(facecolor=ORANGE, hatch="//")
        axes.bar_label(drawn, [form.format(each) for each in values.values()], fontsize=FONT_SIZE, padding=3)
        axes.margins(y=0.14)
        finish_axes(axes, f"{label}: the lowest is hatched", "", label)
    said = "; ".join(f"{name}: perplexity {perplexities[name]:,.0f}, {bits[name]:.2f} bits per byte" for name in bits)
    return Picture(figure, f"Two panels of bars for the same models. {said}.")


def window_strips(tokens: int, length: int, strides: Sequence[int]) -> Steps:
    """A text cut into windows, a strip per window: what is only read is light, what is scored is dark. A slider
    changes the stride.
    """
    pictures = {str(stride): strips(tokens, length, stride) for stride in strides}
    return Steps(pictures, str(strides[len(strides) // 2]), "stride")


def strips(tokens: int, length: int, stride: int) -> Picture:
    cut = list(windows(list(range(tokens)), length, stride))
    figure = new_figure(11, 1.7 + 0.42 * len(cut))
    axes = figure.add_subplot()
    for row, (context, continuation) in enumerate(cut):
        for place, colour in [(each, READ) for each in context] + [(each, SCORED) for each in continuation]:
            cell = Rectangle((place, -row - 0.8), 1, 0.8, facecolor=colour, edgecolor="black", linewidth=0.8)
            if colour == SCORED:
                cell.set_hatch("//")
            axes.add_patch(cell)
    axes.set_xlim(0, tokens)
    axes.set_ylim(-len(cut), 0.2)
    axes.set_xticks([place + 0.5 for place in range(0, tokens, 2)], [str(place) for place in range(0, tokens, 2)])
    axes.set_yticks([-row - 0.4 for row in range(len(cut))], [str(row + 1) for row in range(len(cut))])
    fewest = min(len(context) for context, _ in cut[1:]) if len(cut) > 1 else 0
    title = f"Windows of {length} that move by {stride}: light is read, hatched is scored"
    finish_axes(axes, title, "token of the text", "pass")
    axes.grid(False)
    alt = (
        f"{tokens} tokens in {len(cut)} passes of at most {length + 1}. The first pass scores {length} tokens; each "
        f"later one scores up to {stride} and reads at least {fewest} before them."
    )
    return Picture(figure, alt)


def ending_bars(sums: Mapping[str, float], means: Mapping[str, float], right: str) -> Picture:
    """The endings of one question by their log-likelihood, left, and by the same per character, right."""
    figure = new_figure(13, 3.8)
    rows = (("log-likelihood, nats", sums, "{:.1f}"), ("log-likelihood, nats per character", means, "{:.2f}"))
    for place, (axes, (label, values, form)) in enumerate(zip(figure.subplots(1, 2), rows, strict=True)):
        names = [f"{name} (right)" if name == right else name for name in values]
        drawn = axes.barh(names, list(values.values()), color=SKY, edgecolor="black")
        best = max(range(len(names)), key=list(values.values()).__getitem__)
        drawn[best].set(facecolor=ORANGE, hatch="//")
        marks = axes.bar_label(drawn, [form.format(each) for each in values.values()], fontsize=FONT_SIZE, padding=-52)
        for mark in marks:  # readable on hatching
            mark.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 2})
        axes.invert_yaxis()
        finish_axes(axes, "chosen: the hatched one", label, "")
        axes.grid(False)
        if place:
            axes.set_yticklabels([])
    chosen = [max(values, key=lambda name: values[name]) for values in (sums, means)]
    alt = (
        f"Bars for {len(sums)} endings; {right} is right. By the sum {chosen[0]} is the likeliest, with "
        f"{sums[chosen[0]]:.1f} nats; per character {chosen[1]}, with {means[chosen[1]]:.2f}."
    )
    return Picture(figure, alt)


def bootstrap_histogram(means: Sequence[float], score: float, error: float) -> Picture:
    """How often each score came out with the questions drawn anew; lines at the score and one standard error off."""
    figure = new_figure(10, 4.4)
    axes = figure.add_subplot()
    values = sorted(set(means))
    axes.bar(values, [means.count(value) for value in values], width=0.008, color=SKY, edgecolor="black", linewidth=0.6)
    axes.axvline(score, color="black", linewidth=2, label=f"the score, {score:.2f}")
    for side in (-1, 1):
        label = f"one standard error off, {error:.3f}" if side > 0 else None
        axes.axvline(score + side * error, color=VERMILION, linestyle="--", linewidth=2, label=label)
    axes.legend(fontsize=FONT_SIZE, framealpha=0.9, edgecolor="none")
    finish_axes(axes, f"The same test with its questions drawn anew, {len(means):,} times", "score", "how often")
    within = sum(abs(value - score) <= error for value in means) / len(means)
    alt = (
        f"A bell of bars from {min(means):.2f} to {max(means):.2f}, highest at {score:.2f}; {100 * within:.0f} % of "
        f"the draws lie within {error:.3f} of it."
    )
    return Picture(figure, alt)


def intervals(scores: Mapping[str, Mapping[str, tuple[float, float]]]) -> Picture:
    """For each task, two programs' scores of one model, `{task: {program: (score, standard error)}}`, each with a bar
    of two standard errors to both sides.
    """
    figure = new_figure(11, 1.6 + 0.72 * len(scores))
    axes = figure.add_subplot()
    looks = ((BLUE, "o", -0.16), (VERMILION, "s", 0.16))
    programs = list(next(iter(scores.values())))
    for program, (colour, marker, shift) in zip(programs, looks, strict=True):
        found = [each[program] for each in scores.values()]
        axes.errorbar(
            [score for score, _ in found],
            [row + shift for row in range(len(scores))],
            xerr=[2 * error for _, error in found],
            fmt=marker,
            color=colour,
            markersize=8,
            capsize=5,
            linewidth=2,
            label=program,
        )
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.legend(fontsize=FONT_SIZE, framealpha=0.9, edgecolor="none")
    finish_axes(axes, "One model, two programs: scores with two standard errors", "accuracy", "")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    overlap = all(abs(a - b) <= 2 * (s + t) for (a, s), (b, t) in (tuple(each.values()) for each in scores.values()))
    words = "; ".join(
        f"{task}: " + ", ".join(f"{score:.3f}" for score, _ in each.values()) for task, each in scores.items()
    )
    return Picture(figure, f"{'All intervals overlap' if overlap else 'Some intervals do not overlap'}. {words}.")
