"""The figure of notebook 01, a text cut up in rows of boxes, and its text: one sentence in seven languages."""

from collections.abc import Mapping, Sequence

from matplotlib.patches import Rectangle

from neox_lib.course.figures.plots import FONT_SIZE, SKY, Picture, new_figure

# First sentence of article 1 of the Universal Declaration of Human Rights, in the UN's own translations (ohchr.org)
SENTENCES = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",  # noqa: RUF001
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",  # noqa: RUF001
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",  # noqa: RUF001
}


def box_rows(rows: Mapping[str, Sequence[tuple[str, int]]], title: str) -> Picture:
    """Rows of boxes above one another, each row named on its left: `{name: [(text, width in units), ...]}`."""
    widest = max(sum(width for _, width in boxes) for boxes in rows.values())
    unit = min(0.9, 8 / widest)  # inches
    figure = new_figure(unit * widest + 0.14 * max(map(len, rows)) + 0.4, 0.62 * len(rows) + 0.6)
    axes = figure.add_subplot()
    for row, boxes in enumerate(rows.values()):
        left = 0
        for index, (text, width) in enumerate(boxes):
            colour = SKY if index % 2 else "white"  # neighbours differ by their frame too
            axes.add_patch(Rectangle((left, row + 0.1), width, 0.8, facecolor=colour, edgecolor="black", linewidth=1.5))
            size = FONT_SIZE + 2 if len(text) <= 3 * width or width > 3 else FONT_SIZE - 2
            axes.text(left + width / 2, row + 0.5, text.replace(" ", "·"), ha="center", va="center", fontsize=size)
            left += width
    axes.set(xlim=(-0.05, widest + 0.05), ylim=(len(rows), 0))
    axes.set_yticks([row + 0.5 for row in range(len(rows))], list(rows), fontsize=FONT_SIZE)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    told = "; ".join(f"{name}: {' | '.join(text for text, _ in boxes)}" for name, boxes in rows.items())
    return Picture(figure, f"Rows of boxes. {title}. {told}.")
