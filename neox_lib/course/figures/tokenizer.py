"""The figure of notebook 01, the byte table as a square, and its text: one sentence in seven languages."""

from matplotlib.patches import Rectangle

from neox_lib.course.figures.plots import FONT_SIZE, YELLOW, Picture, new_figure
from neox_lib.tokenizer import BYTE_TO_CHARACTER

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


def byte_table() -> Picture:
    """Every byte's character: on white for bytes that stand for themselves, on yellow for those that were lent one."""
    figure = new_figure(9, 7)
    axes = figure.add_subplot()
    lent = {byte for byte, character in BYTE_TO_CHARACTER.items() if chr(byte) != character}
    for byte, character in BYTE_TO_CHARACTER.items():
        row, column = divmod(byte, 16)
        colour = YELLOW if byte in lent else "white"
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="#777777"))
        weight = "bold" if byte in lent else "normal"
        axes.text(column, row, character, ha="center", va="center", fontsize=FONT_SIZE + 1, fontweight=weight)
    digits = [f"{digit:X}" for digit in range(16)]
    axes.set_xticks(range(16), digits, fontsize=FONT_SIZE)
    axes.set_yticks(range(16), [f"{digit}0" for digit in digits], fontsize=FONT_SIZE)
    axes.set(xlim=(-0.5, 15.5), ylim=(15.5, -0.5))
    axes.tick_params(length=0)
    axes.set_title("The character of each byte (yellow, bold: a lent one)", fontsize=FONT_SIZE + 1)
    axes.set_xlabel("second hexadecimal digit of the byte", fontsize=FONT_SIZE)
    axes.set_ylabel("first hexadecimal digit", fontsize=FONT_SIZE)
    alt = (
        f"A square of 16 by 16 cells, one for each byte. {256 - len(lent)} bytes stand for themselves: letters, "
        f"digits, punctuation. {len(lent)} are lent a character from code point 256 on: the first 33, among them the "
        "space (hex 20, Ġ) and the newline (hex 0A, Ċ), those from hex 7F to A0, and hex AD."
    )
    return Picture(figure, alt)
