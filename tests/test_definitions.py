"""A lesson's cells hold the very text of these modules: each definition must fit into one, and the cells must run."""

import ast

import pytest

from neox_lib.course.promote import module_path

PROMOTED = [
    "tokenizer",
    "rotary",
    "attention",
    "padding",
    "block",
    "model",
    "checkpoints.slim.partition",
    "checkpoints.slim.reader",
    "checkpoints.build",
    "cache",
    "generation",
    "training.loop",
    "inspection.attention",
    "inspection.lens",
    "inspection.heads",
    "inspection.patching",
    "playground.streaming",
    "quantization.int8",
    "quantization.int4",
    "distributed.tensor_parallel",
    "evaluation.likelihood",
]
LONGEST = 50  # lines, docstring and decorators included


def definitions(module: str) -> list[tuple[set[str], ast.stmt, str]]:
    """The names, the tree and the text of each top-level statement that defines something, in the file's order."""
    source = module_path(module).read_text("utf-8")
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names, first = {node.name}, min([node.lineno, *(each.lineno for each in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            first = node.lineno
        else:
            continue
        found.append((names, node, "\n".join(source.splitlines()[first - 1 : node.end_lineno])))
    return found


@pytest.mark.parametrize("module", PROMOTED)
def test_a_definition_fits_into_a_cell(module):
    """A longer one would not be read, and not be shown on the wall."""
    lengths = {", ".join(names): len(text.splitlines()) for names, _, text in definitions(module)}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("module", PROMOTED)
def test_no_definition_asks_for_its_file(module):
    """A cell has no `__file__`."""
    assert [names for names, _, text in definitions(module) if "__file__" in text] == []


@pytest.mark.parametrize("module", PROMOTED)
def test_a_definition_uses_only_what_stands_above_it(module):
    """Cells run from top to bottom, and a learner reads them so: what a piece is made of comes first."""
    all_names = set().union(*(names for names, _, _ in definitions(module)))
    above: set[str] = set()
    for names, node, _ in definitions(module):
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & all_names
        assert used - above - names == set(), f"{', '.join(names)} uses these before their cell"
        above |= names
