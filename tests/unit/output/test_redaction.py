"""Tokens and passwords are not repeated; ordinary text is."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from qingtune.cli import main
from qingtune.output.console import guarded_output
from qingtune.output.redaction import find_secret, find_token, redact, redact_values


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


LETTERS = "aB3" * 20
# Made up, and put together here, so that no scanner takes this file for a leak.
TOKENS = [
    "hf_" + LETTERS[:34], "ms-" + "0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f", "sk-" + LETTERS[:48],
    "sk-ant-api03-" + LETTERS,
    "sk-proj-" + LETTERS[:20] + "_-" + LETTERS[:20], "gsk_" + LETTERS[:40], "ghp_" + LETTERS[:36],
    "gho_" + LETTERS[:36],
    "github_pat_" + LETTERS[:22] + "_" + LETTERS[:30], "glpat-" + LETTERS[:20], "AKIA" + "IOSFODNN7EXAMPLE",
    "LTAI" + LETTERS[:20], "AIza" + LETTERS[:35], "GOCSPX-" + LETTERS[:28], "ya29." + LETTERS,
    "xoxb-1234567890-" + LETTERS,
    "sk_" + "live_" + LETTERS[:24], "rk_" + "test_" + LETTERS[:24], "whsec_" + LETTERS[:32], "npm_" + LETTERS[:36],
    "dckr_pat_" + LETTERS[:27], "eyJ" + LETTERS[:20] + ".eyJ" + LETTERS[:30] + "." + LETTERS[:43],
    "SG." + LETTERS[:22] + "." + LETTERS[:43], "123456789:AA" + LETTERS[:33],
    "-----BEGIN PRIVATE KEY-----\nMIIE" + LETTERS + "\n" + LETTERS + "==\n-----END PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----\\nb3Bl" + LETTERS + "\\n-----END OPENSSH PRIVATE KEY-----\\n",
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n" + LETTERS,
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
def test_every_known_kind_of_token_is_found(token: str) -> None:
    for text in (token, f'{{"a": "{token}"}}', f"（{token}）", f"x={token}&y"):
        assert find_token(text)
        assert LETTERS[:12] not in redact(text)
        assert "EXAMPLE" not in redact(text)
    assert list(redact_values({token: [token]})) == [redact(token)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("password: hunter2!", "password: ***"),
        ('"api_key": "0123abcdef"', '"api_key": "***"'),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "AWS_SECRET_ACCESS_KEY=***"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "aws_secret_access_key = ***"),
        ('"private_key_id": "0123abcdef"', '"private_key_id": "***"'),
        ("https://hooks.slack.com/services/T0A/B0B/xyz", "https://hooks.slack.com/services/***"),
        ("AccountKey=" + LETTERS[:44], "AccountKey=***"),
    ],
)
def test_what_a_name_calls_a_secret_is_one(text: str, shown: str) -> None:
    assert find_secret(text)
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        'password: str', '"password": {"type": "string"}', "api_key: Optional[str]", '"password": 151234,',
        "api_key=None",
        "Enter the password: ", "sk-learn-experiments-of-2024", "hf_transformers", "a key: value", "the eos_token: <s>",
        "AKIAfoo", "eyJust.eyJoin.us", "-----BEGIN CERTIFICATE-----", "ms-marco-MiniLM-L-6-v2",
    ],
)  # fmt: skip
def test_what_only_resembles_a_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_hostile_texts_are_looked_at_in_no_time() -> None:
    for text in (
        "sk-" + "a" * 200_000,
        "password" * 50_000,
        "eyJ" + "a." * 100_000,
        "?" + "a" * 200_000,
        "://" * 100_000,
    ):
        redact(text)  # a quadratic pattern would take minutes


@pytest.mark.parametrize(
    "name",
    [
        "OPENAI_KEY", "GITHUB_PAT", "MYSQL_PWD", "DB_PASS", "GPG_PASSPHRASE", "REGISTRY_AUTH", "HF_TOKEN", "DB_PASS2",
        "AWS_ACCESS_KEY_ID", "APIKEY", "MY_APIKEY", "DBPASSWORD", "SOME_SECRET", "GOOGLE_CREDENTIALS", "WANDB_API_KEY",
    ],
)  # fmt: skip
def test_variables_that_hold_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "geheim-7-geheim")
    assert redact("a geheim-7-geheim") == "a ***"


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM", "SSH_AUTH_SOCK", "PWD", "OLDPWD", "KEYBOARD_LAYOUT", "XAUTHORITY", "GIT_ASKPASS",
        "GOOGLE_APPLICATION_CREDENTIALS_FILE", "PASSWORD_STORE_DIR", "PATH", "COMPASS", "MONKEY", "AUTH_METHOD",
    ],
)  # fmt: skip
def test_variables_that_hold_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "harmlos-7-harmlos")
    assert redact("a harmlos-7-harmlos") == "a harmlos-7-harmlos"


@pytest.mark.parametrize("word", ["instruction", "postgres", "Password", "swordfish"])
def test_a_single_word_is_no_secret_to_be_found(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", word)
    assert redact_values({word: f"the {word}"}) == {word: f"the {word}"}


def test_keys_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "geheim-1-geheim")
    monkeypatch.setenv("B_TOKEN", "geheim-2-geheim")
    assert redact_values({"geheim-1-geheim": 1, "geheim-2-geheim": 2, 3: 4}) == {"***": 1, "******": 2, 3: 4}


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

    monkeypatch.setattr("qingtune.commands.check.check", fail)
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
