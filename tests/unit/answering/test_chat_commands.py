"""The commands of a chat do what /help says, say what they did, and change nothing when they cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from chat_twin import make_state
from conftest import THINKING_TEMPLATE, write_jsonl

from qingtune.answering.chat.commands import COMMANDS, ChatState, find_command, settable
from qingtune.answering.chat.session import ChatSession
from qingtune.answering.generate import Decoding
from qingtune.config.commands import InferConfig
from qingtune.config.load import check_flags
from qingtune.data.format import Message, read_conversations
from qingtune.data.tokenize import tokenize
from qingtune.errors import UserError

TURNS = [Message("user", "Bread?"), Message("assistant", "Seven.\n早上七点。"), Message("user", "你好 🥖")]
TURNS.append(Message("assistant", "<think>\nHm.\n</think>\n\nHello."))


@pytest.fixture(scope="module")
def session() -> ChatSession:
    return make_state(THINKING_TEMPLATE).session


@pytest.fixture
def state(session: ChatSession) -> ChatState:
    return ChatState(dataclasses.replace(session, turns=list(TURNS)), Decoding())


def obey(state: ChatState, line: str) -> str:
    command, text = find_command(line)
    assert command.obey is not None
    return command.obey(state, text)


def refused(state: ChatState, line: str) -> str:
    """The message with which a command is refused; nothing has changed."""
    before = dataclasses.replace(state.session, turns=list(state.session.turns)), state.decoding, state.options
    with pytest.raises(UserError) as caught:
        obey(state, line)
    assert (state.session, state.decoding, state.options) == before
    return str(caught.value)


def test_help_lists_every_command_and_fits_80_columns(state: ChatState) -> None:
    lines = obey(state, "/help").splitlines()
    assert max(map(len, lines)) <= 80
    for command, line in zip(COMMANDS, lines, strict=False):
        assert line.startswith(f"{command.name} {command.argument}".rstrip() + " ")
    assert obey(state, "/?") == obey(state, "/help")
    assert find_command("/quit") == find_command("/exit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav a.jsonl", "/sav is not a command. Did you mean /save?"),
        ("/ret", "/ret is not a command. Did you mean /retry?"),
        ("/hlep", "/hlep is not a command. Did you mean /help?"),
        ("/usr/bin/env", "/usr/bin/env is not a command. /help lists them; // sends a message that begins with /."),
        ("/", "/ is not a command. /help lists them; // sends a message that begins with /."),
        ("/undo 2", "/undo takes no argument"),
        ("/exit now", "/exit takes no argument"),
        ("/save", "/save needs a file name."),
        ("/load ", "/load needs a file name."),
    ],
)
def test_lines_that_are_no_commands(state: ChatState, line: str, message: str) -> None:
    assert refused(state, line) == message


def test_system_message(state: ChatState) -> None:
    assert obey(state, "/system") == "[system: none (the template's default)]"
    assert obey(state, "/system Be brief.\nBe kind.").startswith("[system: Be brief.\nBe kind.]")
    assert state.session.messages() == [Message("system", "Be brief.\nBe kind."), *TURNS]
    obey(state, "/system default")
    assert state.session.messages() == TURNS
    obey(state, "/clear")
    assert obey(state, "/system 你是店主。") == "[system: 你是店主。]"


def test_show_lists_the_turns_with_the_thinking_folded(state: ChatState) -> None:
    assert obey(state, "/show") == "> Bread?\nSeven.\n早上七点。\n\n> 你好 🥖\n[thinking: 3 characters]\nHello."
    obey(state, "/set thinking show")
    assert obey(state, "/show").endswith("<think>\nHm.\n</think>\n\nHello.")
    obey(state, "/clear")
    obey(state, "/system Be brief.")
    assert obey(state, "/show") == "[system] Be brief."


# --- /set ------------------------------------------------------------------------------------------------------------

DEFAULTS = {**{name: str(value) for name, value in dataclasses.asdict(Decoding()).items()}}
DEFAULTS |= {"stats": "off", "thinking": "fold", "history": "on"}


def test_set_lists_all_it_knows(state: ChatState) -> None:
    lines = obey(state, "/set").splitlines()
    assert {line.split()[0]: line.split()[1] for line in lines} == DEFAULTS
    assert max(map(len, lines)) <= 80
    assert obey(state, "/set stats") == "stats  off"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.2", "temperature", 0.2),
        ("/set temperature=0", "temperature", 0.0),
        ("/set top_p = 1", "top_p", 1.0),
        ("/set  top_k  5", "top_k", 5),
        ("/set max_new_tokens 9", "max_new_tokens", 9),
        ("/set repetition_penalty 1.1", "repetition_penalty", 1.1),
        ("/set seed 3", "seed", 3),
    ],
)
def test_set_changes_the_decoding(state: ChatState, line: str, name: str, value: float) -> None:
    state.session.asked = 4
    assert obey(state, line) == f"{name}  {value}"
    assert state.decoding == dataclasses.replace(Decoding(), **{name: value})
    assert state.session.asked == (0 if name == "seed" else 4)  # the same seed gives the same answers again


@pytest.mark.parametrize("name", settable())
@pytest.mark.parametrize("value", ["hot", "-1", "1e400", "nan", "2.5e9", "true", "3", "0x1"])
def test_set_checks_as_the_flags_do(state: ChatState, name: str, value: str) -> None:
    line = f"/set {name} {value}"
    if name not in InferConfig.model_fields:
        assert f'"{name}" is "{value}": should be' in refused(state, line)
        return
    wanted: Any = None
    with contextlib.suppress(UserError):
        wanted = getattr(check_flags(InferConfig, {name: value}), name)
    if wanted is None:
        assert f'"{name}" is "{value}": ' in refused(state, line)
    else:
        obey(state, line)
        assert getattr(state.decoding, name) == wanted


def test_unknown_settings(state: ChatState) -> None:
    assert refused(state, "/set temprature 1") == '"temprature" is not a chat setting. Did you mean "temperature"?'
    assert refused(state, "/set base_model x").startswith('"base_model" is not a chat setting. It has max_new_tokens,')


# --- /save and /load -------------------------------------------------------------------------------------------------


def test_a_saved_chat_can_be_trained_on_and_goes_on_as_it_was(state: ChatState, tmp_path: Path) -> None:
    obey(state, "/system Be brief.")
    state.session.turns[1] = Message("assistant", "<think>\nWell.\n</think>\n\nSeven.")
    path = tmp_path / "my chats.jsonl"
    assert obey(state, f"/save {path.with_suffix('')}") == f"[added to {path}, with the thinking]"
    (conversation,) = read_conversations([str(path)], None, "raise").conversations
    assert list(conversation.messages) == state.session.messages()
    first, second = tokenize(state.session.template, [conversation], 500, "raise").samples
    shown = [state.session.template.tokenizer.decode(sample.token_ids) for sample in (first, second)]
    assert shown[0].endswith("assistant\n<think>\nWell.\n</think>\n\nSeven.<|im_end|>")
    assert "assistant\nSeven.<|im_end|>" in shown[1]
    assert shown[1].endswith("<think>\nHm.\n</think>\n\nHello.<|im_end|>")
    other = ChatState(dataclasses.replace(state.session, turns=[], system_prompt="Other."), Decoding())
    assert obey(other, f"/load {path}") == f"[4 turns of {path}:1; /show lists them]\n[system: Be brief.]"
    assert other.session == state.session


def test_save_adds_lines(state: ChatState, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    obey(state, f"/save {path}")  # though the line before it has no end
    obey(state, "/undo")
    obey(state, f"/save {path}")
    conversations = read_conversations([str(path)], None, "raise").conversations
    assert [len(conversation.messages) for conversation in conversations] == [2, 4, 2]
    assert obey(state, f"/load {path} 2") == f"[4 turns of {path}:2; /show lists them]"
    assert state.session.turns == TURNS
    assert obey(state, f"/load {path}") == f"[2 turns of {path}:3; /show lists them]"
    assert state.session.turns == TURNS[:2]


def test_save_leaves_other_files_alone(state: ChatState, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a"}])
    text = tmp_path / "thesis.txt"
    text.write_text("years of work")
    before = rows.read_bytes()
    assert 'its rows are of the form "instruction", and a file has one form' in refused(state, f"/save {rows}")
    assert "chats are saved as JSON lines. Use a file name that ends in .jsonl." in refused(state, f"/save {text}")
    assert "cannot be written: " in refused(state, f"/save {tmp_path / 'none' / 'x'}")
    assert refused(state, f"/save {tmp_path / 'x.jsonl.gz'}")
    assert (rows.read_bytes(), text.read_text()) == (before, "years of work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "thesis.txt"]


def test_save_adds_nothing_to_a_file_of_a_model(state: ChatState, tmp_path: Path) -> None:
    linked = tmp_path / "chats.jsonl"
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      \xff")
    linked.hardlink_to(tmp_path / "model.safetensors")
    before = linked.read_bytes()
    assert str(linked) in refused(state, f"/save {linked}")
    assert linked.read_bytes() == before


def test_a_full_disk_leaves_the_file_as_it_was(
    state: ChatState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chats.jsonl"
    obey(state, f"/save {path}")
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert refused(state, f"/save {path}") == f"{path}: cannot be written: No space left on device"
    assert path.read_bytes() == before


def test_nothing_is_saved_of_an_empty_chat(state: ChatState, tmp_path: Path) -> None:
    obey(state, "/clear")
    assert obey(state, f"/save {tmp_path / 'x.jsonl'}") == "[nothing to save]"
    assert list(tmp_path.iterdir()) == []


def test_load_takes_any_form_of_conversation(state: ChatState, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a", "system": "Be brief."}])
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(rows.read_bytes(), mtime=0))
    for path in (rows, packed):
        obey(state, "/clear")
        obey(state, f"/load {path}")
        assert state.session.messages() == [Message(*turn) for turn in [("system", "Be brief."), ("user", "q")]] + [
            Message("assistant", "a")
        ]


def test_load_tells_the_faults_of_a_file_with_their_lines(state: ChatState, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    unanswered = {"messages": good["messages"][:1]}
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps(good), "{", json.dumps(unanswered)]
    path.write_text("\n".join(lines))
    fault = f"{path}:3: no assistant turn, so there is nothing to train on. /load FILE LINE loads another one."
    assert refused(state, f"/load {path}") == fault
    assert f"{path}:2: not valid JSON" in refused(state, f"/load {path} 2")
    assert refused(state, f"/load {path} 9") == f"{path}: no conversation starts on line 9"
    note = obey(state, f"/load {path} 1")
    assert note.startswith(
        f"[2 turns of {path}:1; /show lists them]\n[rows that cannot be used: 2; the first: {path}:2: "
    )


def test_load_refuses_what_is_no_conversation(state: ChatState, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "Fresh bread."}])
    other = write_jsonl(tmp_path / "other.jsonl", [{"a": 1}])
    assert "there is no such file" in refused(state, f"/load {tmp_path / 'none'}")
    assert refused(state, f"/load {empty}") == f"{empty}: no conversation here"
    assert refused(state, f"/load {texts}") == f"{texts}:1: plain text, not a conversation"
    assert "match no known format" in refused(state, f"/load {other}")


def test_load_with_a_number_at_the_end_of_the_files_name(
    state: ChatState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    obey(state, "/save talk 2")
    assert [path.name for path in tmp_path.iterdir()] == ["talk 2.jsonl"]
    assert obey(state, "/load talk 2") == "[4 turns of talk 2.jsonl:1; /show lists them]"
