"""Files -> training and evaluation samples, with the report on what is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from qingtune.config.training import TrainConfig
from qingtune.data.faults import count_reasons, describe_rows, fault_lines, faulty_rows
from qingtune.data.format import Conversation, Reading, read_conversations
from qingtune.data.read import Places
from qingtune.data.rules import rules_of
from qingtune.data.tokenize import SHOWN, Sample, Summary, Template, describe, show_example, summarize, tokenize
from qingtune.errors import UserError, raise_all, shorten
from qingtune.files.paths import refuse_odd_name
from qingtune.output.console import say

PromptStyle = Literal["chat", "plain"]


@dataclass(frozen=True)
class SetReport:
    """The report on training or evaluation data.

    Attributes:
        summary: of what was tokenised.
        formats: what rows each file holds; nothing for rows held out of the training data.
        ignored_columns: of each file the fields that are not used, and how many rows hold something in them.
        rows_read: in the files.
        rows: what became of these rows, or of those held out for evaluation: the numbers of those used, refused, ...,
            which add up to all.
        faults: rows of the files that were refused.
        reasons: how many rows were refused for each reason.
        first_faults: where the first refused rows stand and why.
        placeholders: rows with placeholders of a template that were left unfilled.
    """

    summary: Summary
    formats: dict[str, str] = field(default_factory=dict)
    ignored_columns: dict[str, dict[str, int]] = field(default_factory=dict)
    rows_read: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    faults: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first_faults: list[str] = field(default_factory=list)
    placeholders: Places = field(default_factory=Places)


@dataclass(frozen=True)
class DataReport:
    """Report on the data: each set, how many evaluation samples are trained on, and an example."""

    training: SetReport
    evaluation: SetReport | None
    evaluated_and_trained: int
    example: str


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
        UserError: names every file that is not there; or the first whose path no record can hold.
    """
    problems: list[UserError] = []
    for setting, names in paths.items():
        for name in names or []:
            if reason := _why_no_file(name):
                where = shorten(name)
                problems.append(UserError(f"{reason} ({setting})", where=where, fix="Check the path of the data."))
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
    """Read, check and tokenise the data, and tell what is trained.

    Args:
        context: the longest sequence the model can read, in tokens.

    Raises:
        UserError: rows are faulty and on_bad_row is raise, or nothing is left to train on.
    """
    limit = _most_tokens(config, context)
    training, evaluation = _read_both(config)
    train_samples, trained = _tokenize("Training data", config, template, training, limit)
    eval_samples, evaluated = [], None
    if evaluation.conversations:
        eval_samples, evaluated = _tokenize("Evaluation data", config, template, evaluation, limit)
    twice = _count_shared(train_samples, eval_samples)
    if twice:
        say(f"Warning: {twice:,} evaluation samples are also in the training data; eval_loss is too low.")
    short = min(train_samples[:100], key=lambda sample: len(sample.token_ids))
    example = show_example(template.tokenizer, short)
    say(f"An example; the part between >>> and <<< is trained:\n{example}")
    style = "plain" if all(row.text is not None for row in training.conversations) else "chat"
    return Data(train_samples, eval_samples, style, DataReport(trained, evaluated, twice, example))


def _most_tokens(config: TrainConfig, context: int | None) -> int:
    """The longest sample that is trained, in tokens: max_seq_length, or what the model can read."""
    if context is None or context >= config.max_seq_length:
        return config.max_seq_length
    say(f"max_seq_length = {context:,}: the model reads no more (the setting is {config.max_seq_length:,}).")
    return context


def _read_both(config: TrainConfig) -> tuple[Reading, Reading]:
    """The training and the evaluation data, the latter from files of its own or held out of the former."""
    assert config.data_path is not None
    training = _read("Training data", config.data_path, config)
    if config.eval_data_path:
        return training, _read("Evaluation data", config.eval_data_path, config)
    seed = config.seed if config.val_seed is None else config.val_seed
    training.conversations, held_out = _hold_out(training.conversations, config.val_size, seed)
    training.held_out = len(held_out)
    return training, Reading(held_out)


def _count_shared(training: Sequence[Sample], evaluation: Sequence[Sample]) -> int:
    """How many different evaluation samples are trained on, too."""
    evaluated = {sample.token_ids.tobytes() for sample in evaluation}
    return len({ids for sample in training if (ids := sample.token_ids.tobytes()) in evaluated})


def _read(name: str, paths: Sequence[str], config: TrainConfig) -> Reading:
    reading = read_conversations(paths, config.system_prompt, config.on_bad_row, rules_of(config))
    for path, about in reading.files.items():
        say(f"{name}: {path} contains {about.described()}")
    placeholders = reading.placeholders
    if placeholders.count:
        more = " ..." * (placeholders.count > len(placeholders.first))
        say(
            f"Warning: {name}: {placeholders.count:,} rows contain unfilled placeholders and are "
            f"trained as they are: {', '.join(placeholders.first)}{more}"
        )
    return reading


def _hold_out(
    conversations: list[Conversation], val_size: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Set rows aside for evaluation: a share below 1, or a number."""
    count = round(val_size * len(conversations)) if val_size < 1 else int(val_size)
    if val_size > 0:
        count = max(1, count)
    if count >= len(conversations):
        raise UserError(f"val_size holds out all {len(conversations):,} rows", fix="Make it smaller.")
    order = np.random.default_rng(seed).permutation(len(conversations))
    aside = set(order[:count].tolist())
    return (
        [row for number, row in enumerate(conversations) if number not in aside],
        [row for number, row in enumerate(conversations) if number in aside],
    )


def _tokenize(
    name: str,
    config: TrainConfig,
    template: Template,
    reading: Reading,
    limit: int,
) -> tuple[list[Sample], SetReport]:
    conversations = reading.conversations
    tokenized = tokenize(template, conversations, limit, config.on_long)
    if tokenized.faults and config.on_bad_row == "raise":
        raise faulty_rows(tokenized.faults, len(conversations))
    faults = [*reading.faults, *tokenized.faults]
    rows = {
        "used": tokenized.rows_used,
        "refused": len(faults),
        "too long": tokenized.rows_too_long,
        "without a trained token": tokenized.rows_untrained,
        "held out for evaluation": reading.held_out,
    }
    reasons = count_reasons(faults)
    for line in describe_rows(name, rows, reasons):
        say(line)
    first_faults = fault_lines(faults)[:SHOWN]
    for line in first_faults:
        say(f"refused: {line}")
    if not tokenized.samples:
        raise UserError(
            f"no sample is left: {len(tokenized.faults):,} refused, {len(tokenized.too_long):,} longer than "
            f"{limit:,} tokens, {len(tokenized.untrained):,} without a trained token",
            where=name,
            fix="Raise max_seq_length, or check the data.",
        )
    summary = summarize(len(conversations), tokenized)
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
