"""Malformed data and configuration files as users make them, and a check that each ends in a message that helps.

`DATA` goes through `qingtune check --strict`, `CONFIGS` through `qingtune train --config_file`. A good message comes
with exit code 2 and without a traceback, names the place, fits on a screen, and the folder is left as it was. Every
configuration names a model that is not there: a complaint about that one means that the fault itself went through.
Run without arguments it checks everything.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qingtune.cli import WRONG_USAGE, main  # noqa: E402
from qingtune.config.no_effect import ONLY_IDLE  # noqa: E402
from qingtune.config.training import ALIASES, TrainConfig  # noqa: E402

MODEL = "./no-such-model"
CONFIG_FILE = "train.json"
MOST_LINES, LINE_WIDTH = 40, 120  # a line of ten thousand characters is no shorter than the lines it fills
Entry = tuple[str, bytes, "int | None"]  # file name, content, the line to be named; None where no line is wanted

# --- Data ------------------------------------------------------------------------------------------------------------

CHINESE = '{"instruction": "写一条探店笔记", "input": "", "output": "这家面包店真香！"}'
CSV = b"instruction,input,output\n"
DEEP = 100_000
LONG = "x" * DEEP


def _line(values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


ALPACA: dict[str, object] = {"instruction": "Write a post about a bakery.", "input": "", "output": "Warm bread daily!"}
GOOD = _line(ALPACA)


def _second(bad: bytes) -> Entry:
    """A good row, then the faulty line."""
    return "rows.jsonl", GOOD + bad + b"\n", 2


def _value(text: bytes) -> Entry:
    """The output of the second row as it is written in JSON."""
    return _second(b'{"instruction": "Write.", "input": "", "output": ' + text + b"}")


def _list(bad: bytes) -> Entry:
    """A JSON list whose first item is good."""
    return "rows.json", b"[" + GOOD.strip() + b",\n" + bad, 2


def _csv(bad: bytes, line: int = 3) -> Entry:
    """A header, a good row, then the faulty one."""
    return "rows.csv", CSV + b"Write a post.,,Warm bread.\n" + bad, line


def _gzipped(entry: Entry) -> Entry:
    name, content, line = entry
    return f"{name}.gz", gzip.compress(content, mtime=0), line


def _all_rows(**values: object) -> Entry:
    return "rows.jsonl", _line(values) * 2, 1


def _faulty(good: Mapping[str, object], name: str, *values: object) -> dict[str, Entry]:
    """An entry for each value: a good row, then one that has this value under the name."""
    return {
        f"{name} is {_shown(value)}": ("rows.jsonl", _line(good) + _line({**good, name: value}), 2) for value in values
    }


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 160 else f"{text[:80]}...{text[-40:]}"


def _turns(column: str, role: str, content: str, user: str, assistant: str) -> dict[str, Entry]:
    """Turns broken in each way."""
    names = {"s": "system", "u": user, "a": assistant, "t": "tool"}
    orders = "", "u", "s", "a", "su", "uau", "aua", "uaa", "usa", "suas", "ta"
    question, answer = {role: user, content: "Open today?"}, {role: assistant, content: "Until eight."}
    after_question = (
        {content: "Until eight."},
        {role: assistant},
        *({role: name, content: "Yes."} for name in ("narrator", "function_call", assistant.title(), 1, None, LONG)),
        *({role: assistant, content: text} for text in ("", " \n", None, 8, ["Yes."], [{"type": "text", "text": "a"}])),
        {role: assistant, content: "", "tool_calls": [{"id": "1"}]},
        {role: assistant, content: "Until eight.", "weight": 0},
        {role: assistant, content: "Until eight.", "loss": False},
        {role: assistant, content: "Until eight.", "reasoning_content": "It is Monday."},
        {role: assistant, content: [{"type": "image_url", "image_url": {"url": "a.jpg"}}]},
        "Until eight.",
    )
    return _faulty(
        {column: [question, answer]},
        column,
        *([{role: names[key], content: "Well."} for key in order] for order in orders),
        *([question, turn] for turn in after_question),
        *(None, {}, 5, question, json.dumps([question, answer])),
    )


def _parquet(line: int | None, *columns: tuple[str, Any]) -> Entry:
    file = io.BytesIO()
    table = pyarrow.table([pyarrow.array(values) for _, values in columns], names=[name for name, _ in columns])
    pyarrow.parquet.write_table(table, file)
    return "rows.parquet", file.getvalue(), line


def _text_in_gbk() -> Any:
    """A column that claims to be text, as writers make it that do not look at the bytes."""
    parts = pyarrow.array([b"Bread.", "面包".encode("gbk")], pyarrow.binary()).buffers()
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, parts)


def _times(at: int, unit: str) -> Any:
    return pyarrow.array([at, at], pyarrow.timestamp(unit))


_WRITE = ("instruction", ["Write.", "Write."])
_WHOLE = _parquet(None, _WRITE, ("output", ["Bread.", "Rolls."]))[1]
_ZIPPED = gzip.compress(GOOD * 200, mtime=0)
_GAP = ("output", ["Bread.", ""])
_EMPTY: Any = pyarrow.array([], "string")

_ENCODINGS: dict[str, Entry] = {
    "JSONL in GBK": ("rows.jsonl", f"{CHINESE}\n".encode("gbk"), 1),
    "JSONL whose second row is in GBK": _second(CHINESE.encode("gbk")),
    "JSON list in GBK": _list(CHINESE.encode("gbk") + b"]"),
    "CSV from a Chinese Excel": _csv("写一条笔记,,真香！\n".encode("gbk")),
    "JSONL in Latin-1": _second('{"instruction": "Order", "output": "Un café crème"}'.encode("latin-1")),
    "UTF-16 with BOM": ("rows.jsonl", CHINESE.encode("utf-16"), None),
    "UTF-16 without BOM": ("rows.jsonl", GOOD.decode().encode("utf-16-le"), 1),
    "CSV as Unicode text from Excel": ("rows.csv", "instruction\toutput\r\n写\t香\r\n".encode("utf-16"), None),
    "a character cut in half": _value(b'"\xe9\x9d"'),
    "broken UTF-8 in a JSON list": _list(b'{"instruction": "a", "output": "\xff\xfe"}]'),
    "a character cut at the end of the file": _csv(b"Write.,,Bread \xe9\x9d"),
    "a BOM in the middle, from joining files": _second(b"\xef\xbb\xbf" + GOOD.strip()),
}
_JSON: dict[str, Entry] = {
    "a row cut off": _second(GOOD[:40]),
    "a list cut off in a text": _list(GOOD[:40]),
    "a trailing comma in a row": _value(b'"Bread.",'),
    "a trailing comma in a list": _list(b"]"),
    "commas between the rows of JSONL": ("rows.jsonl", (GOOD.strip() + b",\n") * 2, 1),
    "no comma between the rows of a list": ("rows.json", b"[" + GOOD + GOOD + b"]", 2),
    "single quotes, from print(row)": _second(str(ALPACA).encode()),
    "Python's None": _value(b"None"),
    "a comment": _second(b"// the next rows are new"),
    "two rows on a line": _second(GOOD.strip() + b" " + GOOD.strip()),
    "old line ends of a Mac": ("rows.jsonl", GOOD.replace(b"\n", b"\r") * 2, 1),
    "rows one after another in .json": ("rows.json", GOOD * 2, None),
    "a row over several lines": ("rows.jsonl", json.dumps(ALPACA, indent=2).encode(), 1),
    "text after the list": ("rows.json", b"[" + GOOD.strip() + b"]\nend", 2),
    "a line end in a text": _second(b'{"instruction": "Write.", "output": "Warm\nbread."}'),
    "Windows line ends and a row cut off": ("rows.jsonl", GOOD.replace(b"\n", b"\r\n") + GOOD[:30] + b"\r\n", 2),
    "a null byte": _value(b'"Warm\0bread."'),
    "null bytes from a lost disk": _second(b"\0" * 64),
    "a number of thousands of digits": _value(b"1" * 5000),
    "nested a hundred thousand deep": _value(b"[" * DEEP + b"]" * DEEP),
    "a list nested a hundred thousand deep": _list(b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"]"),
    "a row of 17 MB": _value(b'"' + b"x" * 17_000_000 + b'"'),
    "a row of 17 MB in a list": _list(b'{"instruction": "' + b"x" * 17_000_000),
    "a row of 17 MB, gzipped": _gzipped(_value(b'"' + b"x" * 17_000_000 + b'"')),
    "a row of 1,002 turns": _all_rows(
        messages=[{"role": "assistant" if n % 2 else "user", "content": "Yes."} for n in range(1002)]
    ),
    "a key that comes twice": _value(b'"Bread.", "output": "Rolls."'),
    "a key that comes twice in a list": _list(b'{"instruction": "a", "output": "b", "output": "c"}]'),
    "half a surrogate pair": _value(rb'"Bread \ud83c"'),
    "half a surrogate pair in a repeated key": _value(rb'"Bread.", "\ud83c": 1, "\ud83c": 2'),
    "half a surrogate pair in an unused column": ("rows.jsonl", _line({"\ud83c": 1, **ALPACA}) + b"{}\n", 2),
    **{f"a row that is {row}": _second(row.encode()) for row in ('["Bread."]', '"Bread."', "5", "true", "null", "NaN")},
    "a list of lists": _list(b'["Write.", "Bread."]]'),
    "an object for a list": ("rows.json", _line({"data": [ALPACA]}), None),
}
_ROWS: dict[str, Entry] = {
    "unknown columns": _all_rows(question="Open today?", answer="Until eight."),
    "no instruction column": _all_rows(input="Open today?", output="Until eight."),
    "rows of preferences": _all_rows(prompt="Open today?", chosen="Yes, until eight.", rejected="No."),
    "rows of preferences as turns": _all_rows(
        conversations=[{"from": "human", "value": "Open today?"}],
        chosen={"from": "gpt", "value": "Yes."},
        rejected="No.",
    ),
    "answers labelled bad": _all_rows(prompt="Open today?", completion="No idea.", label=False),
    "texts with labels": _all_rows(text="Lovely bread.", label=1),
    "matching texts": _all_rows(query="bread", pos=["rolls"], neg=["cars"]),
    "prompts for reinforcement learning": _all_rows(prompt="2 + 2", ground_truth="4"),
    **_faulty(ALPACA, "images", ["shop.jpg"], "shop.jpg"),
    **_faulty(ALPACA, "tools", [{"name": "order"}], '[{"name": "order"}]'),
    **_faulty(ALPACA, "label", False, "false", 0),
    **_faulty(ALPACA, "weight", 0, 0.5),
    **_faulty(ALPACA, "chosen", "Warm bread."),
    **_faulty(ALPACA, "context", "The shop opens at nine."),
    "columns in capitals": _all_rows(Instruction="Write.", Input="", Output="Bread."),
    "a column name of a hundred thousand characters": _all_rows(**{LONG: "Bread."}),
    "a misspelt column in one row": _second(b'{"instruction": "Write.", "ouput": "Bread."}'),
    "no instruction in one row": _second(b'{"output": "Bread."}'),
    **_faulty(ALPACA, "output", None, 5, True, float("nan"), float("-inf"), ["Bread."], {"a": "b"}, "", " \n\u3000"),
    **_faulty(ALPACA, "output", "\u200b", "Warm bread.<|im_end|>", "Bread.</s>"),
    **_faulty(ALPACA, "instruction", "", None, 5, "[INST] Write a post. [/INST]"),
    **_faulty(ALPACA, "input", ["a", "b"], float("nan"), {"a": "b"}),
    **_faulty(ALPACA, "system", 5, ["Be brief."]),
    **_faulty(ALPACA, "history", "Open today? Yes.", {"Open today?": "Yes."}, [["Open today?"]], ["a", "b"], 5),
    **_faulty(ALPACA, "history", [["Open today?", None]], [["Open today?", ""]], [["a", "b", "c"]]),
    **_faulty({"text": "Bread."}, "text", "", None, 5, ["Bread."], "Bread.<|endoftext|>"),
    **_faulty({"prompt": "a", "completion": "b"}, "completion", "", None, 8, [], [{"role": "user", "content": "b"}]),
    **_faulty({"prompt": "a", "completion": "b"}, "prompt", "", None, [{"role": "user", "content": "a"}]),
    **_turns("messages", "role", "content", "user", "assistant"),
    **_turns("conversations", "from", "value", "human", "gpt"),
    "a system message as a turn and as a column": _all_rows(
        conversations=[{"from": name, "value": "Yes?"} for name in ("system", "human", "gpt")], system="Be brief."
    ),
}
_CSV: dict[str, Entry] = {
    "CSV: a row too short": _csv(b"Write a post.,Warm bread.\n"),
    "CSV: a row too long": _csv(b"Write a post.,,Warm bread, rolls and cake.\n"),
    "CSV: a quote never closed": _csv(b'Write.,,"Warm bread.\n' + b"Write.,,Rolls.\n" * 50),
    "CSV: a cell of 17 MB": _csv(b"Write.,," + b"x" * 17_000_000 + b"\n"),
    "CSV: quotes in quotes": _csv(b'Write.,,"He said "fresh" twice."\n'),
    "CSV: two columns of one name": ("rows.csv", b"instruction,output,output\nWrite.,Bread.,Rolls.\n", 1),
    "CSV: semicolons between names alone": ("rows.csv", CSV.replace(b",", b";") + b"Write.,,Bread.\n", 2),
    "CSV: no header": ("rows.csv", b"Write a post.,,Warm bread.\n" * 2, 2),
    "CSV: only a header": ("rows.csv", CSV, None),
    "CSV: an empty line before the header": ("rows.csv", b"\n" + CSV + b"Write.,,Bread.\n", 2),
    "CSV: an empty answer after one of two lines": _csv(b'Write.,,"Warm\r\nbread."\r\nWrite.,,\r\n', 5),
    "CSV: null bytes at the end": _csv(b"\0" * 64),
    "CSV: an Excel file": ("rows.csv", b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\xb5\xd1\x9f\xe9\n", 1),
    "CSV: gzipped, a row too short": _gzipped(_csv(b"Write a post.\n")),
}
_FILES: dict[str, Entry] = {
    "an empty file": ("rows.jsonl", b"", None),
    "only blank lines": ("rows.jsonl", b"\n \r\n\n", None),
    "only a BOM": ("rows.jsonl", b"\xef\xbb\xbf", None),
    "an empty list": ("rows.json", b"[]\n", None),
    "nothing, gzipped": _gzipped(("rows.jsonl", b"", None)),
    "an unknown suffix": ("rows.txt", GOOD, None),
    "another compression": ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd", None),
    "a web page": ("rows.jsonl", b"<!DOCTYPE html>\n<html>\n<title>404</title>\n</html>\n", 1),
    "a pointer of Git LFS": ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\nsize 8123\n", 1),
    "gzip without .gz": ("rows.jsonl", _ZIPPED, 1),
    "gzip cut off": ("rows.jsonl.gz", _ZIPPED[:-30], None),
    "gzip with a wrong checksum": ("rows.jsonl.gz", _ZIPPED[:-8] + b"\0\0\0\0" + _ZIPPED[-4:], None),
    "gzip with broken data": ("rows.csv.gz", _ZIPPED[:20] + b"\xff" * 20 + _ZIPPED[40:], None),
    "no gzip at all": ("rows.jsonl.gz", GOOD, None),
    "gzipped twice": ("rows.jsonl.gz", gzip.compress(_ZIPPED, mtime=0), 1),
    "gzipped list cut off": _gzipped(_list(GOOD[:40])),
    "Parquet: no Parquet": ("rows.parquet", GOOD, None),
    "Parquet: empty": ("rows.parquet", b"", None),
    "Parquet: cut off": ("rows.parquet", _WHOLE[: len(_WHOLE) // 2], None),
    "Parquet: broken end": ("rows.parquet", _WHOLE[:-40] + b"\xff" * 32 + _WHOLE[-8:], None),
    "Parquet: broken pages": ("rows.parquet", _WHOLE[:4] + b"\xff" * 60 + _WHOLE[64:], None),
    "Parquet: gzip cut off": ("rows.parquet.gz", gzip.compress(_WHOLE, mtime=0)[:-20], None),
    "Parquet: no rows": _parquet(None, ("instruction", _EMPTY), ("output", _EMPTY)),
    "Parquet: wrong columns": _parquet(1, ("question", ["a"]), ("answer", ["b"])),
    "Parquet: numbers for answers": _parquet(1, _WRITE, ("output", [1, 2])),
    "Parquet: a null answer": _parquet(2, _WRITE, ("output", ["Bread.", None])),
    "Parquet: an empty answer, gzipped": _gzipped(_parquet(2, _WRITE, ("output", ["Bread.", " "]))),
    "Parquet: turns as a text of JSON": _parquet(1, ("messages", ['[{"role": "user", "content": "Open today?"}]'])),
    "Parquet: a turn without content": _parquet(1, ("messages", [[{"role": "user"}, {"role": "assistant"}]])),
    "Parquet: text in GBK": _parquet(None, _WRITE, ("output", _text_in_gbk())),
    "Parquet: two columns of one name": _parquet(None, _WRITE, _GAP, ("output", ["Bread.", "Rolls."])),
    "Parquet: an empty answer next to nanoseconds": _parquet(2, _WRITE, _GAP, ("at", _times(10**18 + 1, "ns"))),
    "Parquet: an empty answer next to the year 75,000": _parquet(2, _WRITE, _GAP, ("at", _times(2**61, "us"))),
}
# Other systems do not let a file have such a name, which unpacking an archive from a Chinese Windows makes.
_NAMES: dict[str, Entry] = {"a file name in GBK": ("rows\udcc4\udce3.jsonl", _value(b'""')[1], None)}

DATA: dict[str, Entry] = _ENCODINGS | _JSON | _ROWS | _CSV | _FILES | (_NAMES if sys.platform == "linux" else {})

# --- Configurations --------------------------------------------------------------------------------------------------


def _config(settings: Mapping[str, object]) -> bytes:
    """A file that is right but for these settings."""
    right = {"data_path": "rows.jsonl", "model_name_or_path": MODEL, "use_lora": True}
    return json.dumps({**right, **settings}, indent=1).encode()


_RIGHT = _config({})
_INSIDE = _RIGHT[:-2]  # without the closing brace, for what json.dumps would not write
_BROKEN: dict[str, bytes] = {
    "an empty file": b"",
    "only a BOM": b"\xef\xbb\xbf",
    "no JSON": b"Train on rows.jsonl with LoRA, please.\n",
    "YAML": b"data_path: rows.jsonl\nuse_lora: true\n",
    "Python": str({"data_path": "rows.jsonl", "use_lora": True}).encode(),
    "Python's True": _INSIDE + b',\n "bf16": True\n}',
    "cut off": _RIGHT[:-10],
    "comments": _INSIDE + b', // LoRA\n "lora_r": 8\n}',
    "a comment as in a shell": b"# LoRA\n" + _RIGHT,
    "a trailing comma": _INSIDE + b",\n}",
    "two objects": _RIGHT + b"\n" + _RIGHT,
    "a BOM and a trailing comma": b"\xef\xbb\xbf" + _INSIDE + b",\n}",
    **{f"only {text}": text.encode() for text in ("[]", '"rows.jsonl"', "5", "null", "true")},
    "UTF-16": _RIGHT.decode().encode("utf-16"),
    "UTF-16 without BOM": _RIGHT.decode().encode("utf-16-le"),
    "GBK": _INSIDE + ',\n "system_prompt": "你是探店博主"\n}'.encode("gbk"),
    "a setting twice": _INSIDE + b',\n "use_lora": false\n}',
    "null bytes": _RIGHT + b"\0" * 16,
    "a null byte in a text": _INSIDE + b',\n "system_prompt": "a\0b"\n}',
    "a number of thousands of digits": _INSIDE + b',\n "lora_r": ' + b"1" * 5000 + b"\n}",
    "nested a hundred thousand deep": _INSIDE + b',\n "lora_r": ' + b"[" * DEEP + b"]" * DEEP + b"\n}",
    "1e999": _INSIDE + b',\n "learning_rate": 1e999\n}',
    "no data_path": _line({"model_name_or_path": MODEL}),
}
_SETTINGS: dict[str, dict[str, object]] = {
    "an older name and today's": {"evaluation_strategy": "no", "eval_strategy": "epoch"},
    "bf16 and fp16": {"bf16": True, "fp16": True},
    "both kinds of evaluation data": {"eval_data_path": "rows.jsonl", "val_size": 0.1},
    "the best without evaluations": {"load_best_model_at_end": True, "eval_strategy": "no", "val_size": 0.1},
    "many faults at once": {"lora_rnak": 8, "lora_r": 0, "optim": "lion", "bf16": True, "fp16": True, "max_steps": 0},
}
# Typos, names of other tools and of other commands.
_UNKNOWN = (
    *("lora_rnak", "learning_rte", "data_paths", "Learning_Rate", "lora-r", "--lora_r", "lora_r ", "", "学习率"),
    *("epochs", "batch_size", "cutoff_len", "model", "load_in_4bit", "torch_dtype", "\ud83c", LONG),
)
_LONE: tuple[tuple[str, object], ...] = (
    *(("max_seq_length", 4), ("seed", 2**32), ("val_size", 1.5), ("lora_r", 10**400), ("eval_strategy", "steps")),
    *(("lr_scheduler_type", "cosine_with_restarts"), ("lr_scheduler_kwargs", {"num_cycles": 2}), ("data_seed", 7)),
    *(("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5), ("metric_for_best_model", "accuracy")),
    *(("report_to", "tensorbord"), ("system_prompt", "Bread \ud83c"), ("lora", {"lora_r": 8, "lora_alpha": 16})),
)
# Settings of a kind, and values that none of them takes.
_KINDS: dict[str, tuple[object, ...]] = {
    "lora_r max_seq_length seed per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "max_steps logging_steps eval_steps save_steps save_total_limit dataloader_num_workers": (
        *(True, "many", 2.5, [8], {"value": 8}, -2, float("inf")),
    ),
    "lora_alpha lora_dropout val_size num_train_epochs learning_rate warmup_steps warmup_ratio weight_decay "
    "max_grad_norm adam_beta1 adam_beta2 adam_epsilon": (
        *(False, "fast", [0.1], {"value": 0.1}, -0.1, float("nan"), float("inf")),
    ),
    "use_lora use_qlora overwrite_output_dir load_best_model_at_end greater_is_better bf16 fp16 remove_unused_columns "
    "gradient_checkpointing": (2, "maybe", [True], {"value": True}),
    "hub quantization_bit on_long on_bad_row lr_scheduler_type optim eval_strategy save_strategy "
    "metric_for_best_model": ("best of all", 3, True, ["steps"], {"value": "steps"}),
    "model_name_or_path cache_dir output_dir system_prompt": (5, True, ["out"], {"value": "out"}),
    "data_path eval_data_path report_to lora_target_modules": (5, True, [1, 2], {"value": "out"}),
    "model_name_or_path output_dir hub use_lora lora_r num_train_epochs optim save_strategy data_path": (None,),
    "model_name_or_path output_dir optim lora_r data_path": ("",),
    "lora_r lora_alpha num_train_epochs learning_rate max_steps logging_steps per_device_train_batch_size": (0,),
    "lora_dropout adam_beta1 adam_beta2": (1, 5),
    "data_path eval_data_path": ("absent.jsonl", ".", "rows\0.jsonl", "x" * 10_000),
    "output_dir": ("rows.jsonl", "rows.jsonl/out", ".", "out\0put", "x" * 10_000),
    "optim": ("adamw_hf", LONG),
    "lora_target_modules": ({}, False),
    "resume_from_checkpoint": (500, ["last"], "out/checkpoint-500"),
    "load_best_model_at_end greater_is_better push_to_hub use_cpu adafactor full_determinism": (True,),
    "deepspeed": (3, ["zero2.json"]),
}


def _all_kinds() -> list[tuple[str, object]]:
    return [(name, value) for names, values in _KINDS.items() for name in names.split() for value in values]


CONFIGS: dict[str, bytes] = (
    _BROKEN
    | {name: _config(settings) for name, settings in _SETTINGS.items()}
    | {f"unknown name {_shown(name)}": _config({name: 8}) for name in _UNKNOWN}
    | {f"{name} = {_shown(value)}": _config({name: value}) for name, value in (*_LONE, *_all_kinds())}
)

# --- The check -------------------------------------------------------------------------------------------------------


def check_data(folder: Path) -> list[str]:
    """A line for each way in which a faulty data file is dealt with badly; files are written below `folder`."""
    violations: list[str] = []
    for number, (name, (file, content, line)) in enumerate(DATA.items()):
        place = _fresh(folder / f"data-{number}", {file: content})
        code, out, err, changed = _run(["check", "--data", file, "--strict"], place)
        wrong = [*_general(code, err, changed), *_too_long(out + err)]
        if not _names_place(out + err, file, line):
            wrong.append(f"does not name {file!a}" + (f":{line}" if line else ""))
        violations += [f"data, {name}: {what}" for what in wrong]
    return violations


def check_configs(folder: Path) -> list[str]:
    """The same for configurations."""
    violations: list[str] = []
    for number, (name, content) in enumerate(CONFIGS.items()):
        place = _fresh(folder / f"config-{number}", {CONFIG_FILE: content, "rows.jsonl": GOOD})
        code, _, err, changed = _run(["train", "--config_file", CONFIG_FILE], place)
        message = err[max(err.find("error: "), 0) :]  # notices before it name settings too
        wrong = [*_general(code, err, changed), *_too_long(err)]
        if MODEL in message:
            wrong.append("accepted: only the model is complained of")
        elif CONFIG_FILE not in message and not _SETTING.search(message):
            wrong.append(f"names neither the file nor a setting: {_shortened(message)}")
        violations += [f"config, {name}: {what}" for what in wrong]
    return violations


_SETTING = re.compile(rf"(?<!\w)(?:{'|'.join({*TrainConfig.model_fields, *ALIASES, *ONLY_IDLE})})(?!\w)")
Snapshot = dict[str, "tuple[int, bytes] | None"]


def _fresh(place: Path, files: Mapping[str, bytes]) -> Path:
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


def _run(argv: Sequence[str], place: Path) -> tuple[int, str, str, list[str]]:
    """Run a command in a folder: its exit code, stdout, stderr, and what is not as before there.

    The streams are as strict as Python's own at a UTF-8 terminal: what cannot be encoded breaks stdout, not stderr.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    before, home = _snapshot(place), Path.cwd()
    os.chdir(place)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(argv)
    except SystemExit as error:  # argparse ends the process itself
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os.chdir(home)
    after = _snapshot(place)
    changed = sorted(name for name in {*before, *after} if before.get(name, 0) != after.get(name, 0))
    return code, _text_of(out), _text_of(err), changed


