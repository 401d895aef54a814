"""GPT-NeoX, from a 7 MB story-teller to the released 20B, in the pieces that the notebooks build.

Importing this package imports none of them: a name's module is loaded on first use, so `promote` and `--help` still
work while a piece is broken.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox_lib.cache import KVCache
    from neox_lib.chat import Chat, create_chat_template
    from neox_lib.config import NeoXConfig
    from neox_lib.generation import greedy_generate, greedy_generate_text, stream_generate
    from neox_lib.loading import create_model, create_sampling, create_tokenizer
    from neox_lib.model import NeoXModel
    from neox_lib.sampling import Sampling

HOME = {
    "Chat": "chat",
    "KVCache": "cache",
    "NeoXConfig": "config",
    "NeoXModel": "model",
    "Sampling": "sampling",
    "create_chat_template": "chat",
    "create_model": "loading",
    "create_sampling": "loading",
    "create_tokenizer": "loading",
    "greedy_generate": "generation",
    "greedy_generate_text": "generation",
    "stream_generate": "generation",
}

__all__ = [
    "Chat",
    "KVCache",
    "NeoXConfig",
    "NeoXModel",
    "Sampling",
    "create_chat_template",
    "create_model",
    "create_sampling",
    "create_tokenizer",
    "greedy_generate",
    "greedy_generate_text",
    "stream_generate",
]


def __getattr__(name: str):
    if name not in HOME:
        raise AttributeError(f"module 'neox_lib' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"neox_lib.{HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOME})
