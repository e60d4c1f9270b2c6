"""The report of a data set without training: what is wrong, what is lost, what is suspicious; rows are read one by one.

Faults are rows that training refuses, and evaluation rows that are also in the training data. Everything else that is
reported - cut, dropped, repeated, near-empty, in another script - is for the user to judge.
"""

from __future__ import annotations

import hashlib
import re
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from qingtune.data.faults import add_reason, sum_of_rows
from qingtune.data.format import Conversation, FileFacts, conversations_of, placeholder_in
from qingtune.data.read import SHOWN_PLACES, Fault, Places
from qingtune.data.rules import Rules
from qingtune.data.tokenize import Template, tokenize
from qingtune.errors import UserError
from qingtune.output.console import say
from qingtune.output.units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

AT_ONCE = 256  # conversations tokenised at a time
TELL_EVERY_S = 5.0
NEAR_EMPTY = 4  # letters and digits below which an answer is near-empty where most are ten times as long
MUCH = 0.3  # the share of a script from which an answer counts as written in it
# Control tokens of the common templates, searched for if there is no tokenizer.
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>",
    "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip


@dataclass
class CheckReport:
    """What was found in training or evaluation data.

    Attributes:
        used, too_long_rows, untrained_rows: what became of the rows without a fault; without a tokenizer all are used.
        faults: all of them; named are those that are not of a kind of data.
        reasons: how many rows are faulty for each reason.
        kinds: rows of kinds of data that are not supported.
    """

    rows: int = 0
    used: int = 0
    too_long_rows: int = 0
    untrained_rows: int = 0
    files: dict[str, FileFacts] = field(default_factory=dict)
    faults: Places = field(default_factory=Places)
    reasons: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, Places] = field(default_factory=dict)
    placeholders: Places = field(default_factory=Places)
    repeated: Places = field(default_factory=Places)
    other_answer: Places = field(default_factory=Places)
    in_training: Places = field(default_factory=Places)
    near_empty: Places = field(default_factory=Places)
    two_scripts: Places = field(default_factory=Places)
    rare_script: Places = field(default_factory=Places)
    scripts: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    too_long: Places = field(default_factory=Places)
    truncated: int = 0
    untrained: Places = field(default_factory=Places)
    percentiles: dict[str, int] = field(default_factory=dict)

    @property
    def faulty(self) -> int:
        """Rows that are wrong, not only suspicious."""
        return self.faults.count + self.in_training.count


def check_data(
    paths: Sequence[str],
    system_prompt: str | None,
    template: Template | None,
    limit: int,
    on_long: str,
    training: Seen | None,
    rules: Rules,
) -> tuple[CheckReport, Seen]:
    """Read files and report on them.

    Args:
        template: tokenises the rows; None to go without token counts.
        limit: the longest sample, in tokens.
        on_long: "drop", "truncate" or "raise", for samples above the limit.
        training: what was seen in the training data, if this is the evaluation data.

    Raises:
        UserError: a file is broken as a whole, or there are no rows.
    """
    report, seen, answers, lengths = CheckReport(), Seen(), _Answers(), array("i")
    rows = _usable(paths, system_prompt, rules, report, look_for_markers=template is None)
    while batch := list(islice(rows, AT_ONCE)):
        for row in batch:
            seen.add(row)
            answers.add(row, report)
        if template is None:
            report.used += len(batch)
        else:
            _count_tokens(template, batch, limit, on_long, report, lengths)
    if not report.rows:
        raise UserError("no rows", where=", ".join(paths))
    _find_repeats(seen, training, report)
    answers.judge(report)
    if lengths:
        ordered = sorted(lengths)
        places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
        report.percentiles = {name: ordered[round(share * (len(ordered) - 1))] for name, share in places.items()}
    return report, seen


def _usable(
    paths: Sequence[str], system_prompt: str | None, rules: Rules, report: CheckReport, *, look_for_markers: bool
) -> Iterator[Conversation]:
    """Yield the rows that training would use, as far as can be known without a tokenizer, and report the others."""
    began = last_report = time.monotonic()
    for path in paths:
        report.files[path] = FileFacts()
        for row in conversations_of(path, system_prompt, report.files[path], rules):
            report.rows += 1
            if isinstance(row, Conversation) and (placeholder := placeholder_in(row)):
                report.placeholders.add(f"{row.origin} ({placeholder})")
            if isinstance(row, Fault):
                _refuse(report, row)
            elif look_for_markers and (marker := _marker_in(row)):
                _refuse(report, Fault(row.origin, f"holds {marker}, a control token of chat templates"))
            else:
                yield row
            if time.monotonic() - last_report > TELL_EVERY_S:
                last_report = time.monotonic()
                say(f"{path}: {counted(report.rows, 'row')} read in {last_report - began:.0f} s")


