"""Read settings from a file and flags, and check them; every problem is reported at once, before anything loads."""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from qingtune.config.no_effect import NO_EFFECT, ONLY_IDLE, asks_nothing, idle_names, notice_of, without_effect
from qingtune.config.resolve import Training, conflicts, resolve
from qingtune.config.training import ALIASES, Settings, TrainConfig
from qingtune.errors import UserError, raise_all, shorten
from qingtune.files.json_files import MOST_BYTES, parse_object, read_bytes
from qingtune.output.redaction import HIDDEN, find_secret, find_token

Checked = TypeVar("Checked", bound=Settings)


@dataclass(frozen=True)
class Loaded(Generic[Training]):
    """A checked configuration, with messages for the user.

    Attributes:
        given: the settings as they were given, by today's names, before defaults were filled in.
    """

    config: Training
    notices: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)


def load_train_config(config_file: str | None, flags: Mapping[str, str]) -> Loaded[TrainConfig]:
    """The settings of `qingtune train`; see load_config."""
    return load_config(TrainConfig, config_file, flags)


def load_config(schema: type[Training], config_file: str | None, flags: Mapping[str, str]) -> Loaded[Training]:
    """Read the file, lay the flags over it and check everything.

    Args:
        schema: the settings of training, or more that hold these.
        config_file: path of a JSON file, or None for flags alone.
        flags: name -> text as typed on the command line.

    Raises:
        UserError: names every problem of the configuration, a line each.
    """
    problems: list[UserError] = []
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for given, where in ((read_json_object(config_file) if config_file else {}, config_file or ""), (flags, "")):
        for name, value in _without_older_names(given, where, problems).items():
            values[name], origin[name] = value, where or f"--{name}"
    return _check(schema, values, origin, problems, config_file)


def check_settings(schema: type[Training], values: Mapping[str, Any], where: str) -> Loaded[Training]:
    """Check settings that were made rather than read.

    Args:
        values: by today's names.
        where: the place that messages name.

    Raises:
        UserError: names every problem, a line each.
    """
    return _check(schema, values, dict.fromkeys(values, where), [], where)


def check_flags(schema: type[Checked], flags: Mapping[str, str]) -> Checked:
    """Check the flags of a command that has no configuration file.

    Raises:
        UserError: names every problem, a line each.
    """
    problems: list[UserError] = []
    settings, _ = _validate(schema, flags, {name: f"--{name}" for name in flags}, problems)
    raise_all(problems)
    assert settings is not None
    return settings


def _check(
    schema: type[Training],
    given: Mapping[str, Any],
    origin: Mapping[str, str],
    problems: list[UserError],
    elsewhere: str | None,
) -> Loaded[Training]:
    """Check, resolve and raise what is wrong; `elsewhere` is where settings that are not given are missing."""
    values = {name: value for name, value in given.items() if not _is_idle_elsewhere(name, value)}
    config, faulty = _validate(schema, values, origin, problems)
    if config is not None:
        for names, what, fix in conflicts(config):
            if not faulty & set(names):
                where = next((origin[name] for name in names if name in origin), elsewhere)
                problems.append(UserError(what, where=where, fix=fix))
        if config.system_prompt is not None and (found := find_token(config.system_prompt)):
            what = f"system_prompt contains {found}, which would be written to the result"
            where = origin.get("system_prompt", elsewhere)
            problems.append(UserError(what, where=where, fix="Remove it from the prompt or from the environment."))
    raise_all(problems)
    assert config is not None
    resolved, reasons = resolve(config)
    # A plan or a comparison trains by other methods as well, in which settings of adapters have their effect.
    idle = without_effect(resolved, given) if schema is TrainConfig else idle_names(given)
    notices = (*notice_of(idle), *reasons, *_about_evaluation_data(resolved, origin), *_about_secrets(resolved))
    return Loaded(resolved, notices, given)


def _about_evaluation_data(config: TrainConfig, origin: Mapping[str, str]) -> list[str]:
    """A warning where a flag replaced the file's training data, but not its evaluation data."""
    paths, where = config.eval_data_path, origin.get("eval_data_path", "")
    if not paths or config.eval_strategy == "no" or where.startswith("--") or origin.get("data_path") != "--data_path":
        return []
    return [
        f"Warning: the evaluation data is still {', '.join(paths)}, from {where}. Pass --eval_data_path FILE, or "
        "--eval_data_path null --val_size 0.1 to hold out a tenth of the training data."
    ]


