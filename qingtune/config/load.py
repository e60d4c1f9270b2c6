"""Read settings from a file and flags, and check them; every problem is reported at once, before anything loads."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import ValidationError

from qingtune.config.methods import REFUSED_WITHOUT_ADAPTERS, Method
from qingtune.config.no_effect import NO_EFFECT, ONLY_IDLE, asks_nothing, idle_names, notice_of, without_effect
from qingtune.config.training import ALIASES, Settings, TrainConfig
from qingtune.errors import UserError, raise_all, shorten
from qingtune.files.json_files import MOST_BYTES, read_bytes
from qingtune.output.redaction import HIDDEN, find_secret, find_token

# Near the best of those tried on Qwen2.5-Coder-0.5B, half or less of what a smaller one wanted (docs/measurements.md).
_LEARNING_RATES: dict[Method, float] = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}


# AdamW moves each weight by about the learning rate a step, whatever its gradient; a model's weights are about 0.02.
_MOST_LEARNING_RATE = 1.0
# Above these, runs seldom learn anything; the QLoRA guide goes up to 1e-3.
_HIGH_LEARNING_RATES: dict[Method, float] = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}

Training = TypeVar("Training", bound=TrainConfig)


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
        where: what problems are said to be in.

    Raises:
        UserError: names every problem, a line each.
    """
    return _check(schema, dict(values), dict.fromkeys(values, where), [], where)


def _check(
    schema: type[Training],
    values: dict[str, Any],
    origin: Mapping[str, str],
    problems: list[UserError],
    elsewhere: str | None,
) -> Loaded[Training]:
    """Check, resolve and raise what is wrong; `elsewhere` is where settings that are not given are missing."""
    given = dict(values)
    _take_out_idle(values)
    config, faulty = _validate(schema, values, origin, problems)
    if config is not None:
        for names, what, fix in _conflicts(config):
            if not faulty & set(names):
                where = next((origin[name] for name in names if name in origin), elsewhere)
                problems.append(UserError(what, where=where, fix=fix))
        if config.system_prompt is not None and (found := find_token(config.system_prompt)):
            what = f"system_prompt contains {found}, which would be written to the result"
            where = origin.get("system_prompt", elsewhere)
            problems.append(UserError(what, where=where, fix="Remove it from the prompt or from the environment."))
    raise_all(problems)
    assert config is not None
    resolved, reasons = _resolve(config)
    # A plan or a comparison trains by other methods as well, in which settings of adapters have their effect.
    idle = without_effect(resolved, given) if schema is TrainConfig else idle_names(given)
    return Loaded(resolved, (*notice_of(idle), *reasons, *_about_secrets(resolved)), given)


def _about_secrets(config: TrainConfig) -> list[str]:
    """What is said of settings that hold secrets; prompts stay as they are, since answers depend on them."""
    about: list[str] = []
    if config.system_prompt is not None and (found := find_secret(config.system_prompt)):
        about.append(f"Warning: system_prompt contains what looks like {found}; it will be written to the result.")
    for name in ("model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir"):
        if found := find_secret(json.dumps(getattr(config, name), ensure_ascii=False)):
            about.append(
                f"Warning: {name} contains what looks like {found}; the files of the result will have {HIDDEN} instead"
                + ", so pass --base_model later." * (name == "model_name_or_path")
                + "." * (name != "model_name_or_path")
            )
    return about


def read_json_object(path: str) -> dict[str, Any]:
    """Read a JSON object; a repeated key or a broken file is a UserError that names the place."""

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(f'"{repeated[0]}" is given twice', where=path, fix="Remove one of them.")
        return dict(pairs)

    try:
        # The system's own names, such as /dev/stdin, may be pipes: whoever gives one also fills it.
        raw = Path(path).read_bytes() if path.startswith("/dev/") else read_bytes(Path(path), MOST_BYTES)
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=no_repeats)
        json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise UserError("there is no such file", where=path, fix="Check the path.") from None
    except UnicodeEncodeError:
        raise UserError("contains half of a surrogate pair, which is not a character", where=path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})", where=path) from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"not valid JSON: {error}", where=path) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None
    if not isinstance(content, dict):
        raise UserError('expected a JSON object, such as {"use_lora": true}', where=path)
    return cast("dict[str, Any]", content)


def _without_older_names(given: Mapping[str, Any], where: str, problems: list[UserError]) -> dict[str, Any]:
    """The settings of one source by today's names, comments left out; a setting given by both names is a problem."""
    settings: dict[str, Any] = {}
    for name, value in given.items():
        today = ALIASES.get(name, name)
        if name != today and today in given:
            problems.append(
                UserError(f'"{name}" is the old name of "{today}"; both are given', where=where or f"--{name}")
            )
        elif not name.startswith(("_", "$")):
            settings[today] = value
    return settings


