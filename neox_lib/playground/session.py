"""What a person can do with a playground. Nothing here blocks: everything that needs the model runs in one worker."""

import threading
from collections.abc import Callable

from neox_lib.chat import conversation_ids
from neox_lib.generation import prompt_ids
from neox_lib.model import NeoXModel
from neox_lib.playground import jobs, saved
from neox_lib.playground.costs import Costs
from neox_lib.playground.state import State
from neox_lib.playground.streaming import Worker
from neox_lib.playground.token_text import spell, text_of, without_surrogates

Job = Callable[[threading.Event], None]


class Session:
    """One person's actions on one State.

    `show()` is called whenever the state has changed, often from the worker's thread. `worker.join()` waits until all
    jobs are done. An exception in the worker is kept in `state.error`, and the session stays usable.
    """

    def __init__(self, model: NeoXModel, tokenizer, name: str = "model", show: Callable[[], None] = lambda: None):
        self.state = State(model, tokenizer, name)
        self.show = show
        self.worker = Worker(self._failed, self._next)
        self.lock = threading.RLock()
        self.running = ""  # the kind of the running job
        self.waiting: tuple[str, Job] | None = None

    def say(self, phase: str, status: str) -> None:
        """Set phase and status. The phase is not idle while a job runs; `_next` sets it when the job ends."""
        self.state.phase, self.state.status = ("working" if phase == "idle" else phase), status
        self.show()

    def _ask(self, kind: str, job: Job) -> None:
        """Run a job now or next. A second "write" is ignored; any job interrupts a look, and "change" any job.

        A look never takes the place of another job that waits, which looks at its end: two messages may come in two
        threads, and the earlier one may be slower.
        """
        with self.lock:
            if self.worker.busy and self.running == kind == "write":
                return
            if kind == "look" and self.waiting is not None:
                return
            self.waiting = (kind, job)
            if not self.worker.busy:
                self._next()
            elif self.running == "look" or kind == "change":
                self.worker.stop()

    def _next(self) -> None:
        with self.lock:
            if self.worker.busy:
                return
            waiting, self.waiting = self.waiting, None
            if waiting is not None:
                self.running = waiting[0]
                self.worker.start(waiting[1])
            self.state.phase = "working" if self.worker.busy else "idle"
        self.show()

    def _failed(self, error: Exception) -> None:
        self.state.recall.forget()
        self.state.error = f"{type(error).__name__}: {error}"
        self.say("idle", "Something went wrong. The text so far is kept, and you can continue.")

    def set_prompt(self, text: str) -> None:
        self.state.prompt = without_surrogates(text)
        self.show()

    def set(self, **changes) -> None:
        """Change settings, such as set(tokens=20, use_cache=False). Raises ValueError for an invalid one."""
        self.state.settings = self.state.settings.changed(changes)
        self.show()

    def prompt_tokens(self) -> list[int]:
        return prompt_ids(self.state.tokenizer, self.state.prompt, self.state.model.config)[0].tolist()

    def generate(self) -> None:
        """Start over from the prompt."""
        prompt = self.prompt_tokens()
        self._ask("write", lambda stopping: jobs.write(self.state, prompt, stopping, self.say))

    def go_on(self) -> None:
        """Continue the current branch; without one, do as `generate`."""
        if len(self.state.branches):
            self._ask("write", lambda stopping: jobs.write(self.state, None, stopping, self.say))
        else:
            self.generate()

    def send(self, text: str) -> None:
        """Say `text` as the user behind the text in hand, or to begin a conversation, and write the reply.

        The prompt becomes the conversation up to that reply, as the model's chat template writes it. Raises ValueError
        for a model without a template, while the model writes, and for a full context.
        """
        state, text = self.state, without_surrogates(text)
        if state.template is None:
            raise ValueError("this model has no chat template, so it takes no turns; continue a text instead")
        if state.phase in ("reading", "writing"):
            raise ValueError("The model is still writing: wait, or press Stop, and send it again.")
        if len(state.branches):
            ids = state.branches.branch.ids
            so_far = text_of(spell(state.tokenizer, ids[:-1] if state.ended else ids))
            prompt = so_far + state.template.turn(text)  # which writes the end of a reply itself
        else:
            prompt = state.template.text([{"role": "user", "content": text}])
        said = conversation_ids(state.tokenizer, prompt)  # type: ignore[arg-type]
        if len(said) >= state.context:
            raise ValueError(
                f"The conversation would have {len(said):,} tokens, and the context holds {state.context:,}, one of "
                "them new. Send less, or press Clear to begin another one."
            )

        def job(stopping: threading.Event) -> None:
            state.prompt = prompt
            state.branches.go_on(said)
            jobs.write(state, None, stopping, self.say)

        state.error = ""
        self.show()  # an earlier error is no answer to this turn
        self._ask("change", job)

    def stop(self) -> None:
        """Stop the running job, within one token or one layer of the prompt, and drop the waiting one."""
        with self.lock:
            self.waiting = None
            self.worker.stop()

    def clear(self) -> None:
        """Forget text, branches and costs; keep the prompt and the settings."""

        def job(_: threading.Event) -> None:
            state = self.state
            state.branches.clear()
            state.recall.forget()
            state.forget_looks()
            state.costs, state.chosen, state.error = Costs(), 0, ""
            state.prefill_seconds = state.tokens_per_second = 0.0
            self.say("idle", "Cleared; the prompt is kept.")

        self._ask("change", job)

    def restore(self, content: dict) -> None:
        """Bring back what a page kept before it was reloaded. Raises ValueError for what does not fit the model."""
        found = saved.read(self.state, content)

        def job(_: threading.Event) -> None:
            saved.restore(self.state, *found)
            self.say("idle", "Back as it was before the page was reloaded.")

        self._ask("change", job)

    def look(self, position: int | None = None) -> None:
        """Choose a position of the current branch and score its candidates. None: the position already chosen."""
        if not len(self.state.branches):
            return
        last = len(self.state.branches.branch.ids)
        self.state.chosen = self.state.chosen if position is None else max(0, min(position, last))
        self.state.forget_looks()
        self.show()
        self._ask("look", lambda stopping: jobs.look(self.state, stopping, self.say))

    def watch(self, view: str) -> None:
        """What to compute of the chosen position too: "attention", "lens", or with "" neither. Raises ValueError for
        another view.
        """
        if view not in ("", "attention", "lens"):
            raise ValueError(f"watch: view should be attention, lens or empty, got {view!r}")
        self.state.watching = view
        if view and getattr(self.state, view) is None:
            self.look()

    def choose_head(self, layer: int, head: int) -> None:
        """Choose the head whose attention is shown. Raises ValueError for one that the model does not have."""
        config = self.state.model.config
        if not (0 <= layer < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
            raise ValueError(
                f"no head {head} in layer {layer}: {config.num_hidden_layers} layers have "
                f"{config.num_attention_heads} each, counted from 0"
            )
        self.state.layer, self.state.head = layer, head
        self.show()

    def take(self, token_id: int) -> None:
        """Take another token at the chosen position: a branch forks off there and is continued."""
        position, found = self.state.chosen, {each.token_id: each.score for each in self.state.candidates}
        if token_id not in found or self.state.scored != position:
            self.say("idle", "That token is not among the ones shown; choose a position first.")
            return

        def job(stopping: threading.Event) -> None:
            self.state.branches.take(position, token_id, found[token_id])
            jobs.write(self.state, None, stopping, self.say)

        self._ask("change", job)

    def choose_branch(self, number: int) -> None:
        """Switch to another branch, at its end."""

        def job(stopping: threading.Event) -> None:
            self.state.chosen = len(self.state.branches.choose(number).ids)
            self.state.forget_looks()
            jobs.look(self.state, stopping, self.say)

        self._ask("change", job)
