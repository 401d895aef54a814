"""The exercises of notebook 10: the loss, the learning rate, AdamW, and how long a training takes."""

import functools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.config import NeoXConfig, neox_20b
from neox_lib.course.checks import describe, exercise, given, numbers, require, require_equal
from neox_lib.course.figures.plots import seeded
from neox_lib.evaluation.corpus import stories_of, story_stream
from neox_lib.generation import prompt_ids, stream_generate
from neox_lib.loading import create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.sampling import Sampling
from neox_lib.training.loop import initialize, learning_rate_at, make_optimizer, training_steps
from neox_lib.training.plan import TrainingPlan

PROMPT = "Tim and his mom went to the park"  # no other notebook's
SMALL = NeoXConfig(
    vocab_size=2048,
    tokenizer_vocab_size=2048,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=256,
)
PLAN = TrainingPlan(
    total_tokens=40 * 512, batch_tokens=512, windows=((0.0, (64,)),), learning_rate=1e-2, warmup_steps=5, mix_share=0.0
)
BETAS = (0.9, 0.95)
EPSILON = 1e-8
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float], tuple[Tensor, Tensor, Tensor]]


def stream_of_stories(stories: int = 120) -> Tensor:
    """The first stories of `assets/stories.txt` as one row of the shipped tokenizer's ids."""
    text = (SHIPPED_MODEL.parent / "stories.txt").read_text("utf-8")
    return story_stream(create_tokenizer(), stories_of(text)[:stories])


def sample_of(model: NeoXModel, prompt: str = PROMPT, tokens: int = 40) -> str:
    """What a small model writes after a prompt, drawn at temperature 0.5 with a fixed seed."""
    tokenizer = create_tokenizer()
    steps = stream_generate(
        model.eval(), prompt_ids(tokenizer, prompt), tokens, tokenizer=tokenizer, sampling=Sampling(0.5)
    )
    return prompt + "".join(step.text for step in steps)


@exercise("train_it.next_token_loss")
def next_token_loss(yours: Callable[[Tensor, Tensor], Tensor]) -> str:
    """`yours(logits, windows)` is the mean cross-entropy of the next tokens: `[B, T, V]`, `[B, T + 1]` -> `[]`."""
    what, right = "my_next_token_loss(zeros [1, 4, 5], [[2, 0, 1, 4, 3]])", math.log(5)
    with given(what):
        found = yours(torch.zeros(1, 4, 5), torch.tensor([[2, 0, 1, 4, 3]]))
    require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
    shape = list(found.shape)
    require(shape == [], f"{what} should be one number, but has shape {shape}: take the mean over all positions")
    for wrong, why in (
        (4 * right, "this is the sum over the positions: take their mean"),
        (-right, "the logarithm of a probability is negative, and a price is not: change the sign"),
        (0.0, "these are the scores: softmax makes probabilities of them"),
        (math.log2(5), "this is in bits: use the natural logarithm"),
    ):
        told = f"{what} should be {right:.4f}, but is {found.item():.4f}: {why}"
        require(abs(found.item() - wrong) > 1e-4, told)
    require_equal(found.double(), torch.tensor(right).double(), what, 1e-4, "five equal scores cost ln 5 each")
    logits, windows = 3 * seeded(3, 6, 7), torch.randint(7, (3, 7), generator=torch.Generator().manual_seed(1))
    what, handed = "my_next_token_loss of random logits [3, 6, 7] and windows [3, 7]", (logits.clone(), windows.clone())
    with given(what):
        found = yours(*handed)
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    for wrong, why in (
        (windows[:, :-1], "each position is judged by the token that it has read: its target is the one after it"),
        (windows[:, :-1].roll(1, 1), "the targets are shifted the wrong way round: they should lie ahead"),
    ):
        off = abs(found.item() - F.cross_entropy(logits.flatten(0, 1), wrong.flatten()).item())
        require(off > 1e-4, f"{what} should be {expected.item():.4f}, but is {found.item():.4f}: {why}")
    require_equal(found, expected, what, 1e-4)
    unchanged = torch.equal(logits, handed[0]) and torch.equal(windows, handed[1])
    require(unchanged, f"{what} changes what it was given: work on a copy")
    what = "my_next_token_loss of the scores 1000 and 0, where the token with 0 came,"
    with given(what):
        found = yours(torch.tensor([[[1000.0, 0.0]]]), torch.tensor([[0, 1]]))
    advice = "a probability of 0 has no logarithm; log_softmax and cross_entropy take care of that"
    require(bool(torch.isfinite(found).all()), f"{what} should be 1000, but is {found.item()}: {advice}")
    what = "my_next_token_loss of random logits, backward"
    logits.requires_grad_()
    with given(what):
        found = yours(logits, windows)
        require(found.requires_grad, f"{what}: the loss has no gradient; compute it with torch, without detach")
        found.backward()
    return "Even with scores of 1000 it stays a number, and a gradient comes back to every score."


