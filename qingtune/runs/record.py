"""The record of a run, kept with its result: what inference, merging and a later run of the same command need."""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import importlib.metadata
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qingtune import __version__
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.files.json_files import (
    FLAG,
    INDEX_BYTES,
    OBJECT,
    TEXT,
    Kind,
    check_fields,
    either,
    list_of,
    number,
    object_of,
    read_object_if_there,
    whole,
)
from qingtune.files.write import write_json
from qingtune.output.redaction import HIDDEN, redact, redact_values

# What a run writes in addition to the model's or adapter's files; SETTINGS is the first, RECORD the last of those that
# the result needs. FACTS are what the run knows of itself when it starts; the page is made of all of them.
RECORD, SETTINGS, METRICS, CURVE = "qingtune.json", "train_config.json", "metrics.jsonl", "loss_curve.png"
FACTS, PAGE, SAMPLES = "run_facts.json", "report.html", "eval_samples.jsonl"
LATEST = "latest_checkpoint.json"  # names the checkpoint to resume from
WEIGHTS_REMOVED = "weights_removed.txt"  # in place of a whole model that a comparison did not keep

FEW_ROWS = 30  # of evaluation data, below which a small difference of losses may well be chance

_DIGESTS = "digests of what is hidden"  # next to settings that held a secret

# Settings that may change from one start of a run to the next without changing what it computes.
_MAY_CHANGE = {
    "dry_run", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "cache_dir", "hub", "logging_steps",
    "report_to", "eval_strategy", "eval_steps", "eval_samples", "per_device_eval_batch_size", "save_strategy",
    "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "gradient_checkpointing", "dataloader_num_workers", "deepspeed", "remove_unused_columns",
    "per_device_train_batch_size", "gradient_accumulation_steps", "samples_per_step", "shard", "ignore_fields",
    "max_row_mb", "max_row_turns", "max_data_gb",
}  # fmt: skip


_KINDS = {
    **dict.fromkeys(("method", "base_model", "base_fingerprint", "system_prompt", "prompt_style"), TEXT),
    **dict.fromkeys(("settings", "results"), OBJECT),
    "stop_ids": list_of(whole(0, 2**24)),
    "versions": object_of(TEXT),
}
# Of the results, those that are read again; losses may be NaN.
_LOSS = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
_RESULTS = {
    **dict.fromkeys(("eval_loss_before", "eval_loss", "best_eval_loss"), _LOSS),
    **dict.fromkeys(("seconds", "peak_bytes"), number(least=0)),
    **dict.fromkeys(("steps", "parameters", "trained_parameters"), whole(0)),
    "planned_bytes": object_of(number(least=0)),
}
# Of the settings, those that a model card computes with.
_PATHS = either(TEXT, list_of(TEXT))
_SETTINGS = {
    **dict.fromkeys(("use_lora", "use_qlora"), FLAG),
    **dict.fromkeys(("data_path", "eval_data_path"), _PATHS),
    "lora_r": whole(1),
    "val_size": number(least=0),
}


@dataclass(frozen=True)
class Record:
    """What a finished run says of itself.

    Attributes:
        method: full, lora or qlora.
        base_model: name of the base, as it was given.
        base_fingerprint: by which the base's weights are known again.
        system_prompt: the system message of training, None if the rows' own or the template's.
        prompt_style: chat (template) or plain text.
        stop_ids: token ids that end an answer.
        settings: what decided the result, from settings_to_compare.
        results: losses, steps, seconds, peak memory.
        versions: of this tool and the libraries it computed with.
    """

    method: str
    base_model: str
    base_fingerprint: str
    system_prompt: str | None
    prompt_style: Literal["chat", "plain"]
    stop_ids: list[int]
    settings: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def write_record(folder: Path, record: Record) -> None:
    """Write the record; its presence says that the run is finished.

    The system prompt is written as it is, since answers need it; the base's name, settings and results
    without secrets, as the record of an adapter from elsewhere may hold some.
    """
    shown = redact_values({"settings": record.settings, "results": record.results})
    write_json(folder / RECORD, {**asdict(record), **shown, "base_model": redact(record.base_model)})


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None if there is none, as with adapters that PEFT wrote.

    Raises:
        UserError: it is broken.
    """
    path = folder / RECORD
    content = read_object_if_there(path, INDEX_BYTES, nan=True)
    if content is None:
        return None
    check_fields(content, _KINDS, str(path))
    check_fields(content.get("settings") or {}, _SETTINGS, f"{path}: settings")
    check_fields(content.get("results") or {}, _RESULTS, f"{path}: results")
    known: dict[str, Any] = {
        name: value
        for name, value in content.items()
        if name in Record.__dataclass_fields__ and (value is not None or name == "system_prompt")
    }
    if known.get("prompt_style", "chat") not in ("chat", "plain"):
        raise UserError(f'"prompt_style" is {known["prompt_style"]!r}, not chat or plain', where=str(path))
    try:
        return Record(**known)
    except TypeError as error:  # fields are missing
        raise UserError(f"the record is broken ({error})", where=str(path)) from None


def versions() -> dict[str, str]:
    """This tool's and those of the libraries that it computes with."""
    libraries = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    return {"qingtune": __version__, **{name: _version_of(name) for name in libraries}}


_version_of = functools.cache(importlib.metadata.version)


def settings_to_compare(config: TrainConfig, processes: int, data_hash: str, base_fingerprint: str) -> dict[str, Any]:
    """The settings that decide what a run computes, as JSON values; `without_secrets` is how they are written."""
    values = config.model_dump(mode="json", exclude=_MAY_CHANGE)
    values["samples a step"] = config.samples_a_step(processes)
    values["data"] = data_hash
    values["weights of the base model"] = base_fingerprint
    return values


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are written: secrets hidden, with a salted digest of each that holds one to know it again by."""
    shown = {name: redact_values(value) for name, value in settings.items()}
    salt = secrets.token_hex(16)
    digests = {name: _digest(value, salt) for name, value in settings.items() if shown[name] != value}
    return {**shown, _DIGESTS: {"salt": salt, **digests}} if digests else shown


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two runs' settings, a line each; see `changed_names`."""
    shown = functools.partial(json.dumps, ensure_ascii=False)
    return [f"{name} was {shown(before.get(name))}, is {shown(now.get(name))}" for name in changed_names(before, now)]


def changed_names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of settings that differ.

    Args:
        before: as they were written, by `without_secrets` or by version 0.1.0, which kept no digests.
        now: as they are.
    """
    digests = before.get(_DIGESTS, {})

    def same(name: str) -> bool:
        written, value = before.get(name), now.get(name)
        if written == value:
            return True
        return _digest(value, digests["salt"]) == digests[name] if name in digests else _could_be(written, value)

    return [name for name in sorted({*before, *now} - {_DIGESTS}) if not same(name)]


def _could_be(hidden: Any, value: Any) -> bool:
    """Whether a value becomes this one when secrets in it are hidden, whichever these are."""
    pieces, text = json.dumps(hidden, ensure_ascii=False).split(HIDDEN), json.dumps(value, ensure_ascii=False)
    return 1 < len(pieces) <= len(text) and fnmatch.fnmatchcase(text, "*".join(map(glob.escape, pieces)))


def _digest(value: Any, salt: str) -> str:
    text = salt + json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
