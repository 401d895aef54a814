"""Figures: tensors and labels in, a matplotlib Figure out, one look for all."""

from matplotlib.figure import Figure

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color/): told apart by colour-blind readers too
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
FONT_SIZE = 13


def new_figure(width: float = 8, height: float = 4.5) -> Figure:
    """An empty figure in inches, at 100 dots an inch."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def finish_axes(axes, title: str, x_label: str, y_label: str) -> None:
    """Labels that are read from the back of a room, and no frame where there is nothing to read off."""
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    axes.set_xlabel(x_label, fontsize=FONT_SIZE)
    axes.set_ylabel(y_label, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)


def loss_curves(history: list[dict]) -> Figure:
    """Training and validation loss against tokens seen; `history` as `training.train` returns it."""
    figure = new_figure()
    axes = figure.add_subplot()
    tokens = [row["tokens"] / 1e6 for row in history]
    for key, name, colour, style in (
        ("loss", "training", BLUE, "-"),
        ("validation_loss", "validation", VERMILION, "--"),
    ):
        losses = [row[key] for row in history]
        axes.plot(tokens, losses, style, color=colour, linewidth=2.2, label=f"{name}, {losses[-1]:.2f} at the end")
    axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish_axes(axes, "What the model has learned", "million tokens seen", "loss, nats a token")
    return figure
