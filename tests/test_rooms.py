"""The house: a module builds only on the rooms above it, so that a reader can go through it from top to bottom."""

import ast
from pathlib import Path

import pytest

import neox_lib

PACKAGE = Path(neox_lib.__file__).parent
ROOMS = [
    "config",
    "files",
    "tokenizer",
    "rotary",
    "attention",
    "block",
    "model",
    "layout",
    "saving",
    "sharding",
    "splitting",
    "release",
    "checkpoint",
    "slim_writer",
    "cache",
    "sampling",
    "generation",
    "scoring",
    "scale.linear",
    "scale.packing",
    "scale.hub",
    "scale.fetch",
    "scale.download",
    "scale.named",
    "scale.safetensors_writer",
    "scale.tensor_files",
    "scale.huggingface_config",
    "scale.huggingface_layout",
    "scale.huggingface",
    "scale.weights",
    "scale.huggingface_writer",
    "scale.quantization",
    "scale.int8_linear",
    "scale.int8_packing",
    "scale.mapped_file",
    "scale.int8_file",
    "scale.fits",
    "scale.quality",
    "scale.shards",
    "scale.unfinished",
    "scale.download_int8",
    "scale.convert",
    "scale.loading",
    "scale.parallel",
    "scale.ranks",
    "scale.rank_loading",
    "streaming",
    "play.pieces",
    "play.costs",
    "play.settings",
    "play.roads",
    "play.recall",
    "play.looking",
    "play.state",
    "play.jobs",
    "play.session",
    "play.actions",
    "play.views",
    "play.saved",
    "play.picture",
    "play.page",
    "playground",
    "play.serve",
    "scale.contenders",
    "scale.rivals",
    "scale.bench_table",
    "scale.bench",
    "scale.random_checkpoint",
    "scale.full_size",
    "lesson.plots",
    "lesson.diagrams",
    "lesson.figures_attention",
    "lesson.figures_rotary",
    "lesson.figures_start_here",
    "lesson.figures_checkpoint_loading",
    "lesson.peak_memory",
    "lesson.learner_copy",
    "lesson.imports",
    "lesson.promote",
    "lesson.slide_heights",
    "lesson.slides",
    "lesson.present",
    "lesson.store",
    "lesson.site",
    "lesson.progress",
    "lesson.predictions",
    "lesson.series",
    "lesson.checks",
    "lesson.figures_parallel_residual",
    "lesson.exercises.parallel_residual",
    "lesson.real_tokenizer",
    "lesson.figures_tokenizer",
    "lesson.exercises.tokenizer",
    "lesson.exercises.checkpoint_loading",
    "lesson.exercises.attention",
    "lesson.exercises.rotary",
    "lesson.exercises.start_here",
    "lesson.figures_cached_generation",
    "lesson.exercises.cached_generation",
    "lesson.exercises.prompt_playground",
    "lesson.figures_two_devices",
    "lesson.two_devices",
    "lesson.exercises.two_devices",
    "lesson.exercises.small_machine",
    "training",
    "classroom.student",
    "classroom.asked",
    "classroom.handed_in",
    "classroom.run_checks",
    "classroom.watch",
    "classroom.report",
    "classroom.machine",
    "classroom.packages",
    "classroom.doctor",
    "commands.generate",
    "commands.info",
    "commands.train",
    "commands.convert",
    "commands.download",
    "commands.bench",
    "commands.promote",
    "commands.student",
    "commands.class_report",
    "commands.doctor",
    "__main__",
]


def modules() -> dict[str, Path]:
    """Every module but the packages' own files, which hold no pieces."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "neox_lib":
            base = node.module.removeprefix("neox_lib").lstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                names.add(whole if whole in modules() else base)
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("neox_lib.") for alias in node.names if alias.name.startswith("neox_lib.")
            }
    return names


def test_every_module_has_its_room():
    assert set(modules()) == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_module_imports_only_from_rooms_above_it(name):
    above = set(ROOMS[: ROOMS.index(name)])
    below = imported(modules()[name]) - above
    assert not below, f"{name} imports {', '.join(sorted(below))}, which stands below it"


@pytest.mark.parametrize("name", ROOMS)
def test_nothing_needs_transformers_to_be_imported(name):
    """Hugging Face's model code is what we compare with; importing a piece must not need it."""
    top_level = ast.parse(modules()[name].read_text("utf-8")).body
    for node in top_level:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not any(each.split(".")[0] == "transformers" for each in names)
