"""Check the bundled instruction-tuning samples: form, repetition, and faithfulness to the shop facts.

A small model learns every bad habit of its data, and nobody re-reads hundreds of rows after each edit, so
this script looks for the habits a machine can see. Without arguments it checks the pairs bundled in data/.
It exits with 0 when there is no fault, 1 when there are faults, 2 when it was called wrongly.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qingtune.errors import UserError  # noqa: E402
from qingtune.evaluation.form import COLUMN, form_of, kept_rules  # noqa: E402

BUNDLED_PAIRS = (
    ("data/store_xhs_sft_samples.jsonl", "data/store_xhs_heldout.jsonl"),
    ("data/store_posts_en_samples.jsonl", "data/store_posts_en_heldout.jsonl"),
)
ROW_KEYS = ["instruction", "input", "output"]
GRAM_LENGTH = 4
# Measured on the bundled rows: unrelated posts reach 0.04 (Chinese) and 0.12 (English); one with a third of
# another's text gets 0.15 to 0.28, with half of it 0.28 to 0.42, and a copy with new facts 0.33 or more.
NEAR_DUPLICATE_JACCARD = 0.2
Fault = tuple[str, int, str]  # path, line, message


class Language(NamedTuple):
    """What differs between Chinese and English rows."""

    fields: tuple[str, str, str, str, str, str]  # name, category, address, hours, highlights, price
    styles: tuple[str, ...]
    shortest: int  # in the units of units_of(): characters for Chinese, words for English
    longest: int
    opening: int  # two outputs must not share this many leading units


CHINESE_FIELDS = ("店名", "品类", "地址", "营业时间", "亮点", "人均")
ENGLISH_FIELDS = ("Name", "Category", "Address", "Hours", "Highlights", "Price")
CHINESE_STYLES = ("甜美", "干货", "幽默", "文艺", "专业")
ENGLISH_STYLES = ("sweet", "practical", "funny", "poetic", "professional")
CHINESE = Language(CHINESE_FIELDS, CHINESE_STYLES, shortest=90, longest=320, opening=8)
ENGLISH = Language(ENGLISH_FIELDS, ENGLISH_STYLES, shortest=45, longest=150, opening=4)

EMOJI = re.compile("[\u231a-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]")
HASHTAG_LINE = re.compile(r"#[^\s#]+(?: #[^\s#]+)*")

# Only plain numbers: 三四十 (thirty or forty) has no one value, and 15:00两次 must not become 15:002次.
DIGIT = "[一二两三四五六七八九]"
NUMERAL = re.compile(rf"(?<!{DIGIT}|\d)(?:(?:{DIGIT}?[十百千]零?)+{DIGIT}?|{DIGIT})(?!{DIGIT}|\d)")
DIGIT_VALUES = {"": 1, "两": 2} | {digit: value for value, digit in enumerate("零一二三四五六七八九")}
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("￥"): "¥"}

# The patterns below run over text made plain(). They ask for a unit or another sign of money or time, since
# a false alarm for each 3点建议 or 切成4块 would have the check switched off.
NUMBER = r"(\d+(?:\.\d+)?)"
RANGE = rf"{NUMBER}(?:[-–—~至到]{NUMBER})?"
MONEY = (
    rf"(?:[¥$€£]|rmb|cny|usd|人均)\s?{RANGE}",
    rf"(?<![\d.几数]){RANGE}\s?(?:万?元(?![素旦宵月宝气老件])|块钱|yuan\b|rmb|dollars?\b|bucks?\b)",
    r"(?<![\d.成])(\d{2,})块(?=[起,。;!?)\s]|$)",
)
DAYTIME = "[凌清]晨|[早晚]上|[上中下]午|午后|傍晚|[夜日]里|[深半]夜|[今每]晚|次日|[早晚夜从到至](?!1点)"
CLOCK = (
    r"(?<![\d:])(\d{1,2}):([0-5]\d)(?![\d:])",
    r"(?<![\d:.$])(\d{1,2})()\s?(?:[ap]\.?m\b|o'clock)",
    rf"(?:{DAYTIME})(\d{{1,2}})点(半|\d{{2}}|)",
    r"(?<!\d)(\d{1,2})点(半|\d{2}(?![\d元])|(?=[整钟]))",
    r"(?<![\d.])([5-9]|1\d|2[0-4])点(半|\d{2}|)(?![建理心注提])",
)


class Row(NamedTuple):
    """One well-formed sample and where it stands."""

    path: str
    line: int
    instruction: str
    facts: dict[str, str]
    output: str
    language: Language
    rules: dict[str, Any]


def numeral_value(match: re.Match[str]) -> str:
    parts = re.findall("([^十百千]?)([十百千]?)", match[0])
    powers = [(DIGIT_VALUES[digit], "_十百千".index(unit or "_")) for digit, unit in parts if digit or unit]
    return str(sum(digit * 10**power for digit, power in powers))


def plain(text: str) -> str:
    """Write equal numbers equally, so that 晚上八点 and 20:00, or ￥1,200 and 一千二百元, can be compared."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # before 21:00，150元 gets the same comma
    return NUMERAL.sub(numeral_value, text.translate(HALF_WIDTH).lower())