@exercise("train_it.learning_rate")
def learning_rate(yours: Callable[[int, int, int, float], float]) -> str:
    """`yours(step, steps, warmup_steps, highest)` is the learning rate of step 0, 1, .. steps - 1."""
    cases = [
        (0, 100, 10, 1.0, "the first step takes one part in ten: (step + 1) / warmup_steps"),
        (4, 100, 10, 1.0, "half of the warm-up is done after five steps"),
        (9, 100, 10, 1.0, "the warm-up ends at the highest rate"),
        (
            10,
            100,
            10,
            1.0,
            "the cosine begins at the highest rate: count its progress from the end of the warm-up",
        ),
        (55, 100, 10, 1.0, "half of the way from step 10 to step 100 the cosine is at a half"),
        (99, 100, 10, 1.0, "at the last step the rate is nearly 0"),
        (30, 40, 5, 1e-2, "the rate is a share of `highest`"),
        (0, 8, 0, 1.0, "without a warm-up the first step takes the highest rate"),
    ]
    for step, steps, warmup, highest, why in cases:
        what = f"my_learning_rate_at({step}, steps={steps}, warmup_steps={warmup}, highest={highest})"
        expected = learning_rate_at(step, steps, warmup, highest)
        with given(what):
            found = yours(step, steps, warmup, highest)
        require(isinstance(found, int | float), f"{what} should be a number, but is {describe(found)}")
        told = f"{what} should be {expected:.4g}, but is {found:.4g}: {why}"
        require(abs(found - expected) <= 1e-6 * highest, told)
    return "A slow start, the highest rate after the warm-up, and a soft end."


class StepByStep:
    """An optimizer that leaves each weight's step to a function such as a learner's `adamw_step`.

    Matrices decay, norms and biases don't, as in the library's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], step_of: Step, decay: float):
        self.parameters = list(parameters)
        self.step_of, self.decay, self.steps = step_of, decay, 0
        self.kept = [(torch.zeros_like(each), torch.zeros_like(each)) for each in self.parameters]
        self.param_groups: list[dict] = [{}]  # where the loop writes the learning rate

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        rate = self.param_groups[0]["lr"]
        for index, weight in enumerate(self.parameters):
            assert weight.grad is not None
            decay = self.decay if weight.dim() == 2 else 0.0
            mean, square = self.kept[index]
            new, mean, square = self.step_of(weight, weight.grad, mean, square, self.steps, rate, decay)
            self.kept[index] = mean, square
            weight.copy_(new)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.parameters:
            weight.grad = None


def adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, rate: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (Loshchilov & Hutter 2019): -> the new weight, mean and square."""
    mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
    square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
    unbiased = mean / (1 - BETAS[0] ** step), square / (1 - BETAS[1] ** step)
    return weight - rate * decay * weight - rate * unbiased[0] / (unbiased[1].sqrt() + EPSILON), mean, square


def wrong_weights(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, rate: float, decay: float
) -> dict[str, Tensor]:
    """What comes out if one part of the step is done in each of the usual wrong ways: what is wrong -> the weight."""
    _, mean, square = adamw(weight, gradient, mean, square, step, rate, decay)
    up, down = mean / (1 - BETAS[0] ** step), (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON
    shrunk = weight - rate * decay * weight
    return {
        "it moves uphill: the step is subtracted": shrunk + rate * up / down,
        "neither average is corrected: divide by 1 - 0.9 ** step and 1 - 0.95 ** step": shrunk
        - rate * mean / (square.sqrt() + EPSILON),
        "the square's average is not corrected: divide it by 1 - 0.95 ** step": shrunk
        - rate * up / (square.sqrt() + EPSILON),
        "the gradient's average is not corrected: divide it by 1 - 0.9 ** step": shrunk - rate * mean / down,
        "the root of the square is missing": shrunk - rate * up / (square / (1 - BETAS[1] ** step) + EPSILON),
        "the weight does not decay: it also loses rate * decay * weight": weight - rate * up / down,
        "the weight decays by decay * weight: the rate belongs there too": weight - decay * weight - rate * up / down,
        "the step is the gradient's own: use the average of the gradients": shrunk - rate * gradient / down,
        "the step is that of SGD: it is not divided by the root of the square": shrunk - rate * up,
    }


@exercise("train_it.adamw_step")
def adamw_step(yours: Step) -> str:
    """`yours(weight, gradient, mean, square, step, rate, decay)` -> the new (weight, mean, square)."""
    weight, mean, square = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3), torch.zeros(3)
    history = [torch.tensor(row) for row in ([100.0, 0.01, -1.0], [50.0, 0.02, 2.0], [-100.0, 0.01, 1.0])]
    for step, gradient in enumerate(history, 1):
        handed = weight.clone(), gradient.clone(), mean.clone(), square.clone()
        what = f"my_adamw_step(weight {numbers(weight)}, gradient {numbers(gradient)}, ..., step={step}, rate=0.1, "
        what += "decay=0.5)"
        with given(what):
            found = yours(*handed, step, 0.1, 0.5)
        three = isinstance(found, tuple | list) and len(found) == 3
        require(three, f"{what} should be three tensors, weight, mean and square, but is {describe(found)}")
        for name, now, then in zip(
            ("weight", "gradient", "mean", "square"), handed, (weight, gradient, mean, square), strict=True
        ):
            require(torch.equal(now, then), f"{what} changes the {name} that it was given: return new tensors")
        expected = adamw(weight, gradient, mean, square, step, 0.1, 0.5)
        require_equal(
            found[1], expected[1], f"the mean from {what}", 1e-4, "0.9 of the old one and 0.1 of the gradient"
        )
        why = "0.95 of the old one and 0.05 of the gradient's square"
        require_equal(found[2], expected[2], f"the square from {what}", 1e-4, why)
        if isinstance(found[0], Tensor) and found[0].shape == expected[0].shape:
            for why, wrong in wrong_weights(weight, gradient, mean, square, step, 0.1, 0.5).items():
                same = (found[0] - wrong).abs().max().item() < 1e-5
                right = (wrong - expected[0]).abs().max().item() < 1e-5
                told = f"the weight from {what} should be {numbers(expected[0])}, but is {numbers(found[0])}: {why}"
                require(not same or right, told)
        require_equal(found[0], expected[0], f"the weight from {what}", 1e-5)
        weight, mean, square = expected
    what = "my_adamw_step with a gradient of zeros, at step 1,"
    with given(what):
        found = yours(torch.ones(2), torch.zeros(2), torch.zeros(2), torch.zeros(2), 1, 0.1, 0.0)
    finite = bool(found[0].isfinite().all())
    require(finite, f"{what} gives {numbers(found[0])}, a division by 0: add 1e-8 to the root")
    return trained_with(yours)


