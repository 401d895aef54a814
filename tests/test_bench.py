"""The bench compares like with like; a reader would otherwise trust a ratio that means nothing. No speed asserted."""

import math
import sys

import pytest
import torch

from neox_lib.__main__ import main
from neox_lib.bench import measure as bench
from neox_lib.bench import on_device
from neox_lib.bench.baselines import (
    ctranslate2_generate,
    ctranslate2_logits,
    ctranslate2_twin,
    hugging_face_generate,
    hugging_face_twin,
)
from neox_lib.bench.candidates import our_generate, our_model, random_model
from neox_lib.bench.measure import bytes_per_token, run_bench, time_answer, time_load
from neox_lib.bench.table import LoadRow, Row, Timing, format_best, format_load, format_positions, format_row, ratio
from neox_lib.config import NeoXConfig
from neox_lib.quantization.linear import CastLinear

SMALL = NeoXConfig(
    vocab_size=320,
    tokenizer_vocab_size=320,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=64,
)


@pytest.fixture
def small_shapes(monkeypatch):
    """Every shape is a small one: the bench's way is under test, not the machine."""
    monkeypatch.setattr(bench, "preset", lambda shape: SMALL)


def without_baselines(monkeypatch):
    for library in ("transformers", "ctranslate2", "xllamacpp", "ik_llama_cpp"):
        monkeypatch.setitem(sys.modules, library, None)


def test_decode_is_the_difference_of_a_long_and_a_short_generation():
    """Dividing the whole answer by its tokens would count the prefill as decoding."""
    assert Timing(first=2.0, whole=10.0, new_tokens=65).per_token == 0.125


def test_a_ratio_compares_each_round_in_itself():
    """On a machine that slows down half-way, medians of each side alone could come from different halves."""
    slow = [Timing(2.0, 4.0, 2), Timing(20.0, 40.0, 2), Timing(30.0, 60.0, 2)]
    fast = [Timing(1.0, 2.0, 2), Timing(10.0, 20.0, 2), Timing(10.0, 20.0, 2)]
    assert ratio(slow, fast, "first") == 2.0


def test_a_round_beside_other_work_is_measured_again(monkeypatch):
    """What runs beside the bench slows one side down, not the other; the quietest try counts, and its share is told."""
    shares, answers = [0.5, 0.2, 0.4, 0.04, 0.3], iter(range(1, 100))
    spent = iter(time for share in shares for time in ((0.0, 0.0), (share, 1.0)))
    monkeypatch.setattr(bench, "times_of_others", lambda: next(spent))
    monkeypatch.setattr(bench, "time_answer", lambda *_: next(answers))
    assert bench.measure_round({("", "int8"): list}, torch.zeros(1, 1), 2) == ({("", "int8"): 4}, 0.04)
    assert next(spent, None) == (0.0, 0.0), "a quiet round was measured again"
    shares[:] = [0.5, 0.2, 0.4, 0.6, 0.3]
    spent = iter(time for share in shares for time in ((0.0, 0.0), (share, 1.0)))
    assert bench.measure_round({("", "int8"): list}, torch.zeros(1, 1), 2) == ({("", "int8"): 6}, 0.2)


@pytest.mark.parametrize("tied", [False, True])
def test_both_sides_write_the_same_tokens_from_the_same_weights(tied):
    """If the weights differed, so might the work."""
    pytest.importorskip("transformers")
    config = NeoXConfig(**{**SMALL.__dict__, "tie_word_embeddings": tied})
    model = random_model(config)
    ids = torch.arange(10)[None]
    ours = our_generate(our_model(model, "float32"))(ids, 20)
    assert hugging_face_generate(hugging_face_twin(model, torch.float32))(ids, 20) == ours


def test_hugging_face_is_not_held_back():
    """A comparison with eager attention or a wrong dtype would flatter us."""
    pytest.importorskip("transformers")
    twin = hugging_face_twin(random_model(SMALL), torch.float16)
    assert twin.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float16}
    assert not twin.training and not any(parameter.requires_grad for parameter in twin.parameters())


def test_hugging_face_writes_on_past_its_end_token():
    """A side that stops early would look fast. The output matrix here makes every next token the end token, 0."""
    pytest.importorskip("transformers")
    model = random_model(SMALL)
    model.final_linear.weight.zero_()
    assert hugging_face_generate(hugging_face_twin(model, torch.float32))(torch.arange(5)[None], 12) == [0] * 12


