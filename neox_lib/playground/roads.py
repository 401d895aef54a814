"""The text as a tree: where another token was taken, a road forks off, and all roads stay."""

from dataclasses import dataclass, field

Score = float | None  # a token's log-probability, None for a token of the prompt


@dataclass
class Road:
    """One text from its first token to its last: ids, and the log-probability of each that the model gave.

    The first `given` tokens are the prompt's. `parent` is the number of the road that it left, at position `fork`.
    """

    ids: list[int]
    scores: list[Score]
    given: int
    parent: int | None = None
    fork: int = 0

    def add(self, token_id: int, score: Score) -> None:
        self.scores.append(score)  # first, so that whoever reads meanwhile finds a score for every id
        self.ids.append(token_id)


@dataclass
class Roads:
    """All roads from one prompt, in the order in which they were taken; `current` is the number of the one in hand."""

    roads: list[Road] = field(default_factory=list)
    current: int = 0

    def __len__(self) -> int:
        return len(self.roads)

    @property
    def road(self) -> Road:
        """The road in hand. Raises IndexError before there is one."""
        return self.roads[self.current]

    def start(self, ids: list[int]) -> Road:
        """Forget all roads and begin with a prompt's tokens."""
        self.roads, self.current = [Road(list(ids), [None] * len(ids), len(ids))], 0
        return self.road

    def clear(self) -> None:
        self.roads, self.current = [], 0

    def choose(self, number: int) -> Road:
        """Take another road in hand. Raises ValueError for a number that no road has."""
        if type(number) is not int or not 0 <= number < len(self.roads):
            raise ValueError(f"there is no road {number!r}: they run from 0 to {len(self.roads) - 1}")
        self.current = number
        return self.road

    def take(self, position: int, token_id: int, score: float) -> Road:
        """Take `token_id` at `position` of the road in hand, where it had another token, or after its end.

        A road that begins so already is taken in hand; else a new one forks off there. At the very end the road in
        hand goes on. Raises ValueError for a position that it does not have.
        """
        road = self.road
        if not 0 <= position <= len(road.ids):
            raise ValueError(f"position {position} is not on this road, which has {len(road.ids)} tokens")
        beginning = [*road.ids[:position], token_id]
        for number, other in enumerate([road, *self.roads]):
            if other.ids[: position + 1] == beginning:
                return self.choose(number - 1) if number else road
        if position == len(road.ids):
            road.add(token_id, score)
            return road
        given = min(road.given, position)
        self.roads.append(Road(beginning, [*road.scores[:position], score], given, self.current, position))
        return self.choose(len(self.roads) - 1)
