"""Promotion: notebook and library hold one text, and no way of promoting leaves the library broken."""

import hashlib
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import neox_lib
from neox_lib.course import moved as table
from neox_lib.course import promote
from neox_lib.course.imports import bound_names, free_names
from neox_lib.course.promote import PromotionError

LIBRARY = Path(neox_lib.__file__).parent
ROOT = LIBRARY.parent

MODULE = '''"""A small piece."""

import math

# how wide
WIDTH = 3


def area(height):
    return WIDTH * height  # why not


@staticmethod
def root(x):
    return math.sqrt(x)
'''


def cell(text: str, module: str | None = "small"):
    return new_code_cell(text, metadata={"tags": ["promote"]} | ({"module": module} if module else {}))


def write_notebook(folder: Path, name: str, *cells) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A title"), *cells]), path)
    return path


FUNCTIONS = MODULE[MODULE.index("def area") :].rstrip("\n")
CELLS = (new_code_cell("import math"), cell("# how wide\nWIDTH = 3"), cell(FUNCTIONS))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A library of one small module, and a folder of notebooks that promote all of it."""
    library = tmp_path / "neox_lib"
    library.mkdir()
    (library / "__init__.py").write_text("")
    (library / "small.py").write_text(MODULE)
    monkeypatch.setattr(promote, "LIBRARY", library)
    write_notebook(tmp_path / "notebooks", "01_small.ipynb", *CELLS)
    return tmp_path


def edit_notebook(house: Path, old: str, new: str) -> None:
    path = house / "notebooks" / "01_small.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for each in notebook.cells:
        each.source = each.source.replace(old, new)
    nbformat.write(notebook, path)


def module_text(house: Path) -> str:
    return (house / "neox_lib" / "small.py").read_text()


def test_what_agrees_shows_no_difference_and_promoting_it_changes_nothing(house):
    assert promote.differences(house / "notebooks") == []
    assert promote.promote(house / "notebooks") == []
    assert promote.pull(house / "notebooks") == []
    assert module_text(house) == MODULE


@pytest.mark.parametrize(
    ("old", "new"), [("# why not", "# because"), ("# how wide", "# width"), ("WIDTH = 3", "WIDTH = 4")]
)
def test_an_edit_in_the_notebook_is_seen_promoted_and_then_agrees(house, old, new):
    """Comments count: they teach, so they may not drift."""
    edit_notebook(house, old, new)
    (diff,) = promote.differences(house / "notebooks")
    assert "+" in diff and new in diff and "01_small.ipynb" in diff
    assert promote.promote(house / "notebooks") == ["small"]
    assert module_text(house) == MODULE.replace(old, new)
    assert promote.differences(house / "notebooks") == []
    assert promote.promote(house / "notebooks") == []


def test_a_piece_in_a_wing_is_promoted_and_taken_back_when_broken(house):
    """Its file is found by its dotted name, and a break in it is noticed although it is not at the library's top."""
    wing = house / "neox_lib" / "wing"
    wing.mkdir()
    (wing / "__init__.py").write_text("")
    (wing / "piece.py").write_text("TALL = 1\n")
    write_notebook(house / "notebooks", "02_wing.ipynb", cell("TALL = 2", "wing.piece"))
    (diff,) = promote.differences(house / "notebooks")
    assert "neox_lib/wing/piece.py TALL" in diff
    assert promote.promote(house / "notebooks") == ["wing.piece"]
    assert (wing / "piece.py").read_text() == "TALL = 2\n"
    write_notebook(house / "notebooks", "02_wing.ipynb", cell("TALL = 1 / 0", "wing.piece"))
    with pytest.raises(promote.PromotionError, match="ZeroDivisionError"):
        promote.promote(house / "notebooks")
    assert (wing / "piece.py").read_text() == "TALL = 2\n"


def test_an_edit_in_the_library_is_seen_and_pulled_with_outputs_kept(house):
    path = house / "notebooks" / "01_small.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[3].outputs = [nbformat.v4.new_output("stream", text="kept")]
    nbformat.write(notebook, path)
    (house / "neox_lib" / "small.py").write_text(MODULE.replace("# why not", "# because"))
    assert len(promote.differences(house / "notebooks")) == 1
    assert promote.pull(house / "notebooks") == ["01_small.ipynb"]
    assert promote.differences(house / "notebooks") == []
    notebook = nbformat.read(path, as_version=4)
    assert "# because" in notebook.cells[3].source and notebook.cells[3].outputs[0].text == "kept"


