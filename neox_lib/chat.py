"""A conversation with a model: its chat template turns the messages into one text, and each reply continues that.

May import loading and every room above it; the playground and the command line may import it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.gguf.file import open_gguf
from neox_lib.checkpoints.gguf.tokenizer import special_tokens_of
from neox_lib.checkpoints.tokenizer_files import chat_template, find_tokenizer, read_fields
from neox_lib.generation import Step, stream_generate
from neox_lib.hub import local_path
from neox_lib.model import NeoXModel
from neox_lib.recall import Recall
from neox_lib.sampling import GREEDY, Sampling
from neox_lib.tokenizer import ENDOFTEXT, PADDING, BPETokenizer, encode_text, utf8_bytes

Message = dict[str, str]  # "role" (system, user or assistant) and "content"

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NEOX_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT) | {"pad_token": PADDING}
REPLY = "\ue000"  # stands for a reply: a character of no script, so no template writes it of its own
MOST_CHARACTERS = 10**7  # of a text made by a template: one that makes more would take the memory


class NoChatTemplateError(CheckpointError):
    """A model without a chat template."""


class GenerationTag(Extension):
    """`{% generation %}` marks a reply for training; here its content is text like any other."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def fail(message: str) -> None:
    """`raise_exception` of a template."""
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, **how) -> str:
    """`tojson` of a template; Jinja's own writes for web pages, with < and > escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def sandbox() -> ImmutableSandboxedEnvironment:
    """Where templates run, as in `transformers`: no files, imports or internals of Python, and no message changed."""
    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that writes messages as the model was trained to read them.

    `special_tokens` are texts that it may use, such as "eos_token"; `name` says in errors where it comes from. Raises
    CheckpointError for one that is no template, fails, or leaves out what is said.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    name: str = "the chat template"

    def __post_init__(self):
        if "a question" not in self.text([{"role": "user", "content": "a question"}]):
            raise CheckpointError(f"{self.name}: this chat template leaves out what the user says; give another one")

    def text(self, messages: Sequence[Message]) -> str:
        """The messages as one text, up to where the next reply begins. Raises CheckpointError where that fails."""
        pieces, length = [], 0
        try:
            template = sandbox().from_string(self.source)
            for piece in template.generate(
                self.special_tokens, messages=messages, tools=None, documents=None, add_generation_prompt=True
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MOST_CHARACTERS:
                    raise ValueError(f"it writes more than {MOST_CHARACTERS:,} characters")
        except Exception as error:  # a template may do anything that the sandbox lets it
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            refused = type(error) is jinja2.TemplateError  # by `raise_exception`; all others are subclasses
            said = "refuses these messages" if refused else "can't be used"
            advice = "change the messages" if refused else "correct it"
            raise CheckpointError(f"{self.name}: this chat template {said} ({reason}); {advice}") from error
        return "".join(pieces)

    def turn(self, text: str) -> str:
        """What follows a reply when the user then says `text`, up to where the next reply begins.

        Raises CheckpointError where that fails, and for a template that leaves replies out.
        """
        asked, said = ({"role": "user", "content": each} for each in ("a question", text))
        _, reply, after = self.text([asked, {"role": "assistant", "content": REPLY}, said]).partition(REPLY)
        if not reply:
            raise CheckpointError(f"{self.name}: this chat template leaves replies out, so none can be answered")
        return after


def create_chat_template(path: str | Path | None = None, revision: str = "main") -> ChatTemplate:
    """The chat template beside a model's tokenizer: `chat_template.jinja`, else in `tokenizer_config.json`; a GGUF file
    holds its own.

    The model is given as to `create_model`, or a tokenizer's file. Raises NoChatTemplateError where there is none, and
    what `ChatTemplate` and `create_tokenizer` raise.
    """
    tokenizer = find_tokenizer(local_path(SHIPPED_MODEL if path is None else path, revision))
    folder, (source, file) = tokenizer.parent, chat_template(tokenizer)
    if source is None:
        raise NoChatTemplateError(
            f"{file if file == tokenizer else folder}: no chat template, neither chat_template.jinja nor one in "
            "tokenizer_config.json, so the form of its conversations is unknown; continue a text instead, or give a "
            "model that was trained to chat"
        )
    if file == tokenizer:
        return ChatTemplate(source, special_tokens_of(open_gguf(file)), str(file))
    fields = read_fields(folder / "special_tokens_map.json") | read_fields(folder / "tokenizer_config.json")
    defaults = NEOX_TOKENS if str(fields.get("tokenizer_class") or "GPTNeoX").startswith("GPTNeoX") else {}
    said = {name: fields.get(name, defaults.get(name)) for name in ROLES}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in said.items()}
    return ChatTemplate(source, {name: token for name, token in tokens.items() if isinstance(token, str)}, str(file))


def conversation_ids(tokenizer: Tokenizer | BPETokenizer, text: str) -> list[int]:
    """Token ids of a text to which its template has added the control tokens. Raises ValueError as `encode_text`."""
    if isinstance(tokenizer, BPETokenizer):
        return encode_text(tokenizer, text)
    utf8_bytes(text)
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"the tokenizer can't read this text: {error}") from error


class Chat:
    """A conversation. `messages` are those so far; put a {"role": "system", "content": ...} there to begin with one.

    The cache is kept between the turns, so a turn reads only tokens that are new: those of the last reply that the
    template writes anew, and the user's. `unread` says how many these were. Replies are the same as if the whole
    conversation were read again.
    """

    def __init__(
        self,
        model: NeoXModel,
        tokenizer: Tokenizer | BPETokenizer,
        template: ChatTemplate,
        sampling: Sampling = GREEDY,
        messages: Sequence[Message] = (),
        stop_token_ids: tuple[int, ...] | None = None,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.sampling, self.stop_token_ids = sampling, stop_token_ids
        self.messages = list(messages)
        self.recall = Recall(model)
        self.unread = 0

    @property
    def context(self) -> int:
        """The model's context, in tokens."""
        return self.model.config.max_position_embeddings

    def send(self, text: str, max_new_tokens: int = 200) -> Iterator[Step]:
        """Say `text` as the user, and stream the reply: at most `max_new_tokens`, or as many as the context has room.

        Both are added to `messages` when the stream ends or is closed; a reply without a token adds neither. Raises
        ValueError for a full context and for a text that can't be read.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, context = conversation_ids(self.tokenizer, self.template.text(asked)), self.context
        if len(ids) >= context:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens, and this model's context holds {context:,}, one of them "
                "new; begin another one"
            )
        new = min(max_new_tokens, context - len(ids))
        cache = self.recall.room_for(ids, len(ids) + new) if self.model.use_cache else None
        self.unread = len(ids) - min(len(ids) - 1, cache.length if cache is not None else 0)
        steps = stream_generate(
            self.model,
            [ids],
            new,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            stop_token_ids=self.stop_token_ids,
            cache=cache,
        )
        return self.follow(asked, ids, steps)

    def follow(self, asked: list[Message], ids: list[int], steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of a reply, which is remembered however it ends."""
        ids, reply, asked_tokens = list(ids), "", len(ids)
        try:
            for step in steps:
                ids.append(step.token_id)
                reply += step.text
                yield step
        finally:
            self.recall.keep(ids)
            if len(ids) > asked_tokens:
                self.messages = [*asked, {"role": "assistant", "content": reply}]
