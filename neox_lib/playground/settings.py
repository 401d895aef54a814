"""How the playground writes: how many tokens, greedy or drawn, with the KV cache or without."""

import dataclasses
from dataclasses import dataclass

from neox_lib.sampling import GREEDY, Sampling

# By name: annotations may be strings, and a check of types would then let everything pass.
KINDS = {
    "tokens": "a whole number",
    "use_cache": "true or false",
    "sampled": "true or false",
    "temperature": "a number",
    "top_k": "a whole number",
    "top_p": "a number",
    "seed": "a whole number",
}
TYPES = {"a whole number": (int,), "a number": (int, float), "true or false": (bool,)}


@dataclass(frozen=True)
class Settings:
    """What the controls say. `top_k` 0 and `top_p` 1 cut nothing off. Raises ValueError naming a setting and its value.

    The fields below `sampled` matter only when it is true.
    """

    tokens: int = 60
    use_cache: bool = True
    sampled: bool = False
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, kind in KINDS.items():
            if type(getattr(self, name)) not in TYPES[kind]:
                raise ValueError(f"{name} must be {kind}, got {getattr(self, name)!r}")
        if self.tokens < 1:
            raise ValueError(f"tokens must be 1 or more, got {self.tokens}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no cut) or more, got {self.top_k}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; use greedy for the likeliest token")
        Sampling(self.temperature, self.top_k or None, self.top_p, self.seed)

    def sampling(self, written: int = 0) -> Sampling:
        """The Sampling for `stream_generate`; each continuation, after `written` tokens, gets its own seed."""
        if not self.sampled:
            return GREEDY
        return Sampling(self.temperature, self.top_k or None, self.top_p, (self.seed + written) % 2**63)

    def changed(self, changes: dict) -> "Settings":
        """These settings with some changed. Raises ValueError for an unknown name or an invalid value."""
        unknown = changes.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"no setting is called {', '.join(sorted(map(str, unknown)))}")
        return dataclasses.replace(self, **changes)
