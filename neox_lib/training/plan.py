"""What to train on, and how fast to learn: the settings of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingPlan:
    """What to train on and how fast to learn.

    `windows` holds (share of the steps done, window lengths): from that share on, the steps take these lengths in turn.
    Short windows are cheap; without some long ones the model would fail at the end of its context. A corpus that is
    read many times is memorized; `dropout` and a larger `weight_decay` counter that.

    `dtype` is what matrix products compute in; the weights stay in fp32.

    Raises ValueError, naming the setting, for one out of range.
    """

    total_tokens: int = 20_000_000
    batch_tokens: int = 8192
    mix_share: float = 0.25
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.0
    warmup_steps: int = 200
    dtype: str = "float32"
    windows: tuple[tuple[float, tuple[int, ...]], ...] = ((0.0, (256, 256, 256, 2048)),)
    seed: int = 0

    def __post_init__(self):
        first, lengths = min(share for share, _ in self.windows), [each for _, row in self.windows for each in row]
        if not first <= 0 or min(lengths) < 1:
            raise ValueError(
                f"windows are {self.windows}; expected lengths above 0, the first of them from a share of 0 on"
            )
        if self.batch_tokens < self.longest_window:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}; expected the longest window's {self.longest_window} at least"
            )
        if self.total_tokens < self.batch_tokens:
            raise ValueError(
                f"total_tokens is {self.total_tokens}; expected the {self.batch_tokens} of one step at least"
            )
        for name in ("mix_share", "dropout"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {share}; expected a share from 0 to 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; expected float32 or bfloat16")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected 0 or more")

    @property
    def longest_window(self) -> int:
        return max(length for _, lengths in self.windows for length in lengths)

    @property
    def steps(self) -> int:
        return self.total_tokens // self.batch_tokens

    def window_length(self, step: int) -> int:
        lengths = [lengths for share, lengths in self.windows if step >= share * self.steps][-1]
        return lengths[step % len(lengths)]