def test_a_definition_that_two_notebooks_promote_fails_with_its_name(house):
    write_notebook(house / "notebooks", "02_again.ipynb", cell("WIDTH = 5"))
    with pytest.raises(PromotionError, match=r"small\.WIDTH is promoted twice: 01_small.*02_again"):
        promote.collect(house / "notebooks")


def test_a_public_definition_that_no_notebook_promotes_fails_with_its_name(house, monkeypatch):
    """Only an author has to mend that: a student's copy imports what would give an exercise away."""
    (house / "neox_lib" / "small.py").write_text(MODULE + "\n\ndef lost():\n    pass\n\n\ndef _private():\n    pass\n")
    assert promote.differences(house / "notebooks") == []
    monkeypatch.setattr(promote, "NOTEBOOKS", house / "notebooks")
    (found,) = promote.differences(house / "notebooks")
    assert "lost is public" in found


@pytest.mark.parametrize("text", ["print(area(2))", "import math", "WIDTH = 3\nprint(WIDTH)", "def broken(:"])
def test_a_cell_that_is_not_whole_definitions_is_refused_with_its_place(house, text):
    ran = cell(text)
    ran.execution_count = 7
    write_notebook(house / "notebooks", "02_more.ipynb", ran)
    with pytest.raises(PromotionError, match=r"^02_more\.ipynb, cell \[7\] \""):
        promote.promote(house / "notebooks")
    assert module_text(house) == MODULE


@pytest.mark.parametrize(("module", "message"), [(None, "names no module"), ("nowhere", "no module nowhere")])
def test_a_cell_without_a_module_is_refused(house, module, message):
    write_notebook(house / "notebooks", "02_more.ipynb", cell("A = 1", module))
    with pytest.raises(PromotionError, match=message):
        promote.collect(house / "notebooks")


def test_a_name_that_means_another_thing_in_the_notebook_is_found(house):
    """`math` the module and `math` the function: the same text, two meanings."""
    edit_notebook(house, "import math", "from cmath import sqrt as math")
    (found,) = promote.differences(house / "notebooks")
    assert "`root` uses `math`, which is cmath.sqrt in the notebook and math in neox_lib/small.py" in found


def test_a_name_that_the_library_does_not_import_is_refused(house):
    edit_notebook(house, "import math", "import math\nimport cmath")
    edit_notebook(house, "math.sqrt", "cmath.sqrt")
    message = "`root` uses `cmath`, but `cmath` is not imported in neox_lib/small.py. Write `import cmath` inside"
    with pytest.raises(PromotionError, match=message):
        promote.promote(house / "notebooks")
    assert module_text(house) == MODULE


def test_an_import_by_another_name_is_written_out(house):
    edit_notebook(house, "import math", "import math\nimport torch.nn.functional as F")
    edit_notebook(house, "math.sqrt", "F.relu")
    with pytest.raises(PromotionError, match=r"Write `from torch.nn import functional as F` inside the function"):
        promote.promote(house / "notebooks")


def test_a_function_of_the_notebook_that_the_library_lacks_is_to_be_promoted_too(house):
    """The most natural promotion of all: a piece that calls the learner's own function."""
    edit_notebook(house, "import math", "import math\n\ndef my_root(x):\n    return x**0.5")
    edit_notebook(house, "math.sqrt", "my_root")
    with pytest.raises(PromotionError, match=r"Put the definition of `my_root` into the same promoted cell, above"):
        promote.promote(house / "notebooks")
    assert module_text(house) == MODULE


def test_a_piece_under_a_name_of_the_learners_is_told_the_librarys_name(house):
    """A class left as MyBlock: what uses Block finds nothing in the notebook."""
    edit_notebook(house, "WIDTH = 3", "MY_WIDTH = 3")
    with pytest.raises(
        PromotionError, match=r"`area` uses `WIDTH`, which nothing in 01_small.ipynb defines. If you ren"
    ):
        promote.promote(house / "notebooks")


