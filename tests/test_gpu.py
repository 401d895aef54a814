"""On a GPU the model says what it says on a CPU in fp32. Loading, int8 and ranks are tested in their own files."""

from dataclasses import replace

import pytest
import torch

from neox_lib import create_model, create_tokenizer, greedy_generate, greedy_generate_text
from neox_lib.bench.on_device import copy_bandwidth, model_on, run_on
from neox_lib.cache import KVCache
from neox_lib.config import tiny
from neox_lib.playground import Playground
from neox_lib.tokenizer import encode_text
from tests.small_models import BASE, family

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("rules", family(BASE))
@torch.inference_mode()
def test_scores_are_those_of_the_cpu(gpu, random_model, token_ids, rules):
    """TF32 or a kernel with another GELU would move them by a thousandth."""
    config = family(BASE)[rules]
    model, ids = random_model(config), token_ids(config, 2, 40)
    expected = model(ids)
    found = model.to(gpu)(ids.to(gpu))
    assert found.device.type == gpu.type
    assert (found.cpu() - expected).abs().max() <= 1e-4


@torch.inference_mode()
def test_fp16_stays_within_its_rounding_up_to_the_last_position(gpu, random_model, token_ids):
    """Angles computed in fp16 would be off by a third of a radian there. Bound: as in test_model_parity.py."""
    config = replace(BASE, max_position_embeddings=2048)
    model, ids = random_model(config).half(), token_ids(config, 1, 2048)
    expected = model.float()(ids, last_only=True)  # the same fp16 weights, exact arithmetic
    model, ids = model.half().to(gpu), ids.to(gpu)
    cache = KVCache(config, 1, 2048, gpu, torch.float16)
    model(ids[:, :2047], cache, last_only=True)
    found = model(ids[:, 2047:], cache)
    bound = 2 * (8 * config.num_hidden_layers + 3) ** 0.5 / 2**11 * expected.abs().max()
    assert found.dtype == torch.float16 and (found.float().cpu() - expected).abs().max() <= bound


@torch.inference_mode()
def test_a_cache_on_the_device_changes_no_score(gpu, random_model, token_ids):
    model, ids = random_model(BASE).to(gpu), token_ids(BASE, 2, 20).to(gpu)
    cache = KVCache(BASE, 2, 20, gpu, torch.float32)
    in_passes = [model(chunk, cache) for chunk in ids.split([7, 1, 1, 11], dim=1)]
    assert cache.keys.device.type == cache.values.device.type == gpu.type
    assert (torch.cat(in_passes, dim=1) - model(ids)).abs().max() <= 1e-4


def test_prompts_of_unequal_length_are_written_as_each_alone_on_a_cpu(gpu, random_model):
    """A mask or a position on the wrong device would end in an error, one of the wrong row in another text."""
    model, prompts = random_model(BASE), [[5, 9, 2, 11, 7], [3], [8, 8, 1]]
    alone = [greedy_generate(model, [prompt], 24)[0] for prompt in prompts]
    assert greedy_generate(model.to(gpu), prompts, 24) == alone


def test_the_playground_writes_what_the_library_writes_on_a_cpu(gpu):
    """Its worker is another thread, and its looks read scores and attention back from the device."""
    prompt, tokenizer = "Once upon a time, a fox", create_tokenizer()
    play = Playground(create_model(device=gpu, dtype="float32"), tokenizer, tokens=12)
    for message in (
        {"do": "watch", "view": "attention"},
        {"do": "generate", "prompt": prompt},
        {"do": "look", "position": 3},
    ):
        play.act(message)
        assert play.session.worker.join(60)
    on_cpu = create_model(device="cpu", dtype="float32")
    assert play.written == greedy_generate_text(on_cpu, tokenizer, prompt, len(encode_text(tokenizer, prompt)) + 12)
    assert play.state.error == "" and play.state.candidates and play.state.attention is not None


def test_the_bench_makes_its_weights_on_the_device_and_measures_both_sides(gpu):
    pytest.importorskip("transformers")
    assert {parameter.device.type for parameter in model_on(gpu, tiny()).parameters()} == {gpu.type}
    assert copy_bandwidth(gpu, 1) > 0
    (row,) = run_on(gpu, "tiny", [4], new_tokens=2, rounds=1, against=["transformers"])
    assert row.ours and row.theirs