def _take_out_idle(values: dict[str, Any]) -> None:
    """Take out the names of other tools' settings that are no settings here and have no effect, in place."""
    for name, value in list(values.items()):
        no_setting = name in NO_EFFECT and name not in TrainConfig.model_fields
        if no_setting or (name in ONLY_IDLE and asks_nothing(name, value)):
            del values[name]


Checked = TypeVar("Checked", bound=Settings)


def _validate(
    schema: type[Checked], values: Mapping[str, Any], origin: Mapping[str, str], problems: list[UserError]
) -> tuple[Checked | None, set[str]]:
    """Check values against a schema, adding a problem for each fault.

    Returns the settings with faulty ones left at their defaults, so that further checks can go on (None where one has
    no default), and the faulty names.
    """
    try:
        return schema.model_validate(dict(values)), set()
    except ValidationError as error:
        faults = {str(fault["loc"][0]): fault for fault in reversed(error.errors())}
    for name, fault in faults.items():
        if fault["type"] == "missing":
            problems.append(UserError(f"--{name} is missing", fix=schema.model_fields[name].description))
        else:
            problems.append(_problem(schema, name, values[name], fault["msg"], fault["type"], origin[name]))
    if any(name in schema.model_fields and schema.model_fields[name].is_required() for name in faults):
        return None, set(faults)
    return schema.model_validate({k: v for k, v in values.items() if k not in faults}), set(faults)


def not_a_setting(schema: type[Settings], name: str, origin: str) -> UserError:
    """A name that the schema lacks, with the one that may be meant."""
    known = [*schema.model_fields, *(ALIASES if issubclass(schema, TrainConfig) else ())]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    fix = f'Did you mean "{near[0]}"?' if near else "See --help for all settings."
    return UserError(f'"{shorten(name)}" is not a setting', where=origin, fix=fix)


def _problem(schema: type[Settings], name: str, value: Any, message: str, kind: str, origin: str) -> UserError:
    if kind == "extra_forbidden":
        return not_a_setting(schema, name, origin)
    message = message.removeprefix("Value error, ").replace("Input should be", "should be")
    shown = shorten(json.dumps(value, ensure_ascii=False))
    return UserError(f'"{name}" is {shown}: {message[0].lower()}{message[1:]}', where=origin)


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


def _conflicts(config: TrainConfig) -> list[tuple[tuple[str, ...], str, str]]:
    """Problems between settings that are each right by themselves: the names they rest on, what is wrong, the fix."""
    checks: list[tuple[bool, tuple[str, ...], str, str]] = [
        (
            config.needs_data and not config.data_path,
            ("data_path",),
            "data_path is missing",
            "Pass a data file, for example --data_path data/store_xhs_sft_samples.jsonl.",
        ),
        (
            bool(config.bf16 and config.fp16),
            ("bf16", "fp16"),
            "bf16 and fp16 are both true",
            "Set one, or remove both to let the hardware decide.",
        ),
        (
            config.max_steps == 0,
            ("max_steps",),
            "max_steps is 0",
            "Set a number of steps, or -1 to use num_train_epochs.",
        ),
        (
            config.optim != "sgd" and _peak(config) > _MOST_LEARNING_RATE,
            ("learning_rate", "loraplus_lr_ratio", "optim"),
            f"learning_rate {_about_peak(config)} moves every weight by about that much in each AdamW step",
            "Choose one near the default (2e-5 for full training, 2e-4 for adapters).",
        ),
        *_evaluation_conflicts(config),
        *_adapter_conflicts(config),
    ]
    return [(names, what, fix) for wrong, names, what, fix in checks if wrong]


def _evaluation_conflicts(config: TrainConfig) -> list[tuple[bool, tuple[str, ...], str, str]]:
    """What is wrong in the settings of evaluation."""
    return [
        (
            bool(config.eval_data_path) and config.val_size > 0,
            ("eval_data_path", "val_size"),
            "eval_data_path and val_size are both given",
            "Set one: a separate file, or a part of the training data.",
        ),
        (
            config.val_size >= 1 and config.val_size != int(config.val_size),
            ("val_size",),
            f"val_size {config.val_size} is neither a share below 1 nor a whole number of rows",
            "For example 0.1 or 50.",
        ),
        (
            config.eval_strategy in ("steps", "epoch") and not config.has_evaluation,
            ("eval_strategy", "eval_data_path", "val_size"),
            f'eval_strategy is "{config.eval_strategy}", but there is no evaluation data',
            'Set eval_data_path or val_size, or set eval_strategy to "no".',
        ),
        (
            config.eval_samples > 0 and (not config.has_evaluation or config.eval_strategy == "no"),
            ("eval_samples", "eval_data_path", "val_size", "eval_strategy"),
            "eval_samples needs evaluations",
            'Set eval_data_path or val_size, and an eval_strategy other than "no".',
        ),
        (
            config.load_best_model_at_end and not config.has_evaluation,
            ("load_best_model_at_end", "eval_data_path", "val_size"),
            "load_best_model_at_end needs evaluations",
            "Set eval_data_path or val_size.",
        ),
        (
            config.load_best_model_at_end and config.eval_strategy == "no",
            ("load_best_model_at_end", "eval_strategy"),
            'load_best_model_at_end needs evaluations, but eval_strategy is "no"',
            'Set eval_strategy to "steps" or "epoch".',
        ),
        (
            config.greater_is_better is True,
            ("greater_is_better",),
            "greater_is_better is true, but a smaller eval_loss is better",
            "Leave it out.",
        ),
    ]