def _about_secrets(config: TrainConfig) -> list[str]:
    """Warnings about settings that contain secrets; prompts are not changed, since answers depend on them."""
    about: list[str] = []
    if config.system_prompt is not None and (found := find_secret(config.system_prompt)):
        about.append(f"Warning: system_prompt contains what looks like {found}; it will be written to the result.")
    for name in ("model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir"):
        if found := find_secret(json.dumps(getattr(config, name), ensure_ascii=False)):
            later = ", so pass --base_model later" if name == "model_name_or_path" else ""
            about.append(
                f"Warning: {name} contains what looks like {found}; the files of the result will have {HIDDEN} instead"
                f"{later}."
            )
    return about


def read_json_object(path: str) -> dict[str, Any]:
    """The JSON object in a file, or in a pipe or device that somebody writes to, such as /dev/stdin.

    Raises:
        UserError: it is missing, broken or something else; names the place.
    """
    try:
        content = read_bytes(Path(path), MOST_BYTES, pipes=True)
    except FileNotFoundError:
        raise UserError("there is no such file", where=path, fix="Check the path.") from None
    if not content and not Path(path).is_file():
        raise UserError("this is not a regular file, and nothing was written to it", where=path)
    return parse_object(content.removeprefix(codecs.BOM_UTF8), path, nan=True)


def _without_older_names(given: Mapping[str, Any], where: str, problems: list[UserError]) -> dict[str, Any]:
    """The settings of one source by today's names, comments left out; a setting given by both names is a problem."""
    settings: dict[str, Any] = {}
    for name, value in given.items():
        today = ALIASES.get(name, name)
        if name != today and today in given:
            what = f'"{name}" is the old name of "{today}"; both are given'
            problems.append(UserError(what, where=where or f"--{name}"))
        elif not name.startswith(("_", "$")):
            settings[today] = value
    return settings


def _is_idle_elsewhere(name: str, value: object) -> bool:
    """Whether this is another tool's setting, not one of ours, and has no effect."""
    no_setting = name in NO_EFFECT and name not in TrainConfig.model_fields
    return no_setting or (name in ONLY_IDLE and asks_nothing(name, value))


def _validate(
    schema: type[Checked], values: Mapping[str, Any], origin: Mapping[str, str], problems: list[UserError]
) -> tuple[Checked | None, set[str]]:
    """Check values against a schema, adding a problem for each fault.

    Returns the settings with faulty ones left at their defaults, so that further checks can be made (None where one
    has no default), and the faulty names.
    """
    try:
        return schema.model_validate(dict(values)), set()
    except ValidationError as error:
        faults = {str(fault["loc"][0]): fault for fault in reversed(error.errors())}
    fields = schema.model_fields
    for name, fault in faults.items():
        if fault["type"] == "missing":
            problems.append(UserError(f"--{name} is missing", fix=fields[name].description))
        elif fault["type"] == "extra_forbidden":
            problems.append(not_a_setting(schema, name, origin[name]))
        else:
            message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            shown = shorten(json.dumps(values[name], ensure_ascii=False))
            what = f'"{name}" is {shown}: {message[0].lower()}{message[1:]}'
            problems.append(UserError(what, where=origin[name], fix=_choice_meant(fault)))
    if any(name in fields and fields[name].is_required() for name in faults):
        return None, set(faults)
    return schema.model_validate({k: v for k, v in values.items() if k not in faults}), set(faults)


def _choice_meant(fault: Mapping[str, Any]) -> str | None:
    """The choice that a value outside a setting's choices probably means."""
    if fault["type"] != "literal_error" or not isinstance(fault["input"], str):
        return None
    return did_you_mean(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"])) or None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that proposes the known name nearest to a mistyped one; empty if none is near."""
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)
    return f'Did you mean "{near[0]}"?' if near else ""


def not_a_setting(schema: type[Settings], name: str, origin: str) -> UserError:
    """The problem of a name that the schema lacks, with the name that may be meant."""
    known = [*schema.model_fields, *(ALIASES if issubclass(schema, TrainConfig) else ())]
    fix = did_you_mean(name, known) or "See --help for all settings."
    return UserError(f'"{shorten(name)}" is not a setting', where=origin, fix=fix)
