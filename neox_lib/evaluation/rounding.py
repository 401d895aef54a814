"""What rounding costs: the logits, the perplexity and the text of a quantized model beside those of the exact one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_lib.evaluation.likelihood import windows
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.sampling import check_scores


@dataclass(frozen=True)
class RoundingCost:
    """Errors are in the logits' own unit; `logit_spread` is the exact logits' standard deviation, to compare with."""

    mean_error: float
    worst_error: float
    logit_spread: float
    exact_perplexity: float
    rounded_perplexity: float
    same_choice: float  # share of positions at which both models hold the same token for the likeliest

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.01 is 1 % worse."""
        return self.rounded_perplexity / self.exact_perplexity - 1


@torch.inference_mode()
def rounding_cost(exact: NeoXModel, rounded: NeoXModel, stream: Tensor, length: int = 256) -> RoundingCost:
    """Compare two models of one shape at every position of a token stream `[N]`, read in windows of `length`.

    Padded vocabulary rows stand for no token and are left out. Raises ValueError for a stream of fewer than two tokens,
    and for scores that are no numbers.
    """
    if len(stream) < 2:
        raise ValueError(f"the stream must hold at least 2 tokens, got {len(stream)}")
    total = worst = squares = plain = 0.0
    nats, same, count, vocab = [0.0, 0.0], 0, 0, exact.config.tokenizer_vocab_size
    for window in windows(stream, length):
        a, b = (model(window[:, :-1])[0, :, :vocab].float() for model in (exact, rounded))
        error = (a - b).abs()
        total, worst = total + error.sum().item(), max(worst, error.max().item())
        plain, squares = plain + a.sum().item(), squares + a.double().square().sum().item()
        same, count = same + int((a.argmax(-1) == b.argmax(-1)).sum()), count + len(a)
        for side, logits in enumerate((a, b)):
            found = logits.log_softmax(-1).gather(-1, window[0, 1:, None].long())
            check_scores(-found.T)
            nats[side] -= found.sum().item()
    numbers = count * vocab
    spread = math.sqrt(max(0.0, squares / numbers - (plain / numbers) ** 2))
    perplexities = (math.exp(each / count) for each in nats)
    return RoundingCost(total / numbers, worst, spread, *perplexities, same_choice=same / count)


def same_greedy_tokens(exact: NeoXModel, rounded: NeoXModel, input_ids: Tensor, new_tokens: int) -> int:
    """How many greedy tokens both models write alike from a prompt `[1, T]` before they part; `new_tokens` if never."""
    streams = (stream_generate(model, input_ids, new_tokens, stop_token_ids=()) for model in (exact, rounded))
    for number, (a, b) in enumerate(zip(*streams, strict=True)):
        if a.token_id != b.token_id:
            return number
    return new_tokens