def _adapter_conflicts(config: TrainConfig) -> list[tuple[bool, tuple[str, ...], str, str]]:
    """What is wrong in the settings of kinds of adapters."""
    fields = TrainConfig.model_fields
    given = [name for name in REFUSED_WITHOUT_ADAPTERS if getattr(config, name) != fields[name].default]
    return [
        (
            config.method == "full" and bool(given),
            (*given, "use_lora", "use_qlora"),
            f"{', '.join(given)} {'need' if len(given) > 1 else 'needs'} adapters",
            "Set use_lora or use_qlora.",
        ),
        (
            config.method == "qlora" and config.init_lora_weights in _TAKEN_OUT,
            ("init_lora_weights", "use_qlora", "use_lora"),
            f"init_lora_weights {config.init_lora_weights} subtracts the initial adapters from the weights; in QLoRA "
            "the rest would then be quantised again",
            "Choose use_lora, or another init_lora_weights.",
        ),
    ]


_TAKEN_OUT = ("pissa", "pissa_niter_16", "olora")


def _resolve(config: Training) -> tuple[Training, list[str]]:
    """Fill in the settings whose defaults depend on others; each choice comes with its reason."""
    chosen: dict[str, Any] = {}
    reasons: list[str] = []
    if config.learning_rate is None:
        chosen["learning_rate"] = _LEARNING_RATES[config.method]
        reasons.append(f"learning_rate = {chosen['learning_rate']:g}, the default of {config.method} training.")
    if config.optim != "sgd" and _peak(config) > _HIGH_LEARNING_RATES[config.method]:
        reasons.append(
            f"Warning: learning_rate {_about_peak(config)} is so high that the model may not learn; the default is "
            f"{_LEARNING_RATES[config.method]:g}."
        )
    if config.method != "full":
        reasons += _about_alpha(config)
        if config.lora_alpha is None:
            chosen["lora_alpha"] = float(2 * config.lora_r)
    if config.eval_strategy is None:
        chosen["eval_strategy"] = "epoch" if config.has_evaluation else "no"
    if config.eval_steps is None:
        chosen["eval_steps"] = config.logging_steps
    if config.use_lora and config.use_qlora:
        reasons.append("use_lora and use_qlora are both true; training with QLoRA (LoRA on quantised weights).")
    if config.lora_target_modules == ["all"]:
        chosen["lora_target_modules"] = None
    if config.report_to and "none" in [name.lower() for name in config.report_to]:
        chosen["report_to"] = None
    return config.model_copy(update=chosen), reasons


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What each setting of training is when it is left out, where the method and the rank are those of a run."""
    decided = {name: settings[name] for name in ("use_lora", "use_qlora", "lora_r") if name in settings}
    config = TrainConfig.model_validate(decided)
    return _resolve(config)[0].model_dump(mode="json") | {
        name: field.default for name, field in TrainConfig.model_fields.items() if name in decided
    }


def _peak(config: TrainConfig) -> float:
    """The largest learning rate of any parameter; of the method's default, where none is given."""
    return (config.learning_rate or _LEARNING_RATES[config.method]) * (config.loraplus_lr_ratio or 1)


def _about_peak(config: TrainConfig) -> str:
    rate = config.learning_rate or _LEARNING_RATES[config.method]
    return f"{rate:g}" + (f" times loraplus_lr_ratio {config.loraplus_lr_ratio:g}" if config.loraplus_lr_ratio else "")


def _about_alpha(config: TrainConfig) -> list[str]:
    """Why adapters are scaled as they are, where the user did not choose or chose what teaches little."""
    default, alpha = 2 * config.lora_r, config.lora_alpha
    if alpha is None:
        scaled = (
            f"with use_rslora the adapter scale is lora_alpha / sqrt(lora_r) = {2 * config.lora_r**0.5:.4g}"
            if config.use_rslora
            else "so the adapter scale is 2 at any rank"
        )
        return [f"lora_alpha = {default}, twice lora_r, {scaled}."]
    if config.use_rslora or alpha >= config.lora_r / 2:
        return []
    return [
        f"lora_alpha {alpha:g} at lora_r {config.lora_r} gives an adapter scale of {alpha / config.lora_r:.3g}, so "
        f"they learn slowly (docs/measurements.md). Leave it out (default {default}), or raise learning_rate."
    ]
