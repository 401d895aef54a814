"""Whether a model's passes call hooks at all."""

from neox_lib.model import NeoXModel


def require_hooks(model: NeoXModel) -> None:
    """Raise ValueError for a model that decodes in compiled loops: they call no hook of PyTorch."""
    if model.step is not None:
        raise ValueError(
            "this model decodes in compiled loops, which call no hooks: set model.step = None, which sends every pass "
            "through the layers, and try again"
        )
