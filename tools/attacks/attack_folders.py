"""Attacks by folders: links and FIFOs where results go, results on top of others, pages, what would be published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attack_case import (
    EVALUATE,
    EXPORT,
    INFER,
    INFER_FILE,
    MERGE,
    PUSH,
    REPORT,
    TRAIN,
    Argv,
    Case,
    Ended,
    Expected,
    Place,
    Spoil,
    nothing,
    with_word,
)
from attack_fixtures import COMMANDS
from attack_values import BROKEN_JSON, ESCAPES, both, fifo, linked, put, replaced

GROUP = "folders, links and pages"
RUN = ("model", "run", "rows.jsonl")
RESUME = with_word(COMMANDS[0], "run", "stopped")
EVALUATE_RUN: Argv = (*EVALUATE[: EVALUATE.index("--output_dir")], "--output_dir", "run", "--max_new_tokens", "2")


def folder_cases() -> Iterator[Case]:
    """All of them."""
    yield from _links()
    yield from _results_on_others()
    yield from _pages()
    yield from _published()
    yield from _names()


# --- Links and FIFOs -------------------------------------------------------------------------------------------------

_TARGETS: dict[Argv, tuple[str, tuple[str, ...]]] = {
    REPORT: ("run", (".report.html.tmp", "report.html", "report.html.tmp", ".qingtune.lock", "loss_curve.png")),
    RESUME: (
        "stopped",
        (
            "loss_curve.png",
            "eval_samples.jsonl",
            "metrics.jsonl",
            ".metrics.jsonl.tmp",
            "train_config.json",
            "checkpoint-4",
            ".checkpoint-4",
            "trackers",
            "adapter_model.safetensors",
            "adapter_config.json",
            ".qingtune.json.tmp",
            "README.md",
            "latest_checkpoint.json",
            ".latest_checkpoint.json.tmp",
            "tokenizer.json",
            "run_facts.json",
            "report.html",
        ),
    ),
    EVALUATE_RUN: (
        "run",
        (
            ".evaluation.json.tmp",
            "evaluation.json",
            ".evaluation.md.tmp",
            "evaluation.md",
            "predictions_after.jsonl",
            ".predictions_after.jsonl.unfinished.json.tmp",
            "predictions_after.jsonl.unfinished",
            ".predictions_after.jsonl.unfinished",
            "predictions_before.jsonl",
            ".qingtune.lock",
        ),
    ),
}


def _links() -> Iterator[Case]:
    number = 0
    for argv, (folder, names) in _TARGETS.items():
        for name in names:
            kinds = {"link": "{outside}/site/x.pth", "link-new": "{outside}/new.txt", "link-folder": "{outside}"}
            spoils: dict[str, Spoil] = {kind: linked(f"{folder}/{name}", target) for kind, target in kinds.items()}
            spoils["fifo"] = fifo(f"{folder}/{name}")
            spoils["hard-link"] = put(
                f"{folder}/{name}", lambda path, place: os.link(place.outside / "precious.txt", path)
            )
            for kind in [*spoils][number % 2 :: 2]:
                yield Case(
                    GROUP, f"{argv[0]}-{name}-{kind}", spoils[kind], (argv,), "either", (*RUN, "stopped"),
                    writes=(folder,),
                )  # fmt: skip
            number += 1
    whole = linked("out", "{outside}")
    for argv in (TRAIN, MERGE, EXPORT):
        for flag in ((), ("--overwrite_output_dir", "true")):
            words = (*argv, *flag)
            yield Case(GROUP, f"{argv[0]}-out-is-link{'-over' * bool(flag)}", whole, (words,), "either",
                       ("model", "adapter", "rows.jsonl"))  # fmt: skip
    for kind, target in {"link": "{outside}/precious.txt", "dangling": "{outside}/new.txt"}.items():
        for flag in ((), ("--overwrite_output_file", "true")):
            yield Case(GROUP, f"output-file-{kind}{'-over' * bool(flag)}", linked("out.jsonl", target),
                       ((*INFER_FILE, *flag),), "either")  # fmt: skip
    for name in (
        ".out.jsonl.tmp",
        "out.jsonl.unfinished",
        ".out.jsonl.unfinished.json.tmp",
        "out.jsonl.unfinished.json",
    ):
        yield Case(GROUP, f"output-file-next-to-{name}", linked(name, "{outside}/site/x.pth"), (INFER_FILE,), "either",
                   writes=("out.jsonl", name))  # fmt: skip


# --- Results on top of other things ----------------------------------------------------------------------------------

BASE = ("model", "adapter", "rows.jsonl")
_EVALUATION = ("evaluation.json", "evaluation.md", "predictions_after.jsonl")


def _evaluation_in(folder: str) -> tuple[str, ...]:
    """What an evaluation may write: its files are meant to be next to a run's, with other names."""
    return tuple(os.path.join(folder, name) for name in _EVALUATION)


