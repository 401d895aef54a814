"""lm-evaluation-harness asks, the model answers: any task of the harness, on any model of this library.

Needs the package lm-eval, which only this module imports. Each answer is kept as soon as it is computed, in a
database of the harness's own, so that a run that was stopped goes on where it was.
"""

import contextlib
import difflib
import importlib.metadata
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM
from lm_eval.evaluator import evaluate as ask
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm.auto import tqdm

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.evaluation.likelihood import Pair, pair_ids, score_batch, windows
from neox_lib.generation import prompt_ids, stream_generate
from neox_lib.model import NeoXModel
from neox_lib.sampling import Sampling
from neox_lib.tokenizer import encode_text

TASKS = Path(__file__).parent / "tasks"  # those built from the texts of the package
NEW_TOKENS = 256  # as the harness has it, where a task doesn't say how many to write
FEWSHOT_SEED = 1234  # the harness's own
RESAMPLES = 1000  # for the standard error of what is no mean; the harness's own default takes 100,000
PROBE = "Once upon a time, there was a fox who asked 12 questions. Who answered them?"


class HarnessModel(LM):
    """A model as the harness asks it, `batch_size` questions at a time.

    Differs from the harness's Hugging Face backend in one point: rows of the vocabulary that stand for no token get no
    probability.
    """

    def __init__(self, model: NeoXModel, tokenizer, batch_size: int = 8):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        self.model, self.encoder, self.batch_size = model, tokenizer, batch_size
        self.max_length = model.config.max_position_embeddings
        self.begin = int(prompt_ids(tokenizer, "", model.config))  # stands before every text

    def answers(self, pairs: Sequence[Pair], places: Sequence[int]) -> Iterator[tuple[int, Tensor, bool]]:
        """What `score_batch` gives, for pairs in the order of `places`, with the place of each."""
        with tqdm(total=len(places), desc="likelihoods") as bar:
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                for place, answer in zip(batch, score_batch(self.model, [pairs[each] for each in batch]), strict=True):
                    yield place, *answer
                bar.update(len(batch))

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether greedy decoding would write it.

        Raises ValueError, before any answer is computed, for a continuation without a token of its own.
        """
        pairs = [pair_ids(self.encoder, *request.args, begin=self.begin) for request in requests]
        for request, (_, continuation) in zip(requests, pairs, strict=True):
            if not 1 <= len(continuation) <= self.max_length:
                context, answer = request.args
                raise ValueError(
                    f"question {request.doc_id} of {request.task_name}: after {context[-40:]!r}, the answer "
                    f"{answer[:40]!r} has {len(continuation)} tokens of its own, and needs 1 to {self.max_length}, the "
                    "model's context; where it has none, one token spans the cut, so begin the answer with a space in "
                    "the task's YAML"
                )
        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        longest_first = sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True)  # little padding in a batch
        found = [(0.0, False)] * len(pairs)
        for place, log_probabilities, greedy in self.answers(pairs, longest_first):
            found[place] = log_probabilities.sum().item(), greedy
            self.cache_hook.add_partial("loglikelihood", requests[place].args, found[place])
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-likelihood of each text, read in windows of the model's context."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            text = [self.begin, *encode_text(self.encoder, request.args[0])]
            cut = list(windows(text, self.max_length, self.max_length))
            pairs += cut
            owners += [number] * len(cut)
        found = [0.0] * len(requests)
        for place, log_probabilities, _ in self.answers(pairs, range(len(pairs))):
            owner = owners[place]
            found[owner] += log_probabilities.sum().item()
            if owners[place + 1 : place + 2] != [owner]:  # its last window
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, found[owner])
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What the model writes behind each context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = defaultdict(list)
        contexts = [prompt_ids(self.encoder, request.args[0], self.model.config)[0].tolist() for request in requests]
        for place in sorted(range(len(requests)), key=lambda place: -len(contexts[place])):
            groups[json.dumps(requests[place].args[1], sort_keys=True)].append(place)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts") as bar:
            for settings, places in groups.items():
                sampling, new_tokens = generation_settings(json.loads(settings))
                room = self.max_length - new_tokens
                if room < 1:
                    raise ValueError(f"a task asks for {new_tokens} new tokens; the context holds {self.max_length}")
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    prompts = [contexts[place][-room:] for place in batch]
                    steps = stream_generate(self.model, prompts, new_tokens, tokenizer=self.encoder, sampling=sampling)
                    for step in steps:
                        for place, text in zip(batch, step.texts, strict=True):
                            found[place] += text
                    for place in batch:
                        self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
                    bar.update(len(batch))
        return found


def generation_settings(asked: dict) -> tuple[Sampling, int]:
    """How a task wants its texts written: `Sampling`, and how many new tokens. ValueError for what we lack."""
    asked = dict(asked)
    until = asked.pop("until", None) or []
    lengths = [asked.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    new_tokens = next((int(each) for each in lengths if each is not None), NEW_TOKENS)
    temperature = float(asked.pop("temperature", 0) or 0)
    draws = asked.pop("do_sample", temperature > 0)
    top_k, top_p = asked.pop("top_k", None), asked.pop("top_p", None)
    if asked:
        raise ValueError(f"a task's generation_kwargs ask for {', '.join(sorted(asked))}, which is not supported")
    stops = tuple(each for each in ([until] if isinstance(until, str) else until) if each)
    if not draws:
        return Sampling(stop_strings=stops), new_tokens
    return Sampling(temperature=temperature or 1.0, top_k=top_k, top_p=top_p, stop_strings=stops), new_tokens


def load_tasks(names: Sequence[str], num_fewshot: int | None = None) -> dict:
    """The harness's tasks of these names, ours included, or from YAML files, each with so many solved questions before
    a question, or as many as it says itself. Raises ValueError for a name that is neither.

    Looking through the harness's own thousands takes seconds, so ours are found without.
    """
    ours = TaskManager(include_path=TASKS, include_defaults=False)
    known = all(name in ours.all_tasks or Path(name).is_file() for name in names)
    manager = ours if known else TaskManager(include_path=TASKS)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; near it: {', '.join(near)}" if near else f"; ours are {', '.join(ours.all_tasks)}"
            raise ValueError(f"lm-eval has no task {name!r}, and there is no such YAML file{hint}")
    loaded: Any = manager.load(list(names))
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", num_fewshot if num_fewshot is not None else task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def check_same_model(asked: HarnessModel, folder: Path) -> None:
    """Note in the folder what the model makes of a sentence, or compare it with the note that is there.

    Raises ValueError for a note of another model: its answers must not be taken for this one's. So it is for other
    weights, code, tokenizer or precision.
    """
    note = folder / "probe.json"
    log_probabilities, _ = score_batch(asked.model, [([asked.begin], encode_text(asked.encoder, PROBE))])[0]
    found = {"context": asked.max_length, "log_probabilities": [round(each, 5) for each in log_probabilities.tolist()]}
    if not note.is_file():
        write_text_atomically(note, json.dumps(found) + "\n")
        return
    kept = json.loads(note.read_text("utf-8"))
    ours, theirs = found["log_probabilities"], kept["log_probabilities"]
    same = found["context"] == kept["context"] and len(ours) == len(theirs)
    if not same or max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-3:
        raise ValueError(f"{folder} keeps answers of another model; give another folder, or delete it")


def score_lines(results: dict) -> list[str]:
    """A line for each task and measure: its value, and its standard error where there is one."""
    lines = [f"{'task':28}{'measure':18}{'score':>10}  {'standard error':>14}{'questions':>11}"]
    for task, scores in results["results"].items():
        asked = results.get("n-samples", {}).get(task, {}).get("effective", "")
        for name, score in scores.items():
            measure, _, kind = name.partition(",")
            error = scores.get(f"{measure}_stderr,{kind}")
            if isinstance(score, float) and not measure.endswith("_stderr"):
                shown = f"{error:14.4f}" if isinstance(error, float) else " " * 14
                lines.append(f"{task:28}{measure:18}{score:10.4f}  {shown}{asked:>11}")
    return lines


def evaluate(
    model: NeoXModel,
    tokenizer,
    tasks: Sequence[str],
    folder: Path,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict:
    """The harness's results on these tasks: {"results": {task: {"acc,none": ...}}, "versions": ..., and more}.

    `folder` keeps each answer when it is there, and `results.json` at the end; a second call takes from it what is
    known. `limit` asks only the first questions of each task, `num_fewshot` puts so many solved ones before each.
    Raises ValueError for a task that is not known, and for a folder of another model.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # so few resamples need no processes, and no fork of torch's threads
    asked, loaded = HarnessModel(model, tokenizer, batch_size), load_tasks(tasks, num_fewshot)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_model(asked, folder)
    remembering: Any = CachingLM(asked, str(folder / "answers.db"))
    with contextlib.redirect_stdout(sys.stderr), contextlib.closing(remembering.dbdict):  # the harness prints
        results: Any = ask(remembering, loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
    kept = {name: results[name] for name in ("results", "versions", "n-shot", "n-samples")}
    kept["lm_eval_version"] = importlib.metadata.version("lm-eval")
    write_text_atomically(folder / "results.json", json.dumps(kept, indent=2) + "\n")
    return results
