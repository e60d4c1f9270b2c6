"""Nothing is uploaded unasked, and nothing at all that should not be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import pytest

from qingtune.commands.push import push
from qingtune.config.commands import PushConfig
from qingtune.errors import UserError

TOKEN = "hf_" + "a1B2c3D4e5" * 3


class FakeHub:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        self.asked.append(("create", repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        self.asked.append(("upload", repo_id, folder_path, allow_patterns))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as a run leaves it."""
    files = {
        "adapter_config.json": '{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}',
        "adapter_model.safetensors": "weights", "tokenizer.json": "{}", "chat_template.jinja": "</think>",
        "qingtune.json": '{"base_model": "Qwen/Qwen2.5-0.5B-Instruct"}', "README.md": "# Mine\n/v1/chat",
        "train_config.json": '{"output_dir": "/home/someone"}', "metrics.jsonl": "{}", "loss_curve.png": "x",
        "report.html": "x", "run_facts.json": "{}", "evaluation.json": "{}",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "trackers").mkdir()
    return tmp_path


def publish(folder: Path, hub: FakeHub, **settings: Any) -> None:
    with mock.patch.object(huggingface_hub, "HfApi", return_value=hub):
        push(PushConfig(folder=str(folder), repo="me/mine", **settings))


PUBLISHED = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "qingtune.json",
    "tokenizer.json",
]  # fmt: skip


def test_without_confirmation_only_a_list_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = FakeHub()
    publish(folder, hub)
    assert hub.asked == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder} -> Hugging Face, me/mine (public if the repository is new):"
    assert [line.split()[0] for line in lines[1:-3]] == PUBLISHED
    assert "adapter_model.safetensors  7 bytes" in lines[3]
    assert lines[-3].startswith("6 files, ")
    assert lines[-2] == (
        "Left out: evaluation.json, loss_curve.png, metrics.jsonl, report.html, run_facts.json, trackers, "
        "train_config.json."
    )
    assert lines[-1] == "Nothing was uploaded. To upload, run the same command with --confirm."


@pytest.mark.parametrize("private", [True, False])
def test_confirmed_it_is_uploaded_and_nothing_else(
    folder: Path, private: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = FakeHub()
    publish(folder, hub, confirm=True, private=private)
    assert hub.asked == [("create", "me/mine", private, True), ("upload", "me/mine", str(folder), PUBLISHED)]
    assert capsys.readouterr().out.endswith("Published: https://hub/me/mine\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optimizer.pt", "x", "not part of a model"),
        ("adapter_model.bin", "x", "not part of a model"),
        (".env", "x", "not part of a model"),
        ("README.md", f"use {TOKEN}", "a token or a password"),
        (
            "adapter_config.json",
            '{"base_model_name_or_path": "/srv/models/qwen"}',
            "path of this machine, /srv/models/qwen",
        ),
        ("README.md", "in /home/someone/models", "path of this machine, /home/someone"),
        ("README.md", r"in C:\Users\someone", "path of this machine, C:"),
        ("README.md", "in /data/me/models", "path of this machine, /data/me"),
        ("README.md", "see file:///mnt/x and C:/Users/me", "path of this machine, file:///mnt/x"),
        ("README.md", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("README.md", "AKIA" + "IOSFODNN7EXAMPLE", "a key of Amazon"),
        ("README.md", "AIza" + "aB3" * 11 + "xy", "a key of Google"),
        ("README.md", "ms-" + "0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f", "a token of ModelScope"),
        ("README.md", "eyJ" + "aB3" * 5 + ".eyJ" + "aB3" * 5 + ".x", "a JSON web token"),
        ("README.md", "password: hunter2!", "a password or key"),
        ("tokenizer.json", " " * (3 << 20) + TOKEN, "a token of Hugging Face"),
        ("tokenizer.json", " " * ((1 << 20) - 9) + TOKEN, "a token of Hugging Face"),
        ("adapter_model.safetensors", '{"__metadata__": {"by": "' + TOKEN + '"}}', "a token of Hugging Face"),
        ("merges.txt", TOKEN, "a token of Hugging Face"),
    ],
)
def test_what_should_stay_here_is_refused(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    hub = FakeHub()
    with pytest.raises(UserError, match=message) as caught:
        publish(folder, hub, confirm=True)
    assert hub.asked == []
    assert TOKEN not in str(caught.value)


def test_words_of_a_tokenizer_are_no_leak(folder: Path) -> None:
    words = ["/usr/bin", "/home/x", "C:\\", "password", '"password":', "api_key=", "hf_", "sk-", "eyJ", "AKIA", "://"]
    vocabulary = {word: number for number, word in enumerate(words, 151_000)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    hub = FakeHub()
    publish(folder, hub, confirm=True)
    assert "tokenizer.json" in hub.asked[-1][-1]


def test_checkpoints_and_links_are_refused_by_name(folder: Path) -> None:
    (folder / "checkpoint-4").mkdir()
    (folder / "config.json").symlink_to(folder / "tokenizer.json")
    with pytest.raises(UserError, match="optimizer's state") as caught:
        publish(folder, FakeHub())
    assert len(str(caught.value).splitlines()) == 2
    assert "config.json: is not part" in str(caught.value)


def test_a_record_with_paths_is_left_out_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "qingtune.json").write_text('{"base_model": "/srv/models/qwen"}')
    publish(folder, FakeHub())
    assert "qingtune.json, which contains a path of this machine, /srv/models/qwen" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["folder", "weights"])