def _marker_in(row: Conversation) -> str | None:
    return next((marker for marker in MARKERS if any(marker in text for text in row.texts)), None)


def _refuse(report: CheckReport, fault: Fault) -> None:
    add_reason(report.reasons, fault)
    if fault.kind:
        report.faults.count += 1
        report.kinds.setdefault(fault.kind, Places()).add(f"{fault.origin} ({fault.sign})")
    else:
        report.faults.add(str(fault))


def _count_tokens(
    template: Template, batch: list[Conversation], limit: int, on_long: str, report: CheckReport, lengths: array[int]
) -> None:
    tokenized = tokenize(template, batch, limit, "truncate" if on_long == "truncate" else "drop")
    for fault in tokenized.faults:
        _refuse(report, fault)
    for origin in tokenized.too_long:
        if on_long == "raise":
            _refuse(report, Fault(origin, f"longer than {limit:,} tokens"))
        else:
            report.too_long.add(origin)
    for origin in tokenized.untrained:
        report.untrained.add(origin)
    report.used += tokenized.rows_used
    report.too_long_rows += tokenized.rows_too_long * (on_long != "raise")
    report.untrained_rows += tokenized.rows_untrained
    report.truncated += tokenized.truncated
    report.samples += len(tokenized.samples)
    report.trained += sum(sample.trained_tokens for sample in tokenized.samples)
    sizes = [len(sample.token_ids) for sample in tokenized.samples]
    report.tokens += sum(sizes)
    lengths.extend(sizes)


