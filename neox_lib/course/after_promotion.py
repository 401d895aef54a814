"""Right after promotion: do the library's pieces pass the exercises' checks, and does the model still write?"""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace

from neox_lib.course.promote import LIBRARY

# A definition of the library -> the check of the exercise that asks for it, in `course.exercises`. Two classes hold
# what an exercise asks for as a function: FUNCTIONS makes it of them.
CHECKS = {
    "tokenizer.apply_merges": "tokenizer.apply_merges",
    "rotary.rotary_angles": "rotary.rotary_angles",
    "rotary.rotate_half": "rotary.rotate_half",
    "rotary.apply_rotary": "rotary.apply_rotary",
    "attention.causal_mask": "attention.causal_mask",
    "attention.split_heads": "attention.split_heads",
    "attention.fused_attention": "attention.attention",
    "attention.explicit_attention": "attention.attention",
    "attention.Attention": "attention.multi_head",
    "block.MLP": "parallel_residual.gelu",
    "block.Block": "parallel_residual.parallel_block",
    "checkpoints.slim.partition.merge_shards": "checkpoint_loading.merge_shards",
    "cache.KVCache": "cached_generation.cache",
    "training.loop.next_token_loss": "train_it.next_token_loss",
    "training.loop.learning_rate_at": "train_it.learning_rate",
    "playground.streaming.follow": "prompt_playground.follow",
    "quantization.int8.quantize_rows": "small_machine.quantize_rows",
    "quantization.int4.dequantize_groups": "small_machine.dequantize_groups",
    "evaluation.likelihood.token_log_probabilities": "how_good_is_it.token_log_probabilities",
    "evaluation.likelihood.pair_ids": "how_good_is_it.pair_ids",
    "evaluation.likelihood.windows": "how_good_is_it.windows",
    "evaluation.likelihood.standard_error": "how_good_is_it.standard_error",
    "inspection.lens.logit_lens": "look_inside.logit_lens",
    "inspection.lens.attribute": "look_inside.attribute",
    "inspection.lens.split_dense": "look_inside.split_dense",
    "inspection.patching.patch": "look_inside.patch",
}


def curve_of(mlp_class: type) -> Callable:
    """The curve with which an MLP bends: one of width 1 whose matrices multiply by 1."""
    mlp = mlp_class(SimpleNamespace(hidden_size=1, intermediate_size=1, hidden_act="gelu_fast")).requires_grad_(False)
    for name, parameter in mlp.named_parameters():
        parameter.fill_(name.endswith("weight"))
    return lambda x: mlp.to(x.dtype)(x[..., None])[..., 0]


def heads_of(attention_class: type) -> Callable:
    """Attention from three matrices and a dense one, as notebook 03 has it: no biases, and no turn by position."""
    import torch

    def run(x, w_query, w_key, w_value, w_dense, num_heads):
        tokens, width = x.shape
        config = SimpleNamespace(hidden_size=width, num_attention_heads=num_heads, attention_bias=False)
        layer = attention_class(config, 0).requires_grad_(False)
        by_head = torch.stack([each.T.reshape(num_heads, -1, width) for each in (w_query, w_key, w_value)], dim=1)
        layer.query_key_value.weight.copy_(by_head.reshape(3 * width, width))
        layer.dense.weight.copy_(w_dense.T)
        cos, sin = torch.ones(tokens, 0), torch.zeros(tokens, 0)
        return layer(x[None], cos, sin)[0]

    return run


FUNCTIONS = {"block.MLP": curve_of, "attention.Attention": heads_of}


def failures(modules: Iterable[str]) -> list[str]:
    """What fails in these modules of the library, as this process holds them: a message for the first piece of each
    that does not pass its exercise's check (others may fail because of it), and one if the shipped model can't write a
    story any more.
    """
    from neox_lib.course.checks import story

    wanted, found = set(modules), []  # a module that has failed is not wanted any more
    for piece, check in CHECKS.items():
        module, _, name = piece.rpartition(".")
        if module in wanted:
            exercise, _, function = check.rpartition(".")
            judge = getattr(importlib.import_module(f"neox_lib.course.exercises.{exercise}"), function)
            mine = getattr(importlib.import_module(f"neox_lib.{module}"), name)
            result = judge(FUNCTIONS[piece](mine) if piece in FUNCTIONS else mine)
            if not result.passed:
                wanted.remove(module)
                found.append(f"{name}, as you promoted it, fails the check of its exercise. {result.message}")
    try:
        story(tokens=4)
    except Exception as error:  # whatever the learner's piece raises
        found.append(f"The shipped model can't write with what you promoted: {type(error).__name__}: {error}")
    return found


def failures_in_a_fresh_process(modules: Iterable[str]) -> str:
    """The same of the library as it is on disk now; empty if nothing fails."""
    code = "import sys\nfrom neox_lib.course.after_promotion import failures\nprint('\\n'.join(failures(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=LIBRARY.parent, capture_output=True, text=True)
    last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout.strip() if done.returncode == 0 else f"The checks can't run with what you promoted: {last_line}"
