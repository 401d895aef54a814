"""Conversations: the template's text is that of transformers, the cache is kept, and no template can do harm."""

import io
import json
import sys

import pytest

from neox_lib import Chat, create_chat_template
from neox_lib.__main__ import main
from neox_lib.chat import ChatTemplate, conversation_ids
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.gguf.writer import write_gguf
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.generation import stream_generate
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.sampling import Sampling
from tests.small_models import CHAT_TEMPLATE, write_chat_model

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = """{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim + '\\n' }}
{%- endif %}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% if m.role == 'user' and loop.index0 > 9 %}{{ raise_exception('too long') }}{% endif %}
    {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}
{{ m | tojson }} {{ bos_token }}{{ pad_token }}{% endif %}
{% endfor %}{{ tools is none }}{{ strftime_now('%Y') | length }}
{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}"""
MESSAGES = [
    {"role": "system", "content": " Be <b>rief</b>. "},
    {"role": "user", "content": 'Say é & "no"'},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "and\nnow?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def chat(folder):
    model = create_model(folder, device="cpu", dtype="float32")
    return Chat(model, create_tokenizer(folder), create_chat_template(folder), stop_token_ids=())


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, PARTS], ids=["short", "with all parts"])
@pytest.mark.parametrize("where", ["jinja", "config", "list", "gguf"])
def test_a_template_writes_what_transformers_writes(folder, tmp_path, source, where):
    """Another text than a model was trained with is answered badly, and nobody sees why."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if where in ("jinja", "gguf"):
        (tmp_path / "chat_template.jinja").write_text(source)
    else:
        fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
        said = source if where == "config" else [{"name": "default", "template": source}, {"name": "x", "template": ""}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": said}))
    path = tmp_path
    if where == "gguf":
        pytest.importorskip("gguf", reason="needs gguf")
        path = write_gguf(open_checkpoint(folder), tmp_path / "gguf", tmp_path / "tokenizer.json")
    theirs, template = AutoTokenizer.from_pretrained(tmp_path), create_chat_template(path)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert template.text(MESSAGES) == expected
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert conversation_ids(create_tokenizer(tmp_path), expected) == ids


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, PARTS], ids=["short", "with all parts"])
def test_a_turn_is_what_the_template_writes_behind_a_reply(source):
    """Whoever goes on from a text has no messages, only the text."""
    template = ChatTemplate(source, {"eos_token": "#"})
    said = [("user", "a"), ("assistant", "so"), ("user", "b")]
    whole = template.text([{"role": role, "content": content} for role, content in said])
    assert whole.endswith("so" + template.turn("b"))
    deaf = ChatTemplate("{{ messages[0].content }}{{ messages[-1].content }}", name="F/chat")
    with pytest.raises(CheckpointError, match=r"^F/chat: this chat template leaves replies out"):
        deaf.turn("b")


def reply(chat: Chat, text: str, new: int = 6) -> str:
    return "".join(step.text for step in chat.send(text, new))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=5, repetition_penalty=1.3)], ids=repr)
def test_replies_are_those_of_the_whole_conversation_read_afresh(chat, folder, sampling):
    """A cache that held something else would answer another question."""
    chat.sampling, said = sampling, []
    for text in ("the fox", "and the hen", "", "the"):
        said.append({"role": "user", "content": text})
        ids = conversation_ids(chat.tokenizer, chat.template.text(said))
        how = {"tokenizer": chat.tokenizer, "sampling": sampling, "stop_token_ids": ()}
        afresh = "".join(step.text for step in stream_generate(chat.model, [ids], 6, **how))
        assert reply(chat, text) == afresh
        said.append({"role": "assistant", "content": afresh})
        assert chat.messages == said


def test_a_turn_reads_only_what_is_new(chat, monkeypatch):
    """Reading the conversation again at each turn would make a long one slower and slower."""
    shapes, real = [], NeoXModel.forward

    def counted(self, ids, *given, **named):
        shapes.append(ids.shape[1])
        return real(self, ids, *given, **named)

    monkeypatch.setattr(NeoXModel, "forward", counted)
    reply(chat, "the fox")
    before = len(conversation_ids(chat.tokenizer, chat.template.text(chat.messages[:1])))
    assert shapes == [before, 1, 1, 1, 1, 1] and chat.unread == before
    chat.messages[1]["content"] = "the hen"  # as the model wrote it or not
    shapes.clear()
    reply(chat, "and")
    whole = len(conversation_ids(chat.tokenizer, chat.template.text(chat.messages[:3])))
    assert shapes[0] == chat.unread == whole - before


def test_an_interrupted_reply_is_kept_and_one_without_a_token_leaves_nothing(chat):
    steps = chat.send("the fox", 6)
    written = next(steps).text + next(steps).text
    steps.close()
    assert chat.messages == [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": written}]
    kept = list(chat.messages)

    def press_ctrl_c(*_):
        raise KeyboardInterrupt

    handle = chat.model.norm.register_forward_hook(press_ctrl_c)  # while the prompt is read
    with pytest.raises(KeyboardInterrupt):
        reply(chat, "and the hen")
    handle.remove()
    assert chat.messages == kept
    said = [*kept, {"role": "user", "content": "and the hen"}]
    ids = conversation_ids(chat.tokenizer, chat.template.text(said))
    afresh = "".join(
        step.text for step in stream_generate(chat.model, [ids], 6, tokenizer=chat.tokenizer, stop_token_ids=())
    )
    assert reply(chat, "and the hen") == afresh


def test_a_full_context_is_said_and_the_last_reply_has_the_room_that_is_left(chat):
    question = {"role": "user", "content": "the fox " * 100}
    room = 256 - len(conversation_ids(chat.tokenizer, chat.template.text([question])))
    assert 0 < room < 60 and len(list(chat.send(question["content"], 1000))) == room
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens, and this model's context holds 256, one"):
        reply(chat, "more")
    assert len(chat.messages) == 2


def test_the_models_end_ends_a_turn(chat, folder):
    chat.stop_token_ids = None
    chat.model.norm.weight.data.fill_(0)
    chat.model.norm.bias.data.fill_(1)
    chat.model.final_linear.weight.data.fill_(0)
    chat.model.final_linear.weight.data[chat.model.config.eos_token_ids[0]] = 1
    assert len(list(chat.send("the fox"))) == 1
    assert chat.messages[-1] == {"role": "assistant", "content": ""}


HOSTILE = {
    "broken": ("{% for message in messages %}", "TemplateSyntaxError"),
    "raising": ("{{ raise_exception('no user here') }}", r"refuses these messages \(.*no user here\); change the mess"),
    "unknown": ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
    "internals": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch harm') }}", "SecurityError"),
    "function": ("{{ strftime_now.__globals__ }}{{ raise_exception.__globals__['json'] }}", "SecurityError"),
    "file": ("{% include '/etc/passwd' %}", "TypeError"),
    "changing": ("{{ messages.append(1) }}", "SecurityError"),
    "endless": ("{% for a in range(90000) %}{% for b in range(90000) %}xxxxxxxx{% endfor %}{% endfor %}", "characters"),
    "huge range": ("{% for a in range(10 ** 12) %}{% endfor %}", "OverflowError"),
    "recursive": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "deaf": ("Hello!", "leaves out what the user says"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_is_none_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, said = HOSTILE[name]
    with pytest.raises(CheckpointError, match=rf"^F/chat: this chat template .*{said}"):
        ChatTemplate(source, name="F/chat")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"no chat template, neither chat_template\.jinja nor one in tokenizer_config\.json"),
        ({"chat_template": 3}, r"tokenizer_config\.json: its chat_template is a int, expected a text"),
        ({"chat_template": [3]}, r"tokenizer_config\.json: its chat_template is a list, expected a text"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "no chat template"),
        (b"\xff{{ messages }}", r"chat_template\.jinja: not a text in UTF-8"),
    ],
    ids=str,
)
def test_a_folder_without_a_template_is_named(folder, tmp_path, content, said):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    if isinstance(content, bytes):
        (tmp_path / "chat_template.jinja").write_bytes(content)
    elif content is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        create_chat_template(tmp_path)


class Typed(io.StringIO):
    """Standard input with a person at it, or not."""

    def __init__(self, text: str, terminal: bool):
        super().__init__(text)
        self.isatty = lambda: terminal  # type: ignore[method-assign]


def converse(folder, monkeypatch, capsys, lines: str, *more: str, terminal: bool = False) -> tuple[int, str, list[str]]:
    monkeypatch.setattr(sys, "stdin", Typed(lines, terminal))
    code = main(["generate", "--chat", "--model", str(folder), "--tokens", "5", "--no-stop", *more])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line]


def test_each_line_of_standard_input_is_a_turn(folder, chat, monkeypatch, capsys):
    typed = "\ufeffthe fox\r\n\r\nand the hen\r\n"
    code, out, lines = converse(folder, monkeypatch, capsys, typed, "--dtype", "float32")
    expected = [reply(chat, text, 5) for text in ("the fox", "and the hen")]
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))
    assert len(lines) == 2 and f"prefill of {chat.unread} tokens" in lines[1]
    code, out, _ = converse(folder, monkeypatch, capsys, "and the hen\n", "the fox", "--dtype", "float32")
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected)), "the prompt is the first turn"


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_a_reply_at_a_terminal_and_else_everything(folder, monkeypatch, capsys, terminal):
    real, calls = NeoXModel.forward, []

    def interrupted(self, *given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *given, **named)

    monkeypatch.setattr(NeoXModel, "forward", interrupted)
    code, _, lines = converse(folder, monkeypatch, capsys, "the fox\nthe hen\n", terminal=terminal)
    assert (code, len(lines)) == ((0, 2) if terminal else (130, 1))
    assert "2 new tokens" in lines[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [(["-"], "leave out the -"), (["--model", "{shipped}"], "no chat template"), (["--stop", ""], "stop_strings")],
)
def test_a_chat_that_cant_begin_says_why_in_one_line(folder, monkeypatch, capsys, more, said):
    more = [each.format(shipped=SHIPPED_MODEL) for each in more]
    code, out, lines = converse(folder, monkeypatch, capsys, "the fox\n", *more)
    assert (code, out, len(lines)) == (2, "", 1) and said in lines[0]