def test_ctranslate2_computes_the_same_from_the_same_weights():
    """Interleaved heads cut wrongly, or the other GELU, would make its work and its error meaningless."""
    pytest.importorskip("ctranslate2")
    for activation in ("gelu", "gelu_fast"):
        model = random_model(NeoXConfig(**{**SMALL.__dict__, "hidden_act": activation}))
        for parameter in model.parameters():
            parameter.mul_(5)  # of standard deviation 0.1: the two forms of GELU differ in the result
        ids = torch.arange(10)[None]
        twin = ctranslate2_twin(model, "float32")
        assert (ctranslate2_logits(twin, ids) - model(ids)[0]).abs().max() < 1e-4 * model(ids).std()
        assert len(ctranslate2_generate(twin)(ids, 20)) == 20


def test_int8_moves_our_logits_less_than_ctranslate2s():
    """It rounds the activations too, which is where its speed at prefill comes from."""
    pytest.importorskip("ctranslate2")
    model, ids = random_model(SMALL), torch.arange(40)[None]
    exact = model(ids)[0]
    ours, theirs = our_model(model, "int8")(ids)[0], ctranslate2_logits(ctranslate2_twin(model, "int8"), ids)
    assert 0 < (ours - exact).abs().mean() < (theirs - exact).abs().mean()


def test_a_short_answer_is_refused():
    """Fewer tokens than asked for in the same time is not a speed."""
    with pytest.raises(RuntimeError, match="3 tokens came instead of 1"):
        time_answer(lambda ids, new_tokens: [1, 2, 3], torch.zeros(1, 1, dtype=torch.int64), 5)


def test_ours_is_what_create_model_gives_on_a_cpu():
    """Matrices in the dtype asked for, all else in fp32, and layers that can multiply the two."""
    model = our_model(random_model(SMALL), "float16")
    assert isinstance(model.final_linear, CastLinear)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float16 if parameter.dim() == 2 else torch.float32), name


def test_bytes_of_a_decode_step_count_what_is_read():
    """The share of memory bandwidth would be wrong if unread embedding rows counted."""
    model = random_model(SMALL)
    weights = (SMALL.parameter_count() - SMALL.vocab_size * SMALL.hidden_size) * 4
    cache = 2 * SMALL.num_hidden_layers * SMALL.hidden_size * (10 + 2) * 4
    assert bytes_per_token(model, prompt=10, new_tokens=4) == weights + cache


def test_rows_come_for_every_shape_prompt_and_dtype(small_shapes):
    """A combination left out or measured twice would shift the table."""
    for package in (always := ("transformers", "ctranslate2", "xllamacpp")):
        pytest.importorskip(package)
    rows = list(run_bench(["a", "b"], ["float32", "float16", "int8"], [4, 9], 3, 2, always))
    pairs = [(dtype, baseline) for dtype in ("float32", "float16") for baseline in always]
    pairs += [("int8", "ctranslate2"), ("int8", "xllamacpp")]
    expected = [(shape, prompt, *pair) for shape in "ab" for prompt in (4, 9) for pair in pairs]
    assert [(row.shape, row.prompt, row.dtype, row.baseline) for row in rows] == expected
    for row in rows:
        assert len(row.ours) == len(row.theirs) == 2
        assert all(timing.first > 0 and timing.whole > 0 for timing in row.ours + row.theirs)


def test_table_shows_speeds_ratios_and_the_share_of_memory():
    """The numbers of a hand-made run, checked by hand: 0.1 s and 65 tokens in 0.1 + 64 x 0.01 s against twice that."""
    ours, theirs = [Timing(0.1, 0.74, 65)] * 3, [Timing(0.2, 1.48, 65)] * 3
    rows = [
        Row("160m", 64, "float32", "transformers", ours, theirs, 1e8),
        Row("160m", 64, "float16", "transformers", ours, theirs, 5e7),
    ]
    lines = [format_row(row, bandwidth=2e10) for row in rows]
    assert (
        " ".join(lines[0].split())
        == "160m 64 float32 transformers 100 200 2.00x 100.0 50.0 2.00x 740 1480 2.00x 50% 0%"
    )
    assert lines[1].split()[-2:] == ["25%", "0%"]
    assert format_best(rows).endswith("against transformers: prefill 2.00x, decode 2.00x, whole answer 2.00x")