def test_what_is_no_model_is_refused(folder: Path, missing: str) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no such folder" if missing == "folder" else "no model or adapter"):
        publish(folder / "x" if missing == "folder" else folder, FakeHub())


def test_a_folder_without_any_model_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("README.md", "data.md", "faults.md"):
        (tmp_path / name).write_text("# Documentation")
    with pytest.raises(UserError) as caught:
        publish(tmp_path, FakeHub())
    fix = "Pass the --output_dir of train, merge or export as --folder."
    assert str(caught.value) == f"{tmp_path}: no model or adapter here. {fix}"


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "me/", "../x", "me/mi ne", "https://huggingface.co/me/mine"])
def test_the_repository_is_owner_and_name(repo: str) -> None:
    with pytest.raises(ValueError, match="repo"):
        PushConfig(folder="x", repo=repo)


def test_hugging_face_is_asked_as_its_library_wants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []
    api = huggingface_hub.HfApi

    def create_repo(_: Any, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        calls.append({"repo_id": repo_id, "private": private, "exist_ok": exist_ok})
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(
        _: Any, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> None:
        calls.append({"repo_id": repo_id, "files": allow_patterns})

    monkeypatch.setattr(api, "create_repo", create_repo)
    monkeypatch.setattr(api, "upload_folder", upload_folder)
    push(PushConfig(folder=str(folder), repo="me/mine", confirm=True, private=True))
    assert calls == [
        {"repo_id": "me/mine", "private": True, "exist_ok": True}, {"repo_id": "me/mine", "files": PUBLISHED}
    ]  # fmt: skip
    assert capsys.readouterr().out.endswith("Published: https://huggingface.co/me/mine\n")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(f"401: {TOKEN} is not valid")

    monkeypatch.setattr(api, "create_repo", refuse)
    with pytest.raises(UserError, match="hf auth login") as caught:
        push(PushConfig(folder=str(folder), repo="me/mine", confirm=True))
    assert TOKEN not in str(caught.value)


def test_modelscope_is_asked_as_its_library_wants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class HubApi:
        endpoint = "https://modelscope.cn"

        def create_repo(self, repo_id: str, **settings: Any) -> None:
            calls.append((repo_id, settings))

        def upload_folder(self, repo_id: str, folder_path: str, **settings: Any) -> None:
            calls.append((repo_id, {"folder_path": folder_path, **settings}))

    config = PushConfig(folder=str(folder), repo="me/mine", to="modelscope", confirm=True, private=True)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        push(config)
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", SimpleNamespace(HubApi=HubApi))  # pyright: ignore[reportArgumentType]
    push(config)
    assert json.dumps([repo for repo, _ in calls]) == '["me/mine", "me/mine"]'
    assert calls[0][1] == {"repo_type": "model", "visibility": "private", "exist_ok": True}
    assert calls[1][1]["allow_patterns"] == PUBLISHED
    assert capsys.readouterr().out.endswith("Published: https://modelscope.cn/models/me/mine\n")
