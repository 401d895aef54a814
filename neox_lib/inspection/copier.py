"""A model of two layers that has learned one thing, to repeat: its weights, and how they were made.

    python -m neox_lib.inspection.copier copier.safetensors

trains it anew, in less than a minute on one core. It is small enough to have nothing but the heads that notebook 11
looks for, and shows when they appear.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from neox_lib.checkpoints.atomic import write_bytes_atomically
from neox_lib.config import NeoXConfig
from neox_lib.inspection.attention import model_attention_weights
from neox_lib.inspection.heads import induction_scores, previous_token_scores, token_losses
from neox_lib.model import NeoXModel
from neox_lib.training.loop import initialize

WEIGHTS = Path(__file__).parents[1] / "assets" / "copier.safetensors"
CONFIG = NeoXConfig(
    vocab_size=128,
    tokenizer_vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=128,
    rotary_pct=1.0,  # of heads of 16, where a quarter would leave two pairs to tell neighbours by
    eos_token_ids=(),
)
STEPS, ROWS, LENGTH = 1500, 32, 48
PERIODS = (6, 24)  # the shortest and the longest; a fixed one would teach to look a fixed way back


def repeated_ids(vocab_size: int, rows: int, period: int, length: int, generator: torch.Generator) -> Tensor:
    """Random tokens that begin anew after each `period`: `[rows, length]`."""
    once = torch.randint(vocab_size, (rows, period), generator=generator)
    return once.repeat(1, length // period + 1)[:, :length]


def progress_of(model: NeoXModel, period: int = 24) -> dict[str, float]:
    """Loss in nats per token where the text is new and where it repeats, and each kind's best head."""
    ids = repeated_ids(CONFIG.vocab_size, 16, period, 2 * period, torch.Generator().manual_seed(1))
    losses = token_losses(model, ids).mean(dim=0)
    with torch.inference_mode():
        weights = model_attention_weights(model, ids)
    kinds = {"previous": previous_token_scores(weights), "induction": induction_scores(weights, period)}
    best = {name: scores.mean(dim=1).max().item() for name, scores in kinds.items()}
    return {"new": losses[: period - 1].mean().item(), "repeated": losses[period:].mean().item()} | best


def train_copier(steps: int = STEPS, seed: int = 0) -> tuple[NeoXModel, list[dict[str, float]]]:
    """The trained model, fp32 on the CPU, and what `progress_of` said of it every 50 steps, from step 0 on."""
    generator, model = torch.Generator().manual_seed(seed), NeoXModel(CONFIG)
    initialize(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    history = []
    for step in tqdm(range(steps + 1)):
        if step % 50 == 0:
            history.append({"step": step} | {name: round(value, 3) for name, value in progress_of(model).items()})
        period = int(torch.randint(PERIODS[0], PERIODS[1] + 1, (1,), generator=generator))
        ids = repeated_ids(CONFIG.vocab_size, ROWS, period, LENGTH + 1, generator)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100, (steps + 1 - step) / 300)
        optimizer.step()
    return model.eval(), history


def load_copier(path: Path = WEIGHTS) -> tuple[NeoXModel, list[dict[str, float]]]:
    """The model from a file, fp32 on the CPU, and the history of its training."""
    model = NeoXModel(CONFIG)
    with safe_open(str(path), framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        history = json.loads(file.metadata()["history"])
    return model.eval().requires_grad_(False), history


def save_copier(path: Path, model: NeoXModel, history: list[dict[str, float]]) -> None:
    """Write the weights in fp16, and the history beside them."""
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    write_bytes_atomically(path, save(tensors, {"history": json.dumps(history)}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected the file to write: python -m neox_lib.inspection.copier copier.safetensors")
    torch.set_num_threads(1)
    save_copier(Path(sys.argv[1]), *train_copier())