def money_amounts(text: str) -> dict[float, str]:
    """The sums that plain text names, each with the words that name it."""
    matches = [match for pattern in MONEY for match in re.finditer(pattern, text)]
    return {float(number): match[0] for match in matches for number in match.groups() if number}


def clock_times(text: str) -> dict[float, str]:
    """The times in plain text as minutes within a half day: a post may say 8 pm where the facts say 20:00."""
    matches = [match for pattern in CLOCK for match in re.finditer(pattern, text)]
    minutes = [30 if match[2] == "半" else int(match[2] or 0) for match in matches]
    return {(int(m[1]) * 60 + minute) % 720: m[0] for m, minute in zip(matches, minutes, strict=True)}


def invented_facts(row: Row) -> Iterator[str]:
    """Name the money amounts and clock times of the output that the facts do not hold.

    Sums and scene-setting times count too: they teach a small model to make up numbers. A bare number in the
    facts makes a price known, except in the address, and in the hours (10-18) a time.
    """
    _, _, address, hours, _, _ = row.language.fields
    facts, output = plain("\n".join(row.facts.values())), plain(row.output)
    priced = plain("\n".join(value for field, value in row.facts.items() if field not in (address, hours)))
    known_amounts = {*money_amounts(facts), *map(float, re.findall(NUMBER, priced))}
    bare_hours = re.findall(r"(?<![\d:周期])\d{1,2}(?![\d:])", plain(row.facts.get(hours, "")))
    known_times = {*clock_times(facts), *(int(hour) * 60 % 720 for hour in bare_hours)}
    invented_amounts = [words for value, words in money_amounts(output).items() if value not in known_amounts]
    invented_times = [words for time, words in clock_times(output).items() if time not in known_times]
    yield from (f"money amount not in the input: {words}" for words in invented_amounts)
    yield from (f"clock time not in the input: {words}" for words in invented_times)


def styles_of(row: Row) -> list[str]:
    """The allowed style words of the instruction; a sound one has exactly one."""
    bound = "" if row.language is CHINESE else r"\b"
    return [s for s in row.language.styles if re.search(bound + s + bound, row.instruction.lower())]


def units_of(row: Row) -> list[str]:
    """What length and opening are counted in: characters without white space, or words without lone emoji."""
    words = row.output.lower().split()
    return list("".join(words)) if row.language is CHINESE else [w for w in words if re.search(r"\w", w)]


def wrong_form(row: Row) -> Iterator[str]:
    """What can be seen on the row alone, apart from its facts."""
    language, length, lines = row.language, len(units_of(row)), row.output.split("\n")
    for field, value in row.facts.items():
        if field not in language.fields or not value:
            yield f"input field is empty or unknown: {field}"
    if len(styles_of(row)) != 1:
        yield f"instruction must name one style of {' '.join(language.styles)}: {row.instruction}"
    if not EMOJI.search(lines[0]):
        yield f"title has no emoji: {lines[0]}"
    if len(lines) < 3 or not HASHTAG_LINE.fullmatch(lines[-1]):
        yield f"output must be a title, a body and a last line of hashtags only, not: {lines[-1]}"
    try:
        form = form_of(row.rules, f'"{COLUMN}"')
    except UserError as error:
        yield str(error)
    else:
        kept = kept_rules(form, row.output) if form else {}
        yield from (f"output breaks its own rule of form: {rule}" for rule, keeps in kept.items() if not keeps)
    if not language.shortest <= length <= language.longest:
        yield f"output is {length} long, not {language.shortest}-{language.longest}"