def test_a_new_definition_of_the_learner_stands_behind_the_one_before_it(house):
    edit_notebook(house, "# how wide\nWIDTH = 3", "# how wide\nWIDTH = 3\n\n\ndef twice(x):\n    return 2 * x")
    promote.promote(house / "notebooks")
    names = [each.name for each in promote.definitions(module_text(house))]
    assert names == ["WIDTH", "twice", "area", "root"]


def test_a_piece_that_can_not_be_imported_is_taken_back_with_one_line(house):
    edit_notebook(house, "WIDTH = 3", "WIDTH = 3 / 0")
    with pytest.raises(PromotionError, match="ZeroDivisionError") as caught:
        promote.promote(house / "notebooks")
    assert "\n" not in str(caught.value)
    assert module_text(house) == MODULE


def test_promotion_mends_a_library_that_is_broken_now(house):
    """Nothing of it imports a piece, so a broken one can't lock the learner out."""
    (house / "neox_lib" / "small.py").write_text(MODULE.replace("WIDTH = 3", "WIDTH = 3 / 0"))
    assert promote.promote(house / "notebooks") == ["small"]
    assert module_text(house) == MODULE


@pytest.mark.parametrize("direction", [promote.promote, promote.differences, promote.pull])
def test_a_module_that_is_no_python_is_named_with_the_remedy(house, direction):
    (house / "neox_lib" / "small.py").write_text(MODULE + "def broken(:\n")
    with pytest.raises(PromotionError, match=r"^neox_lib/small\.py: not valid Python: .*git checkout neox_lib/small"):
        direction(house / "notebooks")


@pytest.mark.parametrize("failing_write", [1, 2])
def test_a_failed_write_leaves_the_library_whole(house, monkeypatch, failing_write):
    """A full disk after the first of two modules must not leave one new and one old."""
    (house / "neox_lib" / "other.py").write_text("A = 1\n")
    write_notebook(house / "notebooks", "02_other.ipynb", cell("A = 2", "other"))
    edit_notebook(house, "WIDTH = 3", "WIDTH = 4")
    calls, write = [], promote.write_bytes_atomically

    def full_disk(path, content):
        calls.append(path)
        if len(calls) == failing_write:
            raise OSError("no space left on device")
        write(path, content)

    monkeypatch.setattr(promote, "write_bytes_atomically", full_disk)
    with pytest.raises(PromotionError, match="no space left"):
        promote.promote(house / "notebooks")
    assert module_text(house) == MODULE
    assert (house / "neox_lib" / "other.py").read_text() == "A = 1\n"


def test_newer_originals_beside_a_learners_copy_do_not_count(house):
    shutil.copy(house / "notebooks" / "01_small.ipynb", house / "notebooks" / "01_small.new.ipynb")
    assert len(promote.collect(house / "notebooks")) == 3


@pytest.fixture
def moved(house, monkeypatch):
    """The module small has moved from a wing that is no more, and its constant to another module."""
    monkeypatch.setattr(table, "MODULES", {"wing.little": "small"})
    monkeypatch.setattr(table, "NAMES", {"wing.little.WIDTH": "sizes.WIDTH"})
    monkeypatch.setitem(table.GONE, "wing.height", "small.area")
    (house / "neox_lib" / "sizes.py").write_text("# how wide\nWIDTH = 3\n")
    (house / "neox_lib" / "small.py").write_text(
        MODULE.replace("# how wide\nWIDTH = 3", "").replace(
            "import math", "import math\n\nfrom neox_lib.sizes import WIDTH"
        )
    )
    cells = (new_code_cell("import math"), cell("# how wide\nWIDTH = 3", "wing.little"), cell(FUNCTIONS, "wing.little"))
    write_notebook(house / "notebooks", "01_small.ipynb", *cells)
    return house


def test_a_copy_of_before_promotes_into_where_its_pieces_stand_now(moved):
    assert promote.differences(moved / "notebooks") == []
    edit_notebook(moved, "# why not", "# mine")
    edit_notebook(moved, "WIDTH = 3", "WIDTH = 4")
    assert promote.promote(moved / "notebooks") == ["sizes", "small"]
    assert promote.older_copies(moved / "notebooks", ["small"]) == ["01_small.ipynb"], "it may not fit any more"
    assert "# mine" in module_text(moved) and "WIDTH = 4" in (moved / "neox_lib" / "sizes.py").read_text()


