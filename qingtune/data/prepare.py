"""Files -> training and evaluation samples, with the report on what is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from qingtune.config.training import TrainConfig
from qingtune.data.faults import count_reasons, describe_rows, fault_lines, faulty_rows
from qingtune.data.format import Reading, read_conversations
from qingtune.data.report import SHOWN, DataReport, SetReport, describe, show_example, summarize
from qingtune.data.rules import rules_of
from qingtune.data.tokenize import Sample, Template, tokenize
from qingtune.errors import UserError, raise_all, shorten
from qingtune.files.paths import refuse_odd_name
from qingtune.output.console import say
from qingtune.output.units import counted

PromptStyle = Literal["chat", "plain"]


@dataclass(frozen=True)
class Data:
    """Tokenised training and evaluation data, and the report on it."""

    train: list[Sample]
    evaluation: list[Sample]
    style: PromptStyle
    report: DataReport

    @property
    def hash(self) -> str:
        """By which a later start of the run knows that its data is the same."""
        return _hash(self.train)

    @property
    def evaluation_hash(self) -> str | None:
        """By which runs know that they were evaluated on the same; None without evaluation data."""
        return _hash(self.evaluation) if self.evaluation else None


def _hash(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.token_ids.tobytes() + sample.trained.tobytes() + b"|")
    return digest.hexdigest()[:16]


def check_files_exist(paths: Mapping[str, Sequence[str] | None]) -> None:
    """Look for the data before anything is loaded.

    Args:
        paths: by the setting that names them.

    Raises:
        UserError: names every missing file, or the first path that no record can hold.
    """
    problems: list[UserError] = []
    for setting, names in paths.items():
        for name in names or []:
            if reason := _why_no_file(name):
                where = shorten(name)
                problems.append(UserError(reason, where=where, fix=f"Check --{setting}."))
            else:
                refuse_odd_name(Path(name), setting)
    raise_all(problems)


def _why_no_file(name: str) -> str | None:
    try:
        path = Path(name)
        return None if path.is_file() else "this is a folder" if path.is_dir() else "there is no such file"
    except (OSError, ValueError) as error:  # a name too long, or with a null byte in it
        return f"this is not a path ({getattr(error, 'strerror', None) or error})"


def load_data(config: TrainConfig, template: Template, context: int | None) -> Data:
    """Read, check and tokenise the data, and report what is trained.

    Args:
        context: the longest sequence the model can read, in tokens.

    Raises:
        UserError: rows are faulty and on_bad_row is raise, or nothing is left to train on.
    """
    limit = config.max_seq_length
    if context is not None and context < limit:
        say(f"max_seq_length = {context:,}: the model reads no more (the setting is {limit:,}).")
        limit = context
    assert config.data_path is not None
    training = _read("Training data", config.data_path, config)
    if config.eval_data_path:
        evaluation = _read("Evaluation data", config.eval_data_path, config)
    else:
        evaluation = _hold_out(training, config.val_size, config.seed if config.val_seed is None else config.val_seed)
    train_samples, trained = _tokenize("Training data", config, template, training, limit)
    eval_samples, evaluated = [], None
    if evaluation.conversations:
        eval_samples, evaluated = _tokenize("Evaluation data", config, template, evaluation, limit)
    ids_of_both = {sample.token_ids.tobytes() for sample in eval_samples}.intersection(
        sample.token_ids.tobytes() for sample in train_samples
    )
    twice = len(ids_of_both)
    if twice:
        say(f"Warning: {counted(twice, 'evaluation sample')} also in the training data; eval_loss is too low.")
    short = min(train_samples[:100], key=lambda sample: len(sample.token_ids))
    example = show_example(template.tokenizer, short)
    say(f"An example; the part between >>> and <<< is trained:\n{example}")
    style = "plain" if all(row.text is not None for row in training.conversations) else "chat"
    return Data(train_samples, eval_samples, style, DataReport(trained, evaluated, twice, example))


def _read(name: str, paths: Sequence[str], config: TrainConfig) -> Reading:
    reading = read_conversations(paths, config.system_prompt, config.on_bad_row, rules_of(config))
    for path, about in reading.files.items():
        say(f"{name}: {path} contains {about.described()}")
    placeholders = reading.placeholders
    if placeholders.count:
        more = " ..." * (placeholders.count > len(placeholders.first))
        say(
            f"Warning: {name}: {counted(placeholders.count, 'row')} with unfilled placeholders, trained unchanged: "
            f"{', '.join(placeholders.first)}{more}"
        )
    return reading


def _hold_out(reading: Reading, val_size: float, seed: int) -> Reading:
    """Set some of the rows aside for evaluation: a share below 1, or a number."""
    rows = reading.conversations
    count = round(val_size * len(rows)) if val_size < 1 else int(val_size)
    if val_size > 0:
        count = max(1, count)
    if count >= len(rows):
        raise UserError(f"val_size holds out all {counted(len(rows), 'row')}", fix="Make it smaller.")
    aside = np.zeros(len(rows), dtype=np.bool_)
    aside[np.random.default_rng(seed).permutation(len(rows))[:count]] = True
    reading.held_out = count
    reading.conversations = [row for row, kept in zip(rows, ~aside, strict=True) if kept]
    return Reading([row for row, held_out in zip(rows, aside, strict=True) if held_out])


def _tokenize(
    name: str, config: TrainConfig, template: Template, reading: Reading, limit: int
) -> tuple[list[Sample], SetReport]:
    """Samples of a set and the report on it, of which the most important is printed."""
    count = len(reading.conversations)
    tokenized = tokenize(template, reading.conversations, limit, config.on_long)
    if tokenized.faults and config.on_bad_row == "raise":
        raise faulty_rows(tokenized.faults, count)
    faults = [*reading.faults, *tokenized.faults]
    rows = {
        "used": tokenized.rows_used,
        "refused": len(faults),
        "too long": tokenized.rows_too_long,
        "without a trained token": tokenized.rows_untrained,
        "held out for evaluation": reading.held_out,
    }
    reasons = count_reasons(faults)
    first_faults = fault_lines(faults)[:SHOWN]
    for line in (*describe_rows(name, rows, reasons), *(f"refused: {line}" for line in first_faults)):
        say(line)
    if not tokenized.samples:
        raise UserError(
            f"no sample is left: {len(tokenized.faults):,} refused, {len(tokenized.too_long):,} longer than "
            f"{limit:,} tokens, {len(tokenized.untrained):,} without a trained token",
            where=name,
            fix="Raise max_seq_length, or check the data.",
        )
    summary = summarize(count, tokenized)
    for line in describe(name, summary):
        say(line)
    report = SetReport(
        summary,
        formats={path: about.format for path, about in reading.files.items()},
        ignored_columns={path: about.ignored_columns for path, about in reading.files.items()},
        rows_read=reading.rows,
        rows=rows,
        faults=len(faults),
        reasons=reasons,
        first_faults=first_faults,
        placeholders=reading.placeholders,
    )
    return tokenized.samples, report