# --- Repeats ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Short hashes of rows and of their prompts, and where they stand: 24 bytes a row."""

    files: list[str] = field(default_factory=list)
    wholes: array[int] = field(default_factory=lambda: array("Q"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    places: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, row: Conversation) -> None:
        """Note a row."""
        path, _, line = row.origin.rpartition(":")
        if not self.files or self.files[-1] != path:
            self.files.append(path)
        parts = [f"{message.role}: {message.content.strip()}" for message in row.messages]
        whole = _hash(parts) if row.text is None else _hash([row.text.strip()])
        self.wholes.append(whole)
        self.prompts.append(whole if row.text is not None else _hash(parts[:-1]))
        self.places.append(len(self.files) - 1 << 40 | int(line))

    def place(self, number: int) -> str:
        """The place of a row, as `file:line`."""
        place = self.places[number]
        return f"{self.files[place >> 40]}:{place & (1 << 40) - 1}"


def _hash(parts: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


def _find_repeats(seen: Seen, training: Seen | None, report: CheckReport) -> None:
    wholes, prompts = (np.frombuffer(hashes, dtype=np.uint64) for hashes in (seen.wholes, seen.prompts))
    first_same, first_prompt = _first_of_each(wholes), _first_of_each(prompts)
    numbers = np.arange(len(wholes))
    for number in np.flatnonzero(first_same != numbers).tolist():
        report.repeated.add(f"{seen.place(number)} = {seen.place(int(first_same[number]))}")
    other = (first_same == numbers) & (wholes != wholes[first_prompt])
    for number in np.flatnonzero(other).tolist():
        report.other_answer.add(f"{seen.place(number)}, {seen.place(int(first_prompt[number]))}")
    if training is not None and training.wholes:
        trained, where = np.unique(np.frombuffer(training.wholes, dtype=np.uint64), return_index=True)
        at = np.minimum(np.searchsorted(trained, wholes), len(trained) - 1)
        for number in np.flatnonzero(trained[at] == wholes).tolist():
            report.in_training.add(f"{seen.place(number)} = {training.place(int(where[at[number]]))}")


def _first_of_each(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row the number of the first row with its hash."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


# --- Answers ---------------------------------------------------------------------------------------------------------

# Runs of letters of each script.
_SCRIPTS = {
    "Latin": regex.compile(r"\p{Latin}+"),
    "Han": regex.compile(r"\p{Han}+"),
    "kana": regex.compile(r"[\p{Hiragana}\p{Katakana}]+"),
    "Hangul": regex.compile(r"\p{Hangul}+"),
    "Cyrillic": regex.compile(r"\p{Cyrillic}+"),
    "Arabic": regex.compile(r"\p{Arabic}+"),
}
_LETTER_OR_DIGIT, _DIGIT = re.compile(r"[^\W_]"), re.compile(r"\d")


class _Answers:
    """The lengths of answers and their scripts, by which unusual ones are found once all are known."""

    def __init__(self) -> None:
        self._sizes = array("i")
        self._short = Places()
        self._by_script: dict[str, Places] = {}

    def add(self, row: Conversation, report: CheckReport) -> None:
        answer = row.messages[-1].content if row.text is None else row.text
        total = len(_LETTER_OR_DIGIT.findall(answer))
        letters = {kind: sum(map(len, pattern.findall(answer))) for kind, pattern in _SCRIPTS.items()}
        letters["other"] = total - sum(letters.values()) - len(_DIGIT.findall(answer))
        self._sizes.append(total)
        if total < NEAR_EMPTY:
            self._short.add(row.origin)
            return
        much = [kind for kind, count in letters.items() if count >= MUCH * total]
        if len(much) > 1:
            report.two_scripts.add(f"{row.origin} ({' and '.join(sorted(much))})")
        if much:
            self._by_script.setdefault(max(much, key=lambda kind: letters[kind]), Places()).add(row.origin)

    def judge(self, report: CheckReport) -> None:
        """Short answers are near-empty where most are long; a script is rare below a fiftieth of the answers."""
        if self._sizes and statistics.median(self._sizes) >= 10 * NEAR_EMPTY:
            report.near_empty = self._short
        report.scripts = {kind: places.count for kind, places in self._by_script.items()}
        for kind, places in self._by_script.items():
            if places.count * 50 < sum(report.scripts.values()):
                report.rare_script.count += places.count
                report.rare_script.first += [f"{origin} ({kind})" for origin in places.first]
        del report.rare_script.first[SHOWN_PLACES:]


# --- The report ------------------------------------------------------------------------------------------------------


def as_lines(name: str, report: CheckReport, limit: int) -> list[str]:
    """The report as text, a finding a line with the first places below."""
    lines = [f"{name}: {counted(report.rows, 'row')}, {counted(report.faults.count, 'fault')}"]
    rows = {
        "used": report.used,
        "refused": report.rows - report.used - report.too_long_rows - report.untrained_rows,
        "too long": report.too_long_rows,
        "without a trained token": report.untrained_rows,
    }
    if report.used < report.rows:
        lines.append(f"  {sum_of_rows(rows)}")
    lines += [f"  {path}: {about.described()}" for path, about in report.files.items()]
    if report.percentiles:
        shares = ", ".join(f"{key} {value:,}" for key, value in report.percentiles.items())
        lines.append(
            f"  {counted(report.samples, 'sample')} of {report.tokens:,} tokens, {report.trained:,} trained "
            f"({report.trained / report.tokens:.0%}); length {shares}"
        )
    if report.scripts:
        by_count = sorted(report.scripts.items(), key=lambda item: -item[1])
        lines.append("  answers by script: " + ", ".join(f"{k} {n:,}" for k, n in by_count))
    others = report.faults.count - sum(places.count for places in report.kinds.values())
    findings = [
        *(("fault", f": {kind} is not supported", places) for kind, places in report.kinds.items()),
        ("fault", "", Places(others, report.faults.first)),
        ("row", " with placeholders that were never filled in", report.placeholders),
        ("evaluation row", " also in the training data", report.in_training),
        ("repeated row", "", report.repeated),
        ("row", " with the same prompt as another row but a different answer", report.other_answer),
        ("sample", f" longer than {limit:,} tokens (dropped)", report.too_long),
        ("sample", " without a trained token", report.untrained),
        ("near-empty answer", "", report.near_empty),
        ("answer", " in a script that is rare here", report.rare_script),
        ("answer", " in two scripts", report.two_scripts),
    ]
    for noun, rest, places in findings:
        if places.count:
            lines.append(f"  {counted(places.count, noun)}{rest}:")
            lines += [f"    {place}" for place in places.first]
            lines += ["    ..."] * (places.count > len(places.first))
    if report.truncated:
        lines.append(f"  {counted(report.truncated, 'sample')} longer than {limit:,} tokens (cut at the end)")
    return lines


def as_json(report: CheckReport) -> dict[str, Any]:
    """The report as JSON values."""
    return {"faulty": report.faulty, **asdict(report)}
