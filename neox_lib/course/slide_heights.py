"""How high a cell stands on a slide, estimated from its text: a page of 1280 x 720, set as notebooks/rise.css says.

All heights are pixels of that page, and err on the high side: letters are counted as wide ones.
"""

import base64
import html
import math
import re
import struct

LINE, SIGNS_A_LINE = 32, 88  # of text at 24 px in a width of 1200
CODE_LINE, SIGNS_A_CODE_LINE = 22, 116  # at 17 px
BELOW = 12  # a paragraph, a list, a table
HEADINGS = {1: 64, 2: 52, 3: 45}
ROW, FORMULA, REMARK, PLAYGROUND = 34, 70, 28, 600
LONGEST_CODE, LONGEST_BESIDE_A_FIGURE = 16, 8  # lines

DETAILS = re.compile(r"<details([^>]*)>\s*<summary>(.*?)</summary>.*?</details>", re.DOTALL)
FENCE = re.compile(r"^```.*?^```[ ]*$", re.DOTALL | re.MULTILINE)
DISPLAYED = re.compile(r"\$\$.*?\$\$", re.DOTALL)
ITEM = r"\s*(?:[-*]|\d+\.) "
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/]{64})")


def rows(text: str, signs: int) -> int:
    """Lines that a text takes where `signs` letters fit into one; an empty text takes one."""
    return max(1, math.ceil(len(text) / signs))


def code_rows(source: str) -> int:
    return sum(rows(line, SIGNS_A_CODE_LINE) for line in source.splitlines())


def visible(markdown: str) -> str:
    """The letters that a reader sees: no targets of links, no tags, no marks."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return html.unescape(re.sub(r"<[^>]+>|\*\*|`", "", text)).strip()


def text_height(markdown: str) -> int:
    """Of a Markdown cell. Of what is folded away the summary counts; a note to the teacher is not on the slide.

    >>> text_height("One line."), text_height("## A heading\\n\\n- one\\n- two")
    (44, 128)
    """
    height = 0
    for fence in FENCE.findall(markdown):
        height += BELOW + 10 + (code_rows(fence) - 2) * CODE_LINE
    markdown = FENCE.sub("\n\n", markdown)
    height += (BELOW + FORMULA) * len(DISPLAYED.findall(markdown))
    markdown = DISPLAYED.sub("\n\n", markdown)
    markdown = DETAILS.sub(lambda found: "" if "teacher-note" in found[1] else f"\n\n{found[2]}\n\n", markdown)
    return height + sum(block_height(block.strip("\n")) for block in re.split(r"\n\s*\n", markdown))


def block_height(block: str) -> int:
    """Of a paragraph, a list, a table, or a heading with what follows it at once."""
    heading = re.match(r"(#{1,6}) +(.*)\n?", block)
    if heading:
        level = min(len(heading[1]), 3)
        wrapped = (rows(visible(heading[2]), 54 if level < 3 else 70) - 1) * 39
        return HEADINGS[level] + wrapped + block_height(block[heading.end() :])
    if not visible(block):
        return 0
    if block.startswith("|"):
        return BELOW + sum(
            ROW * rows(visible(row), 110) for row in block.splitlines() if not re.match(r"[-:| ]+$", row)
        )
    signs = SIGNS_A_LINE - 4 if re.match(ITEM, block) else SIGNS_A_LINE
    return BELOW + sum(rows(visible(item), signs) * LINE for item in re.split(rf"\n(?={ITEM})", block))


def picture_size(page: str) -> tuple[int, int] | None:
    """Width and height in pixels of the first PNG in an HTML output; PNG writes them behind its 16th byte."""
    found = PNG.search(page)
    return struct.unpack(">II", base64.b64decode(found[1])[16:24]) if found else None


def html_of(output) -> str:
    return "".join(output.get("data", {}).get("text/html", ""))


def is_plain(output) -> bool:
    """Whether an output is printed text."""
    return output.output_type == "stream" or not html_of(output)


def shows_code(cell) -> bool:
    """Whether the code of a cell stands on its slide: beside a figure only a short one, beside a result no long one."""
    lines, page = len(cell.source.splitlines()), "".join(map(html_of, cell.outputs))
    if "np-still" in page or (picture_size(page) and lines > LONGEST_BESIDE_A_FIGURE):
        return False
    return lines <= LONGEST_CODE or not cell.outputs


def output_height(cell, output) -> int:
    page = html_of(output)
    if is_plain(output):
        text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
        return code_rows("".join(text)) * CODE_LINE
    size = picture_size(page)
    if size:
        beside = any(map(is_plain, cell.outputs)) or 5 <= len(cell.source.splitlines()) <= LONGEST_BESIDE_A_FIGURE
        return min(440 if beside else 540, round(size[1] * min(1, 1200 / size[0])))
    return PLAYGROUND if "np-still" in page else page_height(page)


def page_height(page: str) -> int:
    """Of an HTML output without a figure: paragraphs, folded answers, coloured tokens, the rows of a table."""
    page = DETAILS.sub(r"<p>\2</p>", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    table_rows = page.count("<tr")
    blocks = re.split(r"</?(?:p|div|li|br)\b[^>]*>", re.sub(r"<table.*?</table>", "", page, flags=re.DOTALL))
    return table_rows * ROW + sum(BELOW + rows(visible(each), SIGNS_A_LINE) * LINE for each in blocks if visible(each))


def cell_height(cell) -> int:
    """Of a cell of any kind with its stored outputs."""
    if cell.cell_type != "code":
        return text_height(cell.source)
    if shows_code(cell):
        height = 10 + code_rows(cell.source) * CODE_LINE
    else:
        height = REMARK if len(cell.source.splitlines()) > LONGEST_CODE else 0
    return height + sum(4 + output_height(cell, output) for output in cell.outputs)
