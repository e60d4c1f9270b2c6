"""Attacks by flags, configuration files and the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from attack_case import (
    CHAT,
    CHECK,
    EVALUATE,
    EXPORT,
    INFER,
    INFER_FILE,
    MERGE,
    OTHER_SECRETS,
    PLAN,
    PUSH,
    REPORT,
    SECRET,
    TRAIN,
    Argv,
    Case,
    Ended,
    Expected,
    Place,
    Spoil,
    nothing,
)
from attack_values import ESCAPES, broken_files, shown

GROUP = "settings"
ALL = ("model", "adapter", "run", "rows.jsonl")
_REFUSED: dict[Argv, dict[str, tuple[str, ...]]] = {
    TRAIN: {
        "lora_r": ("0", "-1", "x", "2.5", "1e400", "99999999999999999999", "nan", ""),
        "lora_alpha": ("0", "-1", "nan", "inf", "x"),
        "learning_rate": ("0", "-1", "nan", "inf", "fast", "5", "1e300"),
        "max_seq_length": ("0", "-1", "x", "1e9x"),
        "per_device_train_batch_size": ("0", "-1", "x"),
        "num_train_epochs": ("0", "-1", "nan", "inf"),
        "max_steps": ("-2", "x", "1.5"),
        "seed": ("-1", "x", str(2**64)),
        "optim": ("evil", "", ESCAPES),
        "lora_target_modules": ("nowhere", "q_proj,nowhere", "("),
        "rank_pattern": ('{"(": 4}', "{", "5", '{"q_proj": "x"}', "q_proj=x", '{"q_proj": -1}'),
        "layers_to_transform": ("99", "x", "5-1", "-1"),
        "modules_to_save": ("nowhere", "../x"),
        "init_lora_weights": ("evil", "pissa_niter_x"),
        "warmup_ratio": ("2", "-1", "nan"),
        "adam_beta1": ("1", "-1", "nan"),
        "val_size": ("-1", "x", "nan"),
        "report_to": ("evil", "os.system"),
        "resume_from_checkpoint": ("nowhere", "/etc", "run/checkpoint-99"),
        "lr_scheduler_type": ("evil",),
        "lora_dropout": ("1", "-1", "nan"),
        "hub": ("evil",),
        "output_dir": ("", "rows.jsonl", "rows.jsonl/x", "a\nb" * 400, "/proc/x", "/dev/null"),
    },
    INFER: {
        "temperature": ("-1", "nan", "inf", "x"),
        "top_p": ("0", "2", "nan"),
        "top_k": ("-1", "2.5", "x"),
        "repetition_penalty": ("0", "-1", "nan"),
        "max_new_tokens": ("0", "-1", "x"),
        "base_model": (
            "nowhere.gguf",
            "./nowhere",
            "/etc",
            "/etc/passwd",
            "rows.jsonl",
            "/dev/zero",
            "../..",
            f"./{ESCAPES}",
        ),
        "lora_model": ("nowhere", "rows.jsonl", "/etc", "model", f"./{ESCAPES}"),
        "prompt_file": ("nowhere", "model", "/dev/null"),
        "seed": ("-1", "x"),
    },
    EVALUATE: {
        "data": ("nowhere", "model"),
        "limit": ("0", "-1"),
        "max_seq_length": ("1",),
        "output_dir": ("", "rows.jsonl"),
    },
    EXPORT: {"quantize": ("evil", "q8_0,evil", ""), "format": ("evil",), "output_dir": ("", "rows.jsonl")},
    MERGE: {"lora_model": ("nowhere", "model"), "output_dir": ("rows.jsonl", "model")},
    PUSH: {
        "repo": ("evil", "a/b/c", "../x", "", "a/..", "a b/c"),
        "folder": ("nowhere", "/etc", "rows.jsonl"),
        "to": ("evil",),
    },
    PLAN: {"gpu_memory_gib": ("0", "-1", "nan", "1e30"), "model_name_or_path": ("./nowhere", "/etc")},
    CHECK: {"data": ("nowhere", "/etc", "/dev/null"), "on_long": ("evil",)},
    REPORT: {"output_dir": ("nowhere", "/etc", "rows.jsonl", "model")},
}
_EITHER: dict[Argv, dict[str, tuple[str, ...]]] = {
    INFER: {
        "temperature": ("1e-40", "1e-300", "1e300"),
        "top_p": ("1e-300",),
        "repetition_penalty": ("1e300", "1e-300"),
        "top_k": ("99999999999999999999",),
        "prompt": ("", "x" * 100_000, "\udcff"),
    },
    TRAIN: {
        "rank_pattern": ('{"(([a-z_0-9]+)+\\\\.?)+!": 4}', '{"(.*)*(.*)*(.*)*!": 4}'),
        "alpha_pattern": ('{"(([a-z_0-9]+)+\\\\.?)+!": 4}', '{"((a|a)*)*!": 4}'),
        "lora_r": ("65536",),
        "lora_target_modules": ("all",),
        "gradient_accumulation_steps": ("999999999",),
        "save_total_limit": ("1",),
        "lora_alpha": ("1e300", "1e-300"),
        "system_prompt": ("\udcff", ESCAPES),
    },
}
_FINE: tuple[tuple[Argv, str, str], ...] = (
    (TRAIN, "lora_target_modules", "null"),
    (TRAIN, "lora_target_modules", "q_proj,v_proj"),
    (TRAIN, "lora_alpha", "0.5"),
    (TRAIN, "rank_pattern", '{"q_proj": 2}'),
    (TRAIN, "rank_pattern", "q_proj=2"),
    (TRAIN, "modules_to_save", "norm"),
    (TRAIN, "layers_to_transform", "0"),
    (TRAIN, "learning_rate", "1e-3"),
    (TRAIN, "system_prompt", "Be brief: “ok”."),
    (INFER, "temperature", "0.7"),
    (INFER, "top_k", "0"),
    (INFER, "seed", "4294967295"),
    (EXPORT, "quantize", "f16,q4_0"),
    (TRAIN, "seed", "0"),
    (TRAIN, "output_dir", "out/a folder/deeper"),
    (PLAN, "gpu_memory_gib", "24"),
)


def settings_cases() -> Iterator[Case]:
    """Values that no setting takes, settings from files, patterns that hang, and the environment."""
    tables: tuple[tuple[Expected, dict[Argv, dict[str, tuple[str, ...]]]], ...] = (
        ("refused", _REFUSED), ("either", _EITHER),
    )  # fmt: skip
    for expect, table in tables:
        for argv, settings in table.items():
            for name, values in settings.items():
                for value in values:
                    yield _flag(argv, name, value, expect)
    for argv, name, value in _FINE:
        yield _flag(argv, name, value, "fine", "control-")
    for case in broken_files(GROUP, "train.json", ((*TRAIN, "--config_file", "train.json"),), ALL):
        if not case.name.endswith(("extra-keys", "windows-line-ends")):
            yield case
    for name, content in {
        "unknown": {"lora_rnak": 8},
        "escapes": {ESCAPES: 8},
        "secret": {"hub_token": SECRET},
        "secret-key": {SECRET: 1},
        "thousand": {f"x{n}": 1 for n in range(5000)},
    }.items():
        yield Case(GROUP, f"file-{name}", _file(content), ((*TRAIN, "--config_file", "train.json"),), "refused", ALL,
                   tty=name == "escapes", names=("train.json", "hub_token"))  # fmt: skip
    yield from _environment_cases()


def _file(content: Any) -> Spoil:
    return lambda place: place.write_json("train.json", content) and None


def _flag(argv: Argv, name: str, value: str, expect: Expected, prefix: str = "") -> Case:
    words = [*argv]
    flag = f"--{name}"
    if flag in words:
        words[words.index(flag) + 1] = value
    else:
        words += [flag, value]
    if value.startswith("-"):
        at = words.index(flag)
        words[at : at + 2] = [f"{flag}={value}"]
    needs = ("model", "rows.jsonl", *(fixture for fixture in ("adapter", "run") if _names(words, fixture)))
    names = (
        ()
        if prefix
        else (
            name,
            *([value] if 0 < len(value) < 60 else []),
            "rows.jsonl",
            *(["evil"] if value.endswith(ESCAPES) else []),
        )
    )
    return Case(
        GROUP, f"{prefix}{argv[0]}-{name}={shown(value)}", nothing, (tuple(words),), expect, needs, names=names,
        tty="\x1b" in value,
    )  # fmt: skip


def _names(words: Sequence[str], fixture: str) -> bool:
    return any(word == fixture or word.startswith(f"{fixture}/") for word in words)


_WORD = "instruction"


def _environment_cases() -> Iterator[Case]:
    environments: dict[str, dict[str, str | None]] = {
        "no-home": {"HOME": None},
        "home-missing": {"HOME": "{outside}/nowhere"},
        "home-file": {"HOME": "{outside}/precious.txt"},
        "matplotlib-inline": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        "matplotlib-evil": {"MPLBACKEND": "evil"},
        "matplotlib-qt": {"MPLBACKEND": "QtAgg"},
        "lang-c": {"LANG": "C", "LC_ALL": "C"},
        "tz-evil": {"TZ": "../../etc/passwd"},
        "columns-0": {"COLUMNS": "0"},
        "columns-x": {"COLUMNS": "x"},
        "term-dumb": {"TERM": "dumb"},
        "term-none": {"TERM": None},
        "cc-quote": {"CC": "'x"},
        "cc-evil": {"CC": "touch {outside}/pwned ;"},
        "cache-file": {"QINGTUNE_CACHE": "{outside}/precious.txt"},
        "cache-missing": {"QINGTUNE_CACHE": "{work}/out/deep/cache"},
        "cache-proc": {"QINGTUNE_CACHE": "/proc/x"},
        "pythonpath": {"PYTHONPATH": "{outside}"},
        "rank-x": {"RANK": "x", "WORLD_SIZE": "2"},
        "world-evil": {"WORLD_SIZE": "-5"},
        "endpoint": {"HF_ENDPOINT": "javascript:alert(1)"},
        "omp-x": {"OMP_NUM_THREADS": "x"},
        "no-color": {"NO_COLOR": "1"},
        "password-of-a-word": {"MY_PASSWORD": _WORD},
        "password-model": {"POSTGRES_PASSWORD": "hidden_size"},
    }
    fine = {
        "matplotlib-inline",
        "matplotlib-evil",
        "lang-c",
        "term-dumb",
        "term-none",
        "columns-0",
        "columns-x",
        "no-color",
        "password-of-a-word",
        "password-model",
        "cc-quote",
    }
    for name, env in environments.items():
        for argv in (TRAIN, INFER_FILE) if name in fine else (TRAIN,):
            check = _same_columns if argv is INFER_FILE else None
            expect: Expected = "fine" if name in fine else "either"
            yield Case(GROUP, f"environment-{name}-{argv[0]}", nothing, (argv,), expect, ALL, env=env, check=check)
    for name in ("OPENAI_KEY", "GITHUB_PAT", "MYSQL_PWD", "DB_PASS", "HF_TOKEN", "MY_SECRET"):
        env = {name: f"{OTHER_SECRETS}other-secret-11"}
        argv = (*TRAIN, "--system_prompt", f"The key is {OTHER_SECRETS}other-secret-11.")
        yield Case(GROUP, f"secret-in-prompt-{name}", nothing, (argv,), "either", ALL, env=env)
    for name, argv in {"train": TRAIN, "export": EXPORT, "merge": MERGE, "chat": CHAT}.items():
        words = (*argv, "--system_prompt", f"Key {SECRET}") if argv not in (MERGE,) else argv
        yield Case(
            GROUP, f"token-in-prompt-{name}", _token_in_path if name == "merge" else nothing, (words,), "either", ALL
        )
    yield Case(GROUP, "password-resumes", nothing, _RESUME, "fine", ALL, env={"POSTGRES_PASSWORD": "postgres"})


_RESUME: tuple[Argv, ...] = (
    (*TRAIN, "--system_prompt", "You know postgres.", "--save_steps", "1"),
    (*TRAIN, "--system_prompt", "You know postgres.", "--save_steps", "1", "--overwrite_output_dir", "true"),
)


def _token_in_path(place: Place) -> None:
    place.edit_json("adapter/qingtune.json", {"base_model": f"https://me:{SECRET}@host/model"})


def _same_columns(place: Place, ended: Sequence[Ended]) -> str | None:
    """Answers are written with the columns of their rows."""
    rows = [json.loads(line) for line in (place / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return None if rows and all(_WORD in row for row in rows) else "the columns of the rows are changed"