def _expected(argv: Argv) -> Expected:
    return "either" if argv is EVALUATE else "refused"


_OVER = ("--overwrite_output_dir", "true")


def _project(place: Place) -> None:
    """A user's own folder that resembles a model."""
    place.write("out/config.json", '{"model_type": "mine"}')
    place.write("out/.git/HEAD", "ref: refs/heads/main\n")
    place.write("out/src/main.py", "print('mine')\n")
    place.write("out/thesis.tex", "mine")


def _earlier(name: str, to: str = "out") -> Spoil:
    """An earlier result with the user's own files in it."""

    def spoil(place: Place) -> None:
        shutil.copytree(place / name, place / to)
        place.write(f"{to}/notes.txt", "mine")
        place.write(f"{to}/data/rows.csv", "mine")

    return spoil


def _kept(*names: str) -> Callable[[Place, Sequence[Ended]], str | None]:
    def check(place: Place, ended: Sequence[Ended]) -> str | None:
        gone = [name for name in names if not (place / name).exists()]
        return f"the user's own files are gone: {', '.join(gone)}" if gone else None

    return check


def _results_on_others() -> Iterator[Case]:
    mine = _kept("out/.git/HEAD", "out/src/main.py", "out/thesis.tex", "out/config.json")
    for argv in (TRAIN, MERGE, EXPORT, EVALUATE):
        for flag in ((), _OVER):
            name, expect = f"{argv[0]}-over-project{'-over' * bool(flag)}", _expected(argv)
            yield Case(GROUP, name, _project, ((*argv, *flag),), expect, BASE, check=mine, writes=_evaluation_in("out"))
    for argv, earlier in ((MERGE, "merged"), (EXPORT, "gguf"), (TRAIN, "run"), (EVALUATE, "evaluation")):
        for flag in ((), _OVER):
            yield Case(
                GROUP,
                f"{argv[0]}-with-own-files{'-over' * bool(flag)}",
                _earlier(earlier),
                ((*argv, *flag),),
                "either",
                ("model", "adapter", "rows.jsonl", earlier),
                check=_kept("out/notes.txt", "out/data/rows.csv"),
            )
        yield Case(GROUP, f"control-{argv[0]}-again", nothing, (argv, (*argv, *_OVER)), "fine", BASE)
    for argv in (TRAIN, MERGE, EXPORT, EVALUATE):
        for target in ("model", ".", "adapter", "./model/../model"):
            words = [*argv, *_OVER]
            words[words.index("--output_dir") + 1] = target
            folder = os.path.normpath(target)
            yield Case(GROUP, f"{argv[0]}-into-{target.replace('/', '_')}", nothing, (tuple(words),),
                       _expected(argv), BASE, writes=_evaluation_in("" if folder == "." else folder))  # fmt: skip
    empty = both(lambda place: (place / "empty").mkdir(), linked("out", "empty"))
    for argv in (MERGE, EXPORT):
        yield Case(GROUP, f"{argv[0]}-into-link-to-empty", empty, (argv,), "either", ("model", "adapter", "rows.jsonl"),
                   writes=("out", "empty"), check=_result_or_refused)  # fmt: skip
    over = (*INFER_FILE, "--overwrite_output_file", "true")
    ways: dict[str, tuple[str, Spoil]] = {
        "name": ("rows.jsonl", nothing), "dot": ("./rows.jsonl", nothing), "absolute": ("{work}/rows.jsonl", nothing),
        "link": ("l.jsonl", linked("l.jsonl", "rows.jsonl")), "up": ("model/../rows.jsonl", nothing),
        "hard-link": ("h.jsonl", lambda place: os.link(place / "rows.jsonl", place / "h.jsonl")),
        "weights": ("model/model.safetensors", nothing), "config": ("model/config.json", nothing),
    }  # fmt: skip
    for way, (name, spoil) in ways.items():
        words = with_word(over, "out.jsonl", name)
        yield Case(GROUP, f"output-is-input-{way}", spoil, (words,), "refused", writes=("nowhere",))


