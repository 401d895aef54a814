"""`train`: a small model of your own."""

import argparse
from pathlib import Path

SAMPLE_TOKENS = 60
VALIDATION_TOKENS = 16 * 2048


def window_schedule(text: str) -> tuple[float, tuple[int, ...]]:
    """ "0.9:256,2048" -> (0.9, (256, 2048))."""
    share, _, lengths = text.partition(":")
    return float(share), tuple(int(length) for length in lengths.split(","))


def add(commands) -> None:
    description = (
        "Train a model of the shipped one's shape on story files (<|endoftext|> alone on a line between stories) and "
        "write it as a slim checkpoint. The loss is drawn as it falls; a sample is written every hundred steps. "
        "The same command again continues where it stopped."
    )
    parser = commands.add_parser("train", help="train a small model on stories", description=description)
    parser.add_argument("folder", help="where the state and the finished model go")
    parser.add_argument("--stories", nargs="+", required=True, type=Path, metavar="FILE", help="the main text")
    parser.add_argument("--mix", nargs="*", default=[], type=Path, metavar="FILE", help="text for variety")
    parser.add_argument(
        "--validation", type=Path, metavar="FILE", help="held-out stories (default: the last twentieth of --stories)"
    )
    parser.add_argument("--prompt", default="Once upon a time", help='where samples begin (default: "%(default)s")')
    parser.add_argument("--tokens", dest="total_tokens", type=int, metavar="N", help="how many tokens to train on")
    parser.add_argument("--mix-share", type=float, help="which share of the windows comes from --mix")
    parser.add_argument("--start-from", metavar="MODEL", help="begin with the weights and tokenizer of this model")
    parser.add_argument(
        "--windows",
        nargs="+",
        type=window_schedule,
        metavar="SHARE:LENGTHS",
        help="window lengths that take turns from a share of the steps on, such as 0:256,256,2048 0.9:2048",
    )
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="how many tokens go into one step")
    parser.add_argument("--learning-rate", type=float, help="the highest learning rate")
    parser.add_argument("--warmup-steps", type=int, metavar="N", help="after how many steps it is reached")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: float32)")
    parser.add_argument("--weight-decay", type=float, help="how hard the matrices are pulled towards zero")
    parser.add_argument("--dropout", type=float, help="share of each branch's output that is dropped while training")
    parser.add_argument("--seed", type=int, help="of the first weights and of the order of windows")
    parser.add_argument("--ranks", type=int, default=2, help="tensor-parallel ranks of the files (default: 2)")
    parser.set_defaults(run=run)


def give_tokenizer(folder: Path, stories: list[Path], start_from: str | None) -> None:
    """Put a tokenizer into a run's folder, if it has none: the one its first weights know, else one learned anew.

    Raises ValueError for a model to start from that knows another one than the run.
    """
    from neox_lib.checkpoints.atomic import write_atomically
    from neox_lib.checkpoints.tokenizer_files import copy_as_json, find_tokenizer
    from neox_lib.config import tiny
    from neox_lib.hub import local_tokenizer
    from neox_lib.loading import create_tokenizer
    from neox_lib.tokenizer import save_tokenizer, train_tokenizer
    from neox_lib.training.run import read_stories

    own = folder / "tokenizer.json"
    first = find_tokenizer(local_tokenizer(start_from)) if start_from else None
    if own.exists():
        if first and create_tokenizer(first).get_vocab() != create_tokenizer(own).get_vocab():
            raise ValueError(f"{own} and {first} differ; a run and the model that it starts from need one tokenizer")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if first:
        write_atomically(own, lambda temporary: copy_as_json(first, temporary))
        return
    print("training the tokenizer")
    tokenizer = train_tokenizer(read_stories(stories), tiny().vocab_size)
    write_atomically(own, lambda temporary: save_tokenizer(tokenizer, temporary))


def run(arguments: argparse.Namespace) -> None:
    import dataclasses
    import shutil

    import torch

    from neox_lib.checkpoints.slim.writer import check_ranks, write_slim
    from neox_lib.config import tiny
    from neox_lib.course.figures import plots
    from neox_lib.evaluation.corpus import story_stream
    from neox_lib.evaluation.likelihood import bits_per_byte
    from neox_lib.generation import prompt_ids, stream_generate
    from neox_lib.loading import create_model, create_tokenizer
    from neox_lib.sampling import Sampling
    from neox_lib.spelling import count_ids
    from neox_lib.tokenizer import ENDOFTEXT
    from neox_lib.training import run as training
    from neox_lib.training.plan import TrainingPlan

    folder, finished = Path(arguments.folder), Path(arguments.folder) / "model"
    if arguments.windows:
        arguments.windows = tuple(arguments.windows)
    options = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(TrainingPlan)}
    given = {name: value for name, value in options.items() if value is not None}
    plan = TrainingPlan(**given)
    give_tokenizer(folder, arguments.stories, arguments.start_from)
    tokenizer = create_tokenizer(folder)
    texts = training.read_stories(arguments.stories)
    if arguments.validation:
        held_out = training.read_stories([arguments.validation])
    else:
        texts, held_out = training.hold_out(texts)
    stories, mix, validation = (
        story_stream(tokenizer, each) for each in (texts, training.read_stories(arguments.mix), held_out)
    )
    print(f"{len(stories):,} tokens of stories, {len(mix):,} to mix in, {len(validation):,} held out")
    end = tokenizer.token_to_id(ENDOFTEXT)  # which stands between the stories of a stream
    config = dataclasses.replace(tiny(), tokenizer_vocab_size=count_ids(tokenizer), eos_token_ids=(end,))
    start = None
    if arguments.start_from:
        threads = torch.get_num_threads()
        start = create_model(arguments.start_from, dtype=torch.float32)
        torch.set_num_threads(threads)  # one is for writing; training multiplies many rows
        config = start.config
    check_ranks(config, arguments.ranks)
    length = plan.longest_window  # past it the model has learned nothing
    sample = training.spread_sample(validation, max(1, VALIDATION_TOKENS // length), length)
    prompt = prompt_ids(tokenizer, arguments.prompt)
    new_tokens = min(SAMPLE_TOKENS, config.max_position_embeddings - prompt.shape[1])

    def write(model) -> str:
        steps = stream_generate(model, prompt, new_tokens, tokenizer=tokenizer, sampling=Sampling(0.8))
        return arguments.prompt + "".join(step.text for step in steps)

    model, history = training.train(config, plan, stories, mix, sample, folder, start, write)
    plots.loss_curves(history).savefig(folder / "curves.png")
    shutil.rmtree(finished, ignore_errors=True)  # of an earlier call; this folder is ours alone
    write_slim(model.to(torch.float16), finished, arguments.ranks, spread_seed=plan.seed)
    shutil.copy(folder / "tokenizer.json", finished)
    bits = bits_per_byte(create_model(finished), tokenizer, held_out, length)
    print(f"{bits:.4f} bits per byte on the held-out stories, by the finished model in {finished}")
