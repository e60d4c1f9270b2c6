"""Tokens and passwords are not repeated; ordinary text is."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from qingtune.cli import main
from qingtune.output import guarded_output
from qingtune.redaction import redact, redact_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:geheim@mirror.example/api", "https://***@mirror.example/api"),
        ("https://tok3n@host/x and http://a:b@c", "https://***@host/x and http://***@c"),
        ("GET /f?token=abc&x=1", "GET /f?token=***&x=1"),
        ("/f?a=1&X-Amz-Signature=0f9", "/f?a=1&X-Amz-Signature=***"),
        ("Authorization: Bearer eyJhbGciOi.J9", "Authorization: Bearer ***"),
        ("{'authorization': 'Bearer abc.def'}", "{'authorization': 'Bearer ***'}"),
        ("hf_abcdefghijklmnopqrst is bad", "*** is bad"),
        ("令牌hf_abcdefghijklmnopqrst无效", "令牌***无效"),
        ("key sk-proj-0123456789abcdef.", "key ***."),
        ("ghp_0123456789abcdefghij", "***"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "step 3/10  loss 2.0169  lr 1.00e-04", "name@example.com writes", "data/train.jsonl:118: \"output\" is empty",
        "https://hub.example/Qwen/Qwen2.5", "the keyword is token=", "task-force sk-lite", "店名：蓝门 https://x.cn/路",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment_are_hidden_wherever_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "zwölf-geheime-zeichen")
    monkeypatch.setenv("MY_PASSWORD", "zwölf-geheime")  # a part of the other
    monkeypatch.setenv("SHORT_TOKEN", "false")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "not-a-secret")
    monkeypatch.setenv("GOOGLE_CREDENTIALS_FILE", "/home/me/key.json")
    text = "a zwölf-geheime-zeichen b zwölf-geheime false not-a-secret /home/me/key.json"
    assert redact(text) == "a *** b *** false not-a-secret /home/me/key.json"
    assert redact_values({"a": ["x zwölf-geheime", 1, None], "b": True}) == {"a": ["x ***", 1, None], "b": True}


def test_all_output_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        with guarded_output():
            print("a planted-secret")
            sys.stderr.writelines(["b planted-secret\n"])
            assert sys.stdout.isatty() is False
        print("after")
    assert out.getvalue() == "a ***\nafter\n"
    assert err.getvalue() == "b ***\n"


def test_an_unforeseen_error_shows_its_traceback_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret")

    def fail(*_: object) -> int:
        raise RuntimeError("server said: planted-secret")

    monkeypatch.setattr("qingtune.check.check", fail)
    err = io.StringIO()
    with redirect_stderr(err):
        assert main(["check", "--data", "none.jsonl"]) == 1
    assert "Traceback" in err.getvalue()
    assert "RuntimeError: server said: ***" in err.getvalue()


def test_settings_that_are_refused_do_not_repeat_a_token() -> None:
    err = io.StringIO()
    with redirect_stderr(err):
        assert main(["train", "--hub_token", "hf_abcdefghijklmnopqrst", "--lora_r", "sk-0123456789abcdef"]) == 2
    assert "hub_token" in err.getvalue()
    assert "hf_" not in err.getvalue()
    assert "sk-" not in err.getvalue()