def _result_or_refused(place: Place, ended: Sequence[Ended]) -> str | None:
    made = any((place / "empty").iterdir())
    if ended[0].code == 0:
        return None if made else "exit code 0, but no result"
    return "refused after the work was done" if b"erge" in ended[0].err and "loaded" in ended[0].shown else None


# --- Pages -----------------------------------------------------------------------------------------------------------

_SCRIPTS = ("<script>alert(1)</script>", "</script><script>alert(1)</script>", "\"><img src=x onerror=alert(1)>",
            "<!--<script>alert(1)//", "javascript:alert(1)", "{{ alert }}`${alert(1)}`", ESCAPES)  # fmt: skip
_PAGE_FILES = ("train_config.json", "metrics.jsonl", "eval_samples.jsonl", "run_facts.json", "qingtune.json")


def _pages() -> Iterator[Case]:
    for number, script in enumerate(_SCRIPTS):
        for name in _PAGE_FILES[number % 2 :: 2] if number else _PAGE_FILES:
            yield Case(
                GROUP,
                f"page-{name}-script-{number}",
                _everywhere(f"run/{name}", script),
                (REPORT,),
                "either",
                RUN,
                writes=("run/report.html",),
                check=no_script,
                tty=script is ESCAPES,
            )
    for number, (way, how) in enumerate(BROKEN_JSON.items()):
        if way == "gigabyte-of-spaces":
            continue
        name = f"run/{_PAGE_FILES[number % len(_PAGE_FILES)]}"
        yield Case(
            GROUP, f"page-{name[4:]}-{way}", replaced(name, how), (REPORT,), "either", RUN, writes=("run/report.html",)
        )
    values = (5, "x", None, [], {"a": 1}, float("nan"), -1, 10**30)
    for number, value in enumerate(values):
        for name in _PAGE_FILES[number % 3 :: 3]:
            yield Case(GROUP, f"page-{name}-all-{value}", _all_values(f"run/{name}", value), (REPORT,), "either", RUN,
                       writes=("run/report.html",))  # fmt: skip
    for name in _PAGE_FILES:
        yield Case(
            GROUP, f"page-{name}-fifo", fifo(f"run/{name}"), (REPORT,), "either", RUN, writes=("run/report.html",)
        )
    yield Case(GROUP, "page-long", _long_metrics, (REPORT,), "either", RUN, writes=("run/report.html",))
    yield Case(GROUP, "control-page", nothing, (REPORT,), "fine", RUN, writes=("run/report.html",))


def _lines(place: Place, name: str) -> list[Any]:
    return [json.loads(line) for line in (place / name).read_text(encoding="utf-8").splitlines()]


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _changed(inner, change) for key, inner in value.items()}
    return [_changed(inner, change) for inner in value] if isinstance(value, list) else change(value)


def _rewritten(name: str, change: Callable[[Any], Any]) -> Spoil:
    def spoil(place: Place) -> None:
        if name.endswith(".jsonl"):
            place.write_rows(name, [change(row) for row in _lines(place, name)])
        else:
            place.write_json(name, change(place.read_json(name)))

    return spoil


def _everywhere(name: str, script: str) -> Spoil:
    def change(content: Any) -> Any:
        texts = _changed(content, lambda value: script if isinstance(value, str) else value)
        return {**texts, script: script} if isinstance(texts, dict) else texts

    return _rewritten(name, change)


def _all_values(name: str, value: Any) -> Spoil:
    return _rewritten(name, lambda content: _changed(content, lambda _: value))


def _long_metrics(place: Place) -> None:
    first = _lines(place, "run/metrics.jsonl")[0]
    place.write_rows("run/metrics.jsonl", [{**first, "step": number} for number in range(30_000)])


def no_script(place: Place, ended: Sequence[Ended]) -> str | None:
    text = (place / "run/report.html").read_text(encoding="utf-8")
    found = [bad for bad in ("<script>alert(", "<img src=x onerror", 'href="javascript:') if bad in text]
    return f"the page holds {found[0]!a} of a stranger's text" if found else None


# --- What would be published -----------------------------------------------------------------------------------------