def test_an_import_by_an_old_name_means_what_stands_there_now(moved):
    """`from neox_lib.wing.little import WIDTH` in the copy is the library's `from neox_lib.sizes import WIDTH`."""
    imports = new_code_cell("import math\n\nfrom neox_lib.wing.little import WIDTH")
    write_notebook(moved / "notebooks", "01_small.ipynb", imports, cell(FUNCTIONS, "wing.little"))
    assert promote.promote(moved / "notebooks") == []


def test_a_piece_that_uses_what_is_gone_is_refused_with_what_to_use(moved):
    edit_notebook(moved, "import math", "import math\n\nfrom neox_lib.wing import height as tall")
    edit_notebook(moved, "WIDTH * height", "WIDTH * tall")
    with pytest.raises(PromotionError, match=r"wing\.height is gone; use neox_lib\.small\.area\. make lab-refresh"):
        promote.promote(moved / "notebooks")


def test_a_piece_that_is_gone_is_refused_with_what_to_use(moved):
    write_notebook(moved / "notebooks", "02_wing.ipynb", cell("def height():\n    return 1  # mine", "wing"))
    (moved / "neox_lib" / "wing.py").write_text("")
    with pytest.raises(
        PromotionError,
        match=r"02_wing.*, cell \[ \] \"def height\(\):\": .*wing\.height is gone; use neox_lib\.small\.area",
    ):
        promote.promote(moved / "notebooks")


def test_the_text_of_an_older_original_does_not_take_the_library_back(house, monkeypatch):
    """The library has been rewritten since; what the learner wrote themselves is promoted all the same."""
    old = promote.definitions(MODULE)
    digests = " ".join(hashlib.sha256(each.text.encode()).hexdigest()[:8] for each in old)
    monkeypatch.setattr(table, "OLDER_TEXTS", digests)
    (house / "neox_lib" / "small.py").write_text(MODULE.replace("math.sqrt(x)", "x**0.5"))
    edit_notebook(house, "# why not", "# mine")
    left = promote.of_older_originals(promote.collect(house / "notebooks"))
    assert [each.definition.name for each in left] == ["WIDTH", "root"]
    assert promote.promote(house / "notebooks") == ["small"]
    assert "x**0.5" in module_text(house) and "# mine" in module_text(house)


def test_of_a_copy_of_before_only_what_the_learner_changed_differs(house, monkeypatch):
    """Not the old texts, nor the new definitions that only newer originals promote."""
    digests = [hashlib.sha256(each.text.encode()).hexdigest()[:8] for each in promote.definitions(MODULE)]
    monkeypatch.setattr(table, "OLDER_TEXTS", " ".join(digests))
    newer = MODULE.replace("math.sqrt(x)", "x**0.5") + "\n\ndef new():\n    return 1\n"
    (house / "neox_lib" / "small.py").write_text(newer)
    assert promote.differences(house / "notebooks") == []
    edit_notebook(house, "# why not", "# mine")
    (diff,) = promote.differences(house / "notebooks")
    assert "# mine" in diff and "sqrt" not in diff


def test_a_text_that_the_originals_still_hold_is_promoted(house, monkeypatch):
    """Else nobody could take a change of theirs in the library back with an original."""
    monkeypatch.setattr(promote, "NOTEBOOKS", house / "notebooks")
    digests = [hashlib.sha256(each.text.encode()).hexdigest()[:8] for each in promote.definitions(MODULE)]
    monkeypatch.setattr(table, "OLDER_TEXTS", " ".join(digests))
    (house / "neox_lib" / "small.py").write_text(MODULE.replace("math.sqrt(x)", "x**0.5"))
    assert promote.promote(house / "notebooks") == ["small"]
    assert module_text(house) == MODULE


def test_names_are_free_unless_bound_or_built_in():
    text = (
        "def f(x, y=WIDTH) -> Tensor:\n    z = x + len(GLOBAL)\n    return [z for each in y]\n"
        "class A(Base):\n    n: int = OTHER\n"
    )
    assert free_names(text) == {"WIDTH", "Tensor", "GLOBAL", "Base", "OTHER"}
    imports = "import torch.nn.functional as F\nimport os.path\nfrom a.b import c as d\n"
    bound = bound_names(imports + "x, y = 1, 2")
    assert bound == {"F": "torch.nn.functional", "os": "os", "d": "a.b.c", "x": "here", "y": "here"}
