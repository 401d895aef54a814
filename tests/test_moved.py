"""Copies of before: whatever their notebooks imported or promoted is found where it stands now, or said to be gone."""

import importlib
import importlib.util

from neox_lib.course.moved import GONE, MODULES, NAMES, current

# What the notebooks imported from each module, and promoted into it, before the rooms.
USED = """
attention: Attention KeyValueStore attention_weights causal_mask explicit_attention fused_attention split_heads
block: Block MLP
cache: KVCache
checkpoint: BUFFERS LayerFile check_tied describe_slim load_slim open_layer read_tensors stored_dtype
config: NeoXConfig PYTHIA_SHAPES neox_20b pythia tiny
files: CheckpointError SHIPPED_MODEL check_tensors open_tensors write_text_atomically
generation: ENDOFTEXT_ID PrefillStopped Step StreamDecoder _Row _steps greedy_generate greedy_generate_text
  next_token_logits prompt_ids stream_generate
layout: empty_model find_shards layer_file_name parameter_shapes part_of_file place_of
lesson: plots two_devices
lesson.checks: PropertyFailed in_place_of progress story
lesson.diagrams: model_map
lesson.exercises: attention cached_generation checkpoint_loading parallel_residual prompt_playground rotary
  small_machine start_here tokenizer two_devices
lesson.exercises.cached_generation: random_splitting random_text
lesson.figures_attention: attention_maps over_head_size qkv_rows
lesson.figures_cached_generation: grouped_bars
lesson.figures_checkpoint_loading: MemoryCalculator file_bars memory_bars merge_picture
lesson.figures_parallel_residual: wirings
lesson.figures_rotary: TurningPair comebacks partners
lesson.figures_start_here: share_bars
lesson.figures_tokenizer: SENTENCES byte_table
lesson.figures_two_devices: meetings
lesson.peak_memory: peak_of
lesson.plots: bars heat_map lines seeded token_spans
lesson.predictions: predict
lesson.promote: cell_definitions definitions differences module_path promoted_cells
lesson.real_tokenizer: real_tokenizer_path
lesson.series: held
lesson.two_devices: Wire model_on_devices right_block shipped_parts
model: NeoXModel SequenceCache check_token_ids model_attention_weights
play: jobs
play.costs: needs_of_20b
playground: Playground
release: read_config
rotary: RotaryTable apply_rotary rotary_angles rotary_table rotate_half
sampling: GREEDY Sampling fewest_reaching
scale: parallel
scale.bench: memory_bandwidth
scale.int8_file: int8_bytes is_quantized load_int8 write_int8
scale.int8_linear: Int8Linear use_int8_linear
scale.linear: FastLinear use_fast_linear
scale.loading: choose_device create_model
scale.parallel: RankConfig SplitBlock SplitEmbedding SplitOutput gather_scores own_part share_of sum_over_ranks
scale.quantization: BLOCK_NUMBERS LARGEST dequantize_rows quantize_rows
scale.ranks: RankFailed on_ranks
scale.weights: open_weights
scoring: perplexity
sharding: MERGE MERGE_RULES add_up average join_columns join_rows merge_rule merge_shards shard_shape
slim_writer: check_ranks
splitting: split_tensor
streaming: Throttle Worker follow
tokenizer: BPETokenizer BYTE_TO_CHARACTER CHARACTER_TO_BYTE ENDOFTEXT PADDING PRETOKEN WHITESPACE_RUNS apply_merges
  byte_characters byte_symbols create_tokenizer encode_text find_tokenizer pattern_of_any pretokenize read_tokenizer
  save_tokenizer token_to_bytes train_merges train_tokenizer utf8_bytes
"""


def exists(name: str) -> bool:
    """Whether a dotted name below neox_lib is a module, or a name in one."""
    module, _, attribute = f"neox_lib.{name}".rpartition(".")
    try:
        return (
            hasattr(importlib.import_module(module), attribute)
            or importlib.util.find_spec(f"neox_lib.{name}") is not None
        )
    except ModuleNotFoundError:
        return False


def used() -> list[str]:
    entries = USED.replace("\n  ", " ").strip().splitlines()
    return [f"{module}.{name}" for module, names in (each.split(":") for each in entries) for name in names.split()]


def test_what_a_notebook_of_before_used_is_found_or_said_to_be_gone():
    assert [name for name in used() if not exists(GONE.get(name, current(name)))] == []


def test_nothing_that_stands_here_now_is_said_to_have_moved():
    """Else new notebooks would be sent from where a name is to where it is not."""
    assert [name for name in (*MODULES, *NAMES, *GONE) if exists(name)] == []