def parse_row(path: str, line: int, text: bytes) -> Row:
    """Raise ValueError, with the reason, for a line on which the other checks would make no sense."""
    try:
        record = json.loads(text.decode())
    except ValueError as error:
        raise ValueError(f"invalid JSON: {error}") from error
    if not isinstance(record, dict) or list(record) not in (ROW_KEYS, [*ROW_KEYS, COLUMN]):
        raise ValueError(f"must be an object with the keys {', '.join(ROW_KEYS)} in this order, then {COLUMN} or none")
    if not all(isinstance(record[key], str) and record[key].strip() for key in ROW_KEYS):
        raise ValueError("each value must be text that is not empty")
    pairs = [fact.replace("：", ":").partition(":") for fact in record["input"].split("\n")]
    facts = {field.strip(): value.strip() for field, _, value in pairs}
    language = next((known for known in (CHINESE, ENGLISH) if facts.get(known.fields[0])), None)
    if language is None:
        raise ValueError("input must hold a line 店名：… or Name: …")
    return Row(path, line, record["instruction"], facts, record["output"], language, record)


def repeated(rows: Sequence[Row], what: str, key: Callable[[Row], Hashable]) -> Iterator[Fault]:
    first: dict[Hashable, Row] = {}
    for row in rows:
        earlier = first.setdefault(key(row), row)
        if earlier is not row:
            yield row.path, row.line, f"same {what} as {earlier.path}:{earlier.line}"


def near_duplicates(rows: Sequence[Row]) -> Iterator[Fault]:
    texts = [" ".join(row.output.lower().split()) for row in rows]
    grams = [{text[i : i + GRAM_LENGTH] for i in range(len(text) - GRAM_LENGTH + 1)} for text in texts]
    for (earlier, some), (row, others) in combinations(zip(rows, grams, strict=True), 2):
        likeness = len(some & others) / len(some | others)
        if likeness > NEAR_DUPLICATE_JACCARD:
            yield row.path, row.line, f"near-duplicate {likeness:.2f} of {earlier.path}:{earlier.line}"


def check_rows(rows: Sequence[Row]) -> Iterator[Fault]:
    """Check the rows of a training file and its held-out file together: no shop may stand in both."""
    for row in rows:
        yield from ((row.path, row.line, message) for message in (*wrong_form(row), *invented_facts(row)))
    yield from repeated(rows, "shop name", lambda row: row.facts[row.language.fields[0]].lower())
    yield from repeated(rows, "whole output", lambda row: row.output)
    distinct = list({row.output: row for row in reversed(rows)}.values())[::-1]
    yield from repeated(distinct, "opening", lambda row: tuple(units_of(row)[: row.language.opening]))
    yield from near_duplicates(distinct)


def summary(path: str, rows: Sequence[Row], fault_count: int) -> str:
    lengths = [len(units_of(row)) for row in rows] or [0]
    spread = f"{min(lengths)}/{statistics.median(lengths):g}/{max(lengths)}"
    counts = Counter(style for row in rows for style in styles_of(row)).most_common()
    styles = " ".join(f"{style} {count}" for style, count in counts)
    return f"{path:<40} {len(rows):>5} {spread:>12} {fault_count:>6}  {styles}"


def check_files(paths: Sequence[Path]) -> tuple[list[Fault], list[str]]:
    """Give the faults of one set of files, in their order, and a line of the table for each file."""
    rows: list[Row] = []
    faults: list[Fault] = []
    names = [str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path) for path in paths]
    for path, name in zip(paths, names, strict=True):
        for number, text in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), 1):
            try:
                rows.append(parse_row(name, number, text))
            except ValueError as error:
                faults.append((name, number, str(error)))
    faults = sorted([*faults, *check_rows(rows)], key=lambda fault: (names.index(fault[0]), fault[1]))
    counts = Counter(path for path, _, _ in faults)
    return faults, [summary(name, [r for r in rows if r.path == name], counts[name]) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check instruction-tuning samples (JSONL).")
    parser.add_argument("train", nargs="?", type=Path, help="training file; default: the bundled pairs")
    parser.add_argument("--heldout", type=Path, help="held-out file to compare the training file with")
    options = parser.parse_args(argv)
    if options.heldout and not options.train:
        parser.error("--heldout needs a training file")
    named = [path for path in (options.train, options.heldout) if path]
    file_sets = [named] if named else [[ROOT / name for name in pair] for pair in BUNDLED_PAIRS]
    for path in (path for paths in file_sets for path in paths):
        if not path.is_file():
            parser.error(f"no such file: {path}")
    checked = [check_files(paths) for paths in file_sets]
    for path, line, message in (fault for faults, _ in checked for fault in faults):
        print(f"{path}:{line}: {message}")
    print(f"{'file':<40} {'rows':>5} {'length':>12} {'faults':>6}  styles (length: min/median/max)")
    print("\n".join(line for _, lines in checked for line in lines))
    return 1 if any(faults for faults, _ in checked) else 0


if __name__ == "__main__":
    raise SystemExit(main())