def _snapshot(place: Path) -> Snapshot:
    """Everything below a folder; folders have no content."""
    return {
        str(path.relative_to(place)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in place.rglob("*")
    }


def _text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    written = stream.buffer
    assert isinstance(written, io.BytesIO)
    return written.getvalue().decode("utf-8", "surrogateescape")


def _general(code: int, err: str, changed: Sequence[str]) -> list[str]:
    """What is wrong whatever the fault was."""
    wrong = [f"exit code {code}, not {WRONG_USAGE}"] * (code != WRONG_USAGE)
    if "Traceback" in err:
        wrong.append(f"traceback: {_shortened(err.strip().splitlines()[-1])}")
    return wrong + [f"created, changed or removed {name!a}" for name in changed]


def _too_long(message: str) -> list[str]:
    lines = sum(max(1, -(-len(line) // LINE_WIDTH)) for line in message.splitlines())
    return [f"the message fills {lines:,} lines of {LINE_WIDTH} characters"] * (lines > MOST_LINES)


def _names_place(message: str, file: str, line: int | None) -> bool:
    """Whether the file is named, as it is or with escapes for what cannot be encoded, and its line if one is wanted."""
    names = {file, file.encode("utf-8", "backslashreplace").decode()}
    after = "" if line is None else rf":{line}(?!\d)"
    return any(re.search(rf"(?<![\w.]){re.escape(name)}{after}", message) for name in names)


def _shortened(text: str) -> str:
    return ascii(text.strip())[1:-1][:160]


def _check_all() -> int:
    with tempfile.TemporaryDirectory() as folder:
        violations = [*check_data(Path(folder)), *check_configs(Path(folder))]
    print(f"{len(DATA)} data files, {len(CONFIGS)} configurations, {len(violations)} violations")
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(_check_all())
