"""The prompt playground as a widget."""

from pathlib import Path

from IPython.display import display

from neox_lib.chat import NoChatTemplateError, create_chat_template
from neox_lib.loading import create_model, create_tokenizer, use_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.playground import saved
from neox_lib.playground.actions import perform
from neox_lib.playground.page import Page
from neox_lib.playground.picture import picture_html, picture_text, text_in_hand
from neox_lib.playground.session import Session
from neox_lib.playground.settings import settings_of
from neox_lib.playground.state import State
from neox_lib.sampling import Sampling


class Playground:
    """A prompt, the text that streams from it, and views of how it came about. Needs JupyterLab, Notebook or Voila.

    `Playground()` plays with the shipped model, `Playground(path)` with any checkpoint (its tokenizer beside it, or
    given as the second argument), `Playground(name, revision="step1000")` with one on the Hub, `Playground(model,
    tokenizer)` with your own. `sampling`, such as `create_sampling` gives, and further arguments, such as `tokens=100`,
    are settings; see `neox_lib.playground.settings`. A model whose chat template lies beside its tokenizer takes turns
    too. Raises what `create_model` and `create_tokenizer` raise, and
    ValueError for a model without a tokenizer or an invalid setting.
    """

    def __init__(
        self,
        model=None,
        tokenizer=None,
        *,
        revision="main",
        prompt: str = "Once upon a time, there was a brave little mouse",
        sampling: Sampling | None = None,
        **settings,
    ):
        template, problem = None, ""
        if isinstance(model, NeoXModel):
            if tokenizer is None:
                raise ValueError("a model needs its tokenizer: Playground(model, tokenizer)")
            name = "your model"
        else:
            path, name = model, "shipped model" if model is None else Path(model).absolute().name
            model = create_model(path, revision=revision)
            if tokenizer is None:
                tokenizer = create_tokenizer(path, revision)
                try:
                    template = create_chat_template(path, revision)
                except (NoChatTemplateError, FileNotFoundError):
                    pass  # it takes no turns
                except ValueError as error:  # it can be played with all the same
                    problem = str(error)
            else:
                use_tokenizer(model, tokenizer)
        self.session = Session(model, tokenizer, name)
        self.state.template, self.state.error = template, problem
        self.session.set(**(settings_of(sampling) if sampling else {}) | settings)
        self.session.set_prompt(prompt)
        self.page = Page(self.state)
        self.page.on_msg(lambda page, message, buffers: self.act(message))
        self.page.on_closed = self.session.stop
        self.session.show = self.page.publish

    @classmethod
    def open(cls, file: str | Path, model=None, tokenizer=None, revision="main") -> "Playground":
        """A playground as it was when the file was saved. Raises ValueError for a file that does not fit the model."""
        play = cls(model, tokenizer, revision=revision)
        saved.read_into(play.state, file)
        play.page.publish()
        return play

    @property
    def state(self) -> State:
        return self.session.state

    @property
    def written(self) -> str:
        """The text of the current branch with its prompt; the prompt alone before there is one."""
        return text_in_hand(self.state)

    def write(self, prompt: str | None = None) -> str:
        """Generate and wait for the end, for a cell that needs the text; the buttons never wait."""
        if prompt is not None:
            self.session.set_prompt(prompt)
        self.session.generate()
        self.session.worker.join()
        return self.written

    def save(self, file: str | Path) -> None:
        """Write prompt, settings and all branches to a JSON file, which `Playground.open` restores."""
        saved.save(self.state, file)

    def act(self, message: dict) -> None:
        """Do what the page asks for. Errors are shown there, and the playground stays usable."""
        try:
            if message.get("do") == "save":
                self.page.send({"file": saved.to_json(self.state)})
            else:
                perform(self.session, message)
        except Exception as error:  # raised in a callback, it would be shown nowhere
            self.state.error = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.page.publish()
        self.page.has_heard(message.get("number"))

    def close(self) -> None:
        """Remove the playground from the page and stop what streams."""
        self.page.close()

    def __repr__(self) -> str:
        return f"Playground({self.state.name})"

    def _ipython_display_(self) -> None:
        """A still picture, followed by the live page, which hides the picture where a kernel runs.

        They are two outputs because, of one output with both, Jupyter shows the widget even where no kernel runs it.
        """
        display({"text/html": picture_html(self.state), "text/plain": picture_text(self.state)}, raw=True)
        found = self.page._repr_mimebundle_()
        data, metadata = found if isinstance(found, tuple) else (found or {}, {})
        display(data | {"text/plain": repr(self)}, metadata=metadata, raw=True)
