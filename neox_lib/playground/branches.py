"""The text as a tree: taking another token starts a new branch, and all branches are kept."""

from dataclasses import dataclass, field

from neox_lib.recall import shared_beginning

Score = float | None  # a token's log-probability, None for a token of the prompt


@dataclass
class Branch:
    """One text from first token to last: its ids, and the log-probability that the model gave each.

    The first `given` tokens are the prompt's. `parent` is the number of the branch it left, at position `fork`.
    """

    ids: list[int]
    scores: list[Score]
    given: int
    parent: int | None = None
    fork: int = 0

    def add(self, token_id: int, score: Score) -> None:
        self.scores.append(score)  # first, so that a concurrent reader finds a score for every id
        self.ids.append(token_id)


@dataclass
class Branches:
    """All branches from one prompt, oldest first; `current` is the index of the one being shown."""

    branches: list[Branch] = field(default_factory=list)
    current: int = 0

    def __len__(self) -> int:
        return len(self.branches)

    @property
    def branch(self) -> Branch:
        """The current branch. Raises IndexError before there is one."""
        return self.branches[self.current]

    def start(self, ids: list[int]) -> Branch:
        """Forget all branches and begin with a prompt's tokens."""
        self.branches, self.current = [Branch(list(ids), [None] * len(ids), len(ids))], 0
        return self.branch

    def go_on(self, ids: list[int]) -> Branch:
        """Go on with a longer prompt's tokens, or begin with them where there is no branch.

        The current branch grows where they begin with all of it; else a new one forks off where they differ.
        """
        if not self.branches:
            return self.start(ids)
        branch = self.branch
        shared = shared_beginning(branch.ids, ids)
        if shared < len(branch.ids):
            branch = Branch(branch.ids[:shared], branch.scores[:shared], shared, self.current, shared)
            self.branches.append(branch)
            self.current = len(self.branches) - 1
        for token_id in ids[shared:]:
            branch.add(token_id, None)
        branch.given = len(ids)
        return branch

    def clear(self) -> None:
        self.branches, self.current = [], 0

    def choose(self, number: int) -> Branch:
        """Make another branch current. Raises ValueError for a number that no branch has."""
        if type(number) is not int or not 0 <= number < len(self.branches):
            raise ValueError(f"there is no branch {number!r}: they run from 0 to {len(self.branches) - 1}")
        self.current = number
        return self.branch

    def take(self, position: int, token_id: int, score: float) -> Branch:
        """Take `token_id` at `position` of the current branch: another token than it had, or one after its end.

        A branch that already begins this way becomes current; else a new one forks off. At the very end the current
        branch continues. Raises ValueError for a position outside it.
        """
        branch = self.branch
        if not 0 <= position <= len(branch.ids):
            raise ValueError(f"position {position} is not on this branch, which has {len(branch.ids)} tokens")
        beginning = [*branch.ids[:position], token_id]
        for number, other in enumerate([branch, *self.branches]):
            if other.ids[: position + 1] == beginning:
                return self.choose(number - 1) if number else branch
        if position == len(branch.ids):
            branch.add(token_id, score)
            return branch
        given = min(branch.given, position)
        self.branches.append(Branch(beginning, [*branch.scores[:position], score], given, self.current, position))
        return self.choose(len(self.branches) - 1)
