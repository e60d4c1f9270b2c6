"""What a comparison compares: methods and varied settings -> setups, each a checked training configuration."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qingtune.config.commands import CompareConfig
from qingtune.config.load import Loaded, check_settings, not_a_setting
from qingtune.config.methods import ADAPTER_SETTINGS, METHOD_SETTINGS, Method, TrainingMethod
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError, raise_all

_CHOOSE_METHOD = ("use_lora", "use_qlora", "quantization_bit")
_OF_A_TRIAL = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed")
# What must be the same in all trials for their losses to be there and comparable.
_OF_THE_DATA = (
    "data_path", "eval_data_path", "val_size", "val_seed", "max_seq_length", "on_long", "on_bad_row", "system_prompt",
    "ignore_fields", "max_row_mb", "max_row_turns", "max_data_gb", "model_name_or_path", "eval_strategy",
)  # fmt: skip
_COMPARE_ONLY = CompareConfig.model_fields.keys() - TrainConfig.model_fields.keys()
_LONGEST_SLUG = 100  # bytes: names of files may have 255, and a Chinese character takes 3


@dataclass(frozen=True)
class Setup:
    """A way of training.

    Attributes:
        name: method and varied settings, such as "lora lora_r=8"; no two setups of a comparison share one.
        method: full, lora, qlora4 or qlora8.
        varied: the settings that were varied, as they came out.
        config: checked and resolved; output_dir and seed are each trial's own.
        notices: messages for the user about it.
    """

    name: str
    method: TrainingMethod
    varied: dict[str, Any]
    config: TrainConfig
    notices: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name as a part of a path."""
        plain = self.name.replace(" ", "_")
        slug = re.sub(r"[^\w.=+-]", "_", plain)
        cut = slug.encode()[:_LONGEST_SLUG].decode(errors="ignore")
        if cut == plain:
            return slug
        return f"{cut}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def methods_to_compare(config: CompareConfig) -> list[TrainingMethod]:
    """Those asked for; by themselves all, or where settings are varied, the one that the settings name."""
    return config.methods or ([config.training_method] if config.grid or config.space else [*METHOD_SETTINGS])


def grid_setups(loaded: Loaded[CompareConfig]) -> list[Setup]:
    """Each method with each point of the grid; what comes out the same, as full at any lora_r, is there once.

    Raises:
        UserError: names every problem of every setup.
    """
    config = loaded.config
    grid = config.grid or {}
    problems: list[UserError] = []
    setups: dict[str, Setup] = {}
    for method in methods_to_compare(config):
        for values in itertools.product(*grid.values()):
            try:
                setup = make_setup(loaded, method, dict(zip(grid, values, strict=True)))
                setups.setdefault(setup.name, setup)
            except UserError as error:
                problems.append(error)
    raise_all(list({str(problem): problem for problem in problems}.values()))
    return [*setups.values()]


def check_varied(config: CompareConfig) -> None:
    """Refuse to vary what would make losses incomparable, or one setting in two ways.

    Raises:
        UserError: names every such setting.
    """
    of_methods = {name for settings in (config.per_method or {}).values() for name in settings}
    varied = {"grid": set(config.grid or {}), "space": set(config.space or {}), "per_method": of_methods}
    problems = [
        UserError(f'"{name}" cannot differ between the trials of a comparison', where=where)
        for where, names in varied.items()
        for name in sorted(names)
        if name in (*_OF_THE_DATA, *_OF_A_TRIAL, *_CHOOSE_METHOD) or name in _COMPARE_ONLY
    ]
    problems += [
        not_a_setting(TrainConfig, name, where)
        for where, names in varied.items()
        for name in sorted(names - TrainConfig.model_fields.keys() - _COMPARE_ONLY)
    ]
    for one, two in itertools.combinations(varied, 2):
        problems += [
            UserError(f'"{name}" is in {one} and in {two}', fix="Set it in one of them only.")
            for name in sorted(varied[one] & varied[two])
        ]
    if config.grid and config.space:
        problems.append(UserError("grid and space are both given", fix="space accepts lists of values, too."))
    missing = {*(config.per_method or {})} - {*methods_to_compare(config)}
    problems += [
        UserError(f"per_method sets {name}, which is not compared", fix="Add it to methods.")
        for name in sorted(missing)
    ]
    raise_all(problems)


def make_setup(loaded: Loaded[CompareConfig], method: TrainingMethod, varied: Mapping[str, Any]) -> Setup:
    """A method with its own settings.

    What concerns adapters is left out for full training; a learning rate stays with the method that it was given for.

    Args:
        varied: name -> value; None or "default" leaves the setting out.

    Raises:
        UserError: names every problem of it.
    """
    left_out = {*_COMPARE_ONLY, *_CHOOSE_METHOD, *_OF_A_TRIAL}
    kind: Method = "qlora" if method.startswith("qlora") else cast("Method", method)
    if kind != loaded.config.method:
        left_out.add("learning_rate")
    if kind == "full":
        left_out.update(ADAPTER_SETTINGS)
    chosen = {name: value for name, value in varied.items() if kind != "full" or name not in ADAPTER_SETTINGS}
    values = {name: value for name, value in loaded.given.items() if name not in left_out}
    values |= METHOD_SETTINGS[method] | (loaded.config.per_method or {}).get(method, {}) | chosen
    values = {name: value for name, value in values.items() if name not in chosen or value not in (None, "default")}
    where = _words([method, *(f"{k}={_short(v)}" for k, v in chosen.items())])
    checked = check_settings(TrainConfig, values, where)
    if "num_train_epochs" in chosen and checked.config.max_steps > 0:
        raise UserError(
            f"num_train_epochs has no effect, because max_steps is {checked.config.max_steps}",
            where=where,
            fix="Remove max_steps.",
        )
    found = {name: getattr(checked.config, name) for name in chosen}
    name = _words([method, *(f"{name}={_short(value)}" for name, value in found.items())])
    return Setup(name, method, found, checked.config, checked.notices)


def _words(parts: Sequence[str]) -> str:
    return " ".join("_".join(part.split()) for part in parts)


def _short(value: Any) -> str:
    """A value as it is written in names."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return re.sub(r"e([+-])0(\d)$", r"e\1\2", f"{value:.6g}") if isinstance(value, float) else str(value)


def about_full_training(config: CompareConfig) -> str | None:
    """A line for the user on settings of the grid that full training does not have; None if there are none."""
    without = [name for name in config.grid or {} if name in ADAPTER_SETTINGS]
    if not without or "full" not in methods_to_compare(config):
        return None
    return f"{', '.join(without)}: no effect on full training, which is not repeated for it."


def about_learning_rates(config: CompareConfig, given: Mapping[str, Any]) -> str | None:
    """A line for the user on which method a given learning rate applies to; None if it is obvious."""
    others = [
        method for method in methods_to_compare(config)
        if not method.startswith(config.method) and "learning_rate" not in (config.per_method or {}).get(method, {})
    ]  # fmt: skip
    varied = {*(config.grid or {}), *(config.space or {})}
    if not others or given.get("learning_rate") is None or "learning_rate" in varied:
        return None
    return (
        f"learning_rate {config.learning_rate:g} is that of {config.method} training; {', '.join(others)} train at "
        f"their default. --per_method {others[0]}.learning_rate=X gives another."
    )