def test_a_negative_difference_reads_as_noise():
    """On a busy machine the short run can take longer than the long one; -138 tokens per second helps nobody."""
    row = Row("tiny", 8, "float32", "transformers", [Timing(0.3, 0.2, 3)], [Timing(0.1, 0.2, 3)], 1e6)
    table = format_row(row, bandwidth=1e10)
    assert "noise" in table and math.isfinite(row.ours[0].per_token)


def test_a_token_far_back_is_compared_with_a_near_one():
    """By hand: 0.01 s per token around position 100, 0.02 s around 2000."""
    rows = [
        Row("160m", prompt, "int8", "", [Timing(0.1, 0.1 + 64 * step, 65)], [], 1e8)
        for prompt, step in ((68, 0.01), (1968, 0.02))
    ]
    shown = format_positions(rows, 65)
    assert shown == "160m, int8, ours: a token takes 10.0 ms at 100, 20.0 ms at 2000; 2.00 times as long"


def test_without_baselines_ours_is_measured_alone(small_shapes, monkeypatch, capsys):
    """Neither of them is among our requirements."""
    without_baselines(monkeypatch)
    monkeypatch.setattr(bench, "memory_bandwidth", lambda megabytes: 1e10)
    assert main(["bench", "--prompts", "4", "--new-tokens", "3", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "transformers is not installed" in shown and "ctranslate2 is not installed" in shown
    assert "160m      4 float16" in shown and "theirs 0" not in shown


def test_a_device_is_measured_in_fp16_against_transformers_eager_and_compiled(monkeypatch, capsys):
    """On a GPU the default of --shapes takes 41 GB there; weights that pass through the host would take it twice."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(on_device, "preset", lambda shape: SMALL)
    monkeypatch.setattr(on_device, "copy_bandwidth", lambda *arguments: 1e10)
    assert {parameter.dtype for parameter in on_device.model_on(torch.device("cpu"), SMALL).parameters()} == {
        torch.float16
    }
    command = ["bench", "--device", "cpu", "--prompts", "4", "--new-tokens", "3", "--rounds", "1"]
    assert main([*command, "--shapes", "a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu, a copy moves 10 GB/s")
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["a", "4", "float16", name] for name in ("transformers", "compiled")
    ]
    monkeypatch.setattr("neox_lib.precision.free_memory", lambda device: 1000)
    assert main([*command, "--shapes", "large"]) == 0
    assert "large: left out: the weights need" in capsys.readouterr().out
    assert main([*command, "--against", "ctranslate2"]) == 2


def test_loading_is_timed_on_both_sides(small_shapes):
    """Both load real files: what comes back writes a token."""
    pytest.importorskip("transformers")
    row = time_load("small", rounds=2)
    assert len(row.ours) == len(row.theirs) == 2 and min(row.ours + row.theirs) > 0


def test_load_line_gives_seconds_and_ratio():
    """More than 1x means that ours is faster, as everywhere in the table."""
    assert format_load(LoadRow("160m", [1.0], [3.0])).endswith("ours 1.00 s, theirs 3.00 s, 3.00x")


def test_wrong_settings_are_refused():
    """One token has no decode step to time."""
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        next(run_bench(["tiny"], ["float32"], [4], new_tokens=1))
    with pytest.raises(ValueError, match="no Pythia of size"):
        next(run_bench(["161m"], ["float32"], [4]))
    with pytest.raises(ValueError, match="knows the dtypes"):
        next(run_bench(["tiny"], ["float8"], [4]))
    with pytest.raises(
        ValueError, match="measures against transformers, ctranslate2, xllamacpp, ik_llama_cpp, not vllm"
    ):
        next(run_bench(["tiny"], ["float32"], [4], against=["vllm"]))


def test_quick_run_prints_machine_table_and_load(small_shapes, capsys):
    """The command as the README shows it, from the first line to the last."""
    assert main(["bench", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "threads, memory read at" in lines[0] and f"torch {torch.__version__}" in lines[0]
    assert any(line.startswith("  tiny     32 float16") for line in lines)
    assert "load fp16 from disk" in lines[-1]
