"""The state of one person's playground, as plain data that every view reads."""

from dataclasses import dataclass, field

from torch import Tensor

from neox_lib.chat import ChatTemplate
from neox_lib.inspection.tokens import Candidate
from neox_lib.model import NeoXModel
from neox_lib.playground.branches import Branches
from neox_lib.playground.costs import Costs
from neox_lib.playground.settings import Settings
from neox_lib.recall import Recall


@dataclass
class State:
    """A model, a prompt, what has been written, and what is inspected.

    `phase` is "idle", "reading" (a prompt goes through the model), "writing" or "looking". `chosen` is a position of
    the current branch; a value equal to its length means the next token. `candidates` are the likeliest tokens
    at position `scored`, which need not be the chosen one yet, and `taken` is the token there. `attention` holds the
    weights of the chosen token, `[L, H, T]`, and `lens` what each layer would say at the chosen position,
    log-probabilities `[L + 1, V]`: the one that `watching` names.
    """

    model: NeoXModel
    tokenizer: object
    name: str = "model"
    template: ChatTemplate | None = None
    prompt: str = ""
    settings: Settings = field(default_factory=Settings)
    branches: Branches = field(default_factory=Branches)
    phase: str = "idle"
    status: str = "Ready."
    error: str = ""
    chosen: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    taken: Candidate | None = None
    scored: int | None = None
    watching: str = ""  # "attention", "lens", or neither
    attention: Tensor | None = None
    lens: Tensor | None = None
    layer: int = 0
    head: int = 0
    costs: Costs = field(default_factory=Costs)
    prefill_seconds: float = 0.0
    tokens_per_second: float = 0.0
    recall: Recall = field(init=False)

    def __post_init__(self):
        self.recall = Recall(self.model)

    @property
    def context(self) -> int:
        """The model's context, in tokens."""
        return self.model.config.max_position_embeddings

    @property
    def ended(self) -> bool:
        """Whether the current branch has come to the end of a text; an end that the prompt holds does not count."""
        branch = self.branches.branch
        return len(branch.ids) > branch.given and branch.ids[-1] in self.model.config.eos_token_ids

    def forget_looks(self) -> None:
        self.candidates, self.taken, self.scored = [], None, None
        self.attention = self.lens = None
