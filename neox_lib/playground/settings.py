"""How the playground writes: how many tokens, greedy or drawn, with the KV cache or without."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from neox_lib.sampling import Sampling

# By name: annotations may be strings, and a check of types would then let everything pass.
KINDS = {
    "tokens": "a whole number",
    "use_cache": "true or false",
    "repetition_penalty": "a number",
    "stop_strings": "a list of texts",
    "sampled": "true or false",
    "temperature": "a number",
    "top_k": "a whole number",
    "top_p": "a number",
    "min_p": "a number",
    "seed": "a whole number",
}
TYPES = {
    "a whole number": (int,),
    "a number": (int, float),
    "true or false": (bool,),
    "a list of texts": (tuple,),
}


@dataclass(frozen=True)
class Settings:
    """What the controls say. `top_k` 0, `top_p` 1 and `min_p` 0 cut nothing off, and `repetition_penalty` 1 changes
    nothing. Raises ValueError naming a setting and its value.

    The fields below `sampled` matter only when it is true.
    """

    tokens: int = 60
    use_cache: bool = True
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    sampled: bool = False
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.stop_strings, list):  # as a page and a file have it
            object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        for name, kind in KINDS.items():
            if type(getattr(self, name)) not in TYPES[kind]:
                raise ValueError(f"{name} must be {kind}, got {getattr(self, name)!r}")
        if self.tokens < 1:
            raise ValueError(f"tokens must be 1 or more, got {self.tokens}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no cut) or more, got {self.top_k}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; use greedy for the likeliest token")
        self.drawn()

    def drawn(self, written: int = 0) -> Sampling:
        """The Sampling of these settings where tokens are drawn."""
        seed = (self.seed + written) % 2**63 if written else self.seed
        cuts = self.top_k or None, self.top_p
        return Sampling(self.temperature, *cuts, seed, self.min_p, self.repetition_penalty, self.stop_strings)

    def sampling(self, written: int = 0) -> Sampling:
        """The Sampling for `stream_generate`; each continuation, after `written` tokens, gets its own seed."""
        drawn = self.drawn(written)
        return drawn if self.sampled else dataclasses.replace(drawn, temperature=0.0)

    def changed(self, changes: dict) -> "Settings":
        """These settings with some changed. Raises ValueError for an unknown name or an invalid value."""
        unknown = changes.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"no setting is called {', '.join(sorted(map(str, unknown)))}")
        return dataclasses.replace(self, **changes)


def settings_of(sampling: Sampling) -> dict[str, Any]:
    """A Sampling as settings: values for `Settings.changed`."""
    drawn = {"temperature": sampling.temperature} if sampling.temperature else {}
    cuts = {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0, "min_p": sampling.min_p or 0.0}
    rest = {name: getattr(sampling, name) for name in ("seed", "repetition_penalty", "stop_strings")}
    return {"sampled": bool(drawn)} | drawn | cuts | rest