def losses_with(optimizer_of: Callable[[NeoXModel], object]) -> tuple[NeoXModel, list[float]]:
    """The small model after 40 steps with an optimizer, and the losses on the way."""
    model, stream = NeoXModel(SMALL), stream_of_stories()
    initialize(model, PLAN.seed)
    optimizer = optimizer_of(model)
    return model, [loss for _, loss in training_steps(model, optimizer, PLAN, stream, stream[:0])]  # type: ignore[arg-type]


@functools.cache
def losses_with_pytorch() -> list[float]:
    return losses_with(lambda model: make_optimizer(model, PLAN))[1]


def trained_with(step_of: Step) -> str:
    """Train the small model with a learner's step, compare with PyTorch's, and let the model write."""
    expected = losses_with_pytorch()
    with given("40 steps of training with my_adamw_step"):
        model, losses = losses_with(lambda model: StepByStep(model.parameters(), step_of, PLAN.weight_decay))
    off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    told = "40 steps of training with my_adamw_step should have the losses of PyTorch's AdamW"
    require(off < 0.02, f"{told}, but they differ by up to {off:.2g} nats per token")
    fell = f"the loss fell from {losses[0]:.2f} to {losses[-1]:.2f} in 40 steps"
    return f"With your AdamW {fell}, as with PyTorch's. The model that it trained writes:\n{sample_of(model)}"


@exercise("train_it.training_days")
def training_days(yours: Callable[[int, float, int, float], float]) -> str:
    """`yours(parameters, tokens, devices, speed)`: days for 6 operations per parameter and token on some devices."""
    cases = [
        (1_000_000, 86_400, 1, 6e6, "6 operations per parameter and token, and 86,400 seconds a day"),
        (1_000_000, 86_400, 4, 6e6, "four devices take a quarter of the time"),
        (neox_20b().parameter_count(), 4.72e11, 96, 1e14, "6 x parameters x tokens / (devices x speed) / 86,400"),
    ]
    for parameters, tokens, devices, speed, why in cases:
        what = (
            f"my_training_days(parameters={parameters:,}, tokens={tokens:,.0f}, devices={devices}, speed={speed:.3g})"
        )
        expected = 6 * parameters * tokens / (devices * speed) / 86_400
        with given(what):
            found = yours(parameters, tokens, devices, speed)
        require(isinstance(found, int | float), f"{what} should be a number, but is {describe(found)}")
        for factor, reason in {
            1 / 3: "these are the 2 operations of a forward pass; backward takes twice as many again",
            2 / 3: "these are the operations of backward alone: forward takes 2 more",
            24.0: "these are hours",
            86_400.0: "these are seconds",
            1440.0: "these are minutes",
            float(devices): "the devices share the work",
            float(devices) ** 2: "more devices take less time, not more",
        }.items():
            off = abs(found - factor * expected) / (factor * expected)
            told = f"{what} should be {expected:.4g}, but is {found:.4g}: {reason}"
            require(factor == 1.0 or off > 1e-6, told)
        require(abs(found - expected) <= 1e-6 * expected, f"{what} should be {expected:.4g}, but is {found:.4g}: {why}")
    return "Parameters times tokens: twice the model on twice the text costs four times as much."