_SECRETS = {
    "private-key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq3xKzTQyW\n-----END RSA PRIVATE KEY-----",
    "openssh-key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n-----END OPENSSH PRIVATE KEY-----",
    "aws": "AKIAIOSFODNN7EXAMPLF",
    "aws-secret": "aws_secret_access_key = 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",
    "google": "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY",
    "modelscope": "ms-3f2b8c1e-9a4d-4c7b-8e1f-2d6a5b9c0e7f",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "password": "password: hunter2-correct-horse",
    "hf": "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",
    "openai": "sk-proj-QwErTyUiOpAsDfGhJkLzXcVbNm123456",
    "github": "ghp_QwErTyUiOpAsDfGhJkLzXcVbNm1234567890",
    "path-data": "/data/me/models/qwen",
    "path-home": "/home/me/models/qwen",
    "path-mnt": "/mnt/nas/me/qwen",
    "url": "https://me:hunter2hunter2@host.example/repo",
    "slack": "xoxb-123456789012-123456789012-QwErTyUiOpAsDfGhJkLzXcVb",
}


def _published() -> Iterator[Case]:
    files = ("README.md", "tokenizer_config.json", "tokenizer.json", "adapter_config.json", "qingtune.json")
    push_run = with_word(PUSH, "adapter", "published")
    number = 0
    for name, secret in _SECRETS.items():
        for file in (files[0], files[1 + number % 4]):
            number += 1
            expect: Expected = "either" if file in ("qingtune.json",) else "refused"
            yield Case(GROUP, f"push-{name}-{file}", _with_secret(file, secret), (push_run,), expect,
                       ("adapter", "model"), check=_not_offered(file))  # fmt: skip
    yield Case(
        GROUP, "control-push", _with_secret("README.md", "A model of mine."), (push_run,), "fine", ("adapter", "model")
    )
    for name, spoil in {
        "link": linked("adapter/LICENSE", "{outside}/precious.txt"),
        "fifo": fifo("adapter/LICENSE"),
    }.items():
        yield Case(GROUP, f"push-{name}", spoil, (PUSH,), "refused", ("adapter",))


def _with_secret(file: str, secret: str) -> Spoil:
    """The adapter with a tokenizer, as a run leaves it, and a secret in one of its files."""

    def spoil(place: Place) -> None:
        shutil.copytree(place / "adapter", place / "published")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(place / "model" / name, place / "published" / name)
        place.edit_json("published/adapter_config.json", {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"})
        place.edit_json("published/qingtune.json", {"base_model": "Qwen/Qwen2.5-0.5B", "settings": {}})
        name = f"published/{file}"
        if file.endswith(".md"):
            place.write(name, f"# An adapter\n\n{secret}\n")
        elif file == "tokenizer.json":
            content = place.read_json(name)
            content["added_tokens"].append({"id": 319, "content": secret, "special": False, "single_word": False,
                                            "lstrip": False, "rstrip": False, "normalized": False})  # fmt: skip
            place.write_json(name, content)
        else:
            place.edit_json(name, {"note": secret})

    return spoil


def _not_offered(file: str) -> Callable[[Place, Sequence[Ended]], str | None]:
    def check(place: Place, ended: Sequence[Ended]) -> str | None:
        offered = ended[0].code == 0 and f"  {file}  " in ended[0].shown
        return f"{file} would be published with the secret in it" if offered else None

    return check


# --- Names -----------------------------------------------------------------------------------------------------------


def _names() -> Iterator[Case]:
    names = {
        "space": "my model",
        "unicode": "模型",
        "quote": "it's",
        "percent": "%s%n",
        "dots": "a..b",
        "brackets": "[a]{b}",
        "glob": "*",
        "escapes": "\x1b]0;evil\x07m",
        "newline": "a\nb",
        "not-utf8": "m\udcc4",
        "bidi": "\u202em",
        "dollar": "$(id)",
    }
    for name, folder in names.items():
        for argv in (INFER, TRAIN, EXPORT, MERGE)[len(name) % 2 :: 2]:
            words = with_word(argv, "model", f"./{folder}")
            words = (*words, "--allow_other_base", "true") if argv is MERGE else words
            hostile = name in ("escapes", "newline", "not-utf8", "bidi")
            yield Case(GROUP, f"{'' if hostile else 'control-'}name-{name}-{argv[0]}", _moved(folder), (words,),
                       "either" if hostile else "fine", ("model", "adapter", "rows.jsonl"), tty=hostile)  # fmt: skip


def _moved(folder: str) -> Spoil:
    return lambda place: os.rename(place / "model", place / folder)
