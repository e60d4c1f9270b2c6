"""The commands: exit codes, messages, and that wrong usage is told before anything heavy is loaded or written."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, write_jsonl

from qingtune import __version__
from qingtune.cli import COMMANDS, main, usage

HEAVY = (
    "torch", "transformers", "numpy", "peft", "accelerate", "bitsandbytes", "matplotlib", "pyarrow", "datasets",
    "prompt_toolkit",
)  # fmt: skip


def call(*argv: str | Path) -> tuple[int, str, str]:
    """Run a command in this process; returns its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.stdin", io.StringIO()):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the command runs, with nothing in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def assert_refused(folder: Path, argv: tuple[str | Path, ...], *messages: str) -> None:
    """The command ends with 2, says why on stderr alone, and leaves no file in the folder."""
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    for message in messages:
        assert message in err.partition("error: ")[2]
    assert list(folder.iterdir()) == []


# --- Help and version ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [("--help",), ("-h",), ("help",)])
def test_usage_names_the_commands(argv: tuple[str, ...]) -> None:
    assert call(*argv) == (0, usage() + "\n", "")
    for command in COMMANDS:
        assert f"\n  {command} " in usage()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: qingtune {command} ")


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option: str) -> None:
    assert call(option) == (0, f"qingtune {__version__}\n", "")


@pytest.mark.parametrize("command", ["infer", "chat", "merge", "export", "evaluate"])
def test_a_whole_model_is_no_adapter(empty: Path, tiny: Callable[..., Path], data_file: Path, command: str) -> None:
    more = {"evaluate": ("--output_dir", "out", "--data", data_file)}.get(command, ("--output_dir", "out"))
    flags = () if command in ("infer", "chat") else more
    message = f"{tiny()}: this is a whole model, not an adapter. Pass it as --base_model"
    assert_refused(empty, (command, "--lora_model", tiny(), *flags), message)


def test_module_without_arguments_shows_usage(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ended = run("-m", "qingtune")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == usage().replace("qingtune COMMAND", f"{sys.executable} -m qingtune COMMAND") + "\n"


WATCHED = f"""
import runpy, sys
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("ended with", stop.code, file=sys.stderr)
print("loaded", sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("argv", "code", "shown"),
    [
        (("fine_tune_qwen.py", "--help"), 0, " fine_tune_qwen.py [--name value"),
        (("inference_lora.py", "--help"), 0, " inference_lora.py [--name value"),
        (("fine_tune_qwen.py", "--lora_rnak", "8"), 2, '"lora_rnak" is not a setting'),
        (("inference_lora.py", "--temperature", "hot"), 2, '"temperature" is "hot"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_help_and_checks_load_nothing_heavy(
    run: Callable[..., subprocess.CompletedProcess[str]], argv: tuple[str, ...], code: int, shown: str
) -> None:
    ended = run("-c", WATCHED, *argv)
    assert shown in (ended.stdout if code == 0 else ended.stderr)
    assert ended.stderr.endswith(f"ended with {code}\nloaded []\n")


def test_error_in_a_process_of_its_own(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ended = run("fine_tune_qwen.py", "--config_file", "configs/none.json")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: configs/none.json: there is no such file. Check the path.\n"


# --- Wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("zzz",), f'"zzz" is not a command. The commands are {", ".join(COMMANDS)}.'),
        (("chek",), f'"chek" is not a command. Did you mean "check"? The commands are {", ".join(COMMANDS)}.'),
        (("--lora_r", "8"), '"--lora_r" is not a command'),
        (("train",), "data_path is missing"),
        (("train", "stray.json"), '"stray.json" is not a flag'),
        (("train", "--config_file", "none.json"), "none.json: there is no such file"),
        (("train", "--data_path", "t.jsonl", "--lora_rnak", "8"), 'Did you mean "lora_r"?'),
        (("infer", "--load_in_4bit", "--load_in_8bit"), "load_in_4bit and load_in_8bit are both given"),
        (("infer", "--prompt_file", "none.jsonl"), "none.jsonl: there is no such file"),
        (("infer", "--prompt", "q", "--prompt_file", "none.jsonl"), "prompt and prompt_file are both given"),
        (("chat", "--prompt", "q"), "chat and prompt are both given"),
        (("infer", "--prompt", "q", "--output_file", "a.jsonl"), "output_file needs prompt_file"),
        (("infer", "--lora_model", "."), ".: no adapter_config.json here"),
        (("chat", "--lora_model", "none"), "none: there is no such folder"),
        (("infer", "--lora_model", "none"), "none: there is no such folder"),
        (("infer", "--base_model", "./none", "--prompt", "q"), "./none: no model folder"),
        (("infer", "--use_lora"), '--use_lora: "use_lora" is not a setting'),
        (("chat", "--temperature", "hot"), '--temperature: "temperature" is "hot"'),
        (("merge", "--lora_model", "none", "--output_dir", "out"), "none: there is no such folder"),
        (("export", "--lora_model", "none", "--output_dir", "out"), "none: there is no such folder"),
        (("evaluate", "--data", "x.jsonl"), "--output_dir is missing"),
        (("evaluate", "--output_dir", "out", "--base_model", "x"), "--data is missing"),
        (("evaluate", "--output_dir", "out", "--base_model", "x", "--data", "none.jsonl"), "there is no such file"),
        (("export", "--output_dir", "out"), "no model was given. Pass --lora_model"),
        (("export", "--base_model", "x", "--output_dir", "o", "--quantize", "q5"), '--quantize: "quantize" is "q5"'),
        (("report", "--output_dir", "none"), "none: no training run here"),
        (("push", "--folder", "none", "--repo", "me/mine"), "none: there is no such folder"),
        (("push", "--folder", "none", "--repo", "mine"), '--repo: "repo" is "mine": should be OWNER/NAME'),
        (("export", "--base_model", "x", "--output_dir", ""), '--output_dir: "output_dir" is ""'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage_is_refused(empty: Path, argv: tuple[str, ...], message: str) -> None:
    assert_refused(empty, argv, message)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps a folder in which a process works")
def test_a_current_folder_that_was_removed_is_named(
    tiny: Callable[..., Path], empty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--base_model", str(tiny()), "--output_dir", str(tmp_path / "out")]
    empty.rmdir()
    assert main(argv) == 2
    assert capsys.readouterr().err.endswith("error: the current folder was removed. Change to another one.\n")


def test_merge_names_all_that_is_missing(empty: Path) -> None:
    assert_refused(empty, ("merge",), "--lora_model is missing", "--output_dir is missing")


def test_flag_without_its_value_is_refused(empty: Path) -> None:
    code, out, err = call("train", "--data_path", "t.jsonl", "--lora_r")
    assert (code, out) == (2, "")
    assert "--lora_r" in err
    assert list(empty.iterdir()) == []


def test_all_missing_data_files_are_named(empty: Path) -> None:
    argv = ("train", "--data_path", "a.jsonl,b.csv", "--eval_data_path", "c.json")
    flags = {"a.jsonl": "data_path", "b.csv": "data_path", "c.json": "eval_data_path"}
    messages = (f"{name}: there is no such file. Check --{flag}.\n" for name, flag in flags.items())
    assert_refused(empty, argv, *messages)


def test_training_without_its_model_is_refused(empty: Path, data_file: Path) -> None:
    argv = ("train", "--data_path", data_file, "--model_name_or_path", "./none", "--report_to", "none")
    assert_refused(empty, argv, "./none: no model folder")


def test_missing_model_tells_what_was_tried_and_three_ways_on(empty: Path) -> None:
    ways = ("models/none-such", "Hugging Face", "ModelScope", ".gguf", "HF_ENDPOINT", "--hub modelscope")
    assert_refused(empty, ("infer", "--base_model", "nobody/none-such", "--prompt", "q"), "was not found", *ways)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data_path", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--eval_data_path", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--val_size", "20"), "val_size holds out all 20 rows"),
        (("--report_to", "zzz"), '"zzz" is not a tracker'),
        (("--use_lora", "--lora_target_modules", "q_prj"), "q_proj"),
        (("--max_seq_length", "8"), "no sample is left"),
        (("--resume_from_checkpoint", "none"), "none: there is no such checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_training_is_refused_before_anything_is_written(
    empty: Path, tiny: Callable[..., Path], data_file: Path, flags: tuple[str, ...], message: str
) -> None:
    quiet = ("--report_to", "none", "--output_dir", "out")
    argv = ("train", "--model_name_or_path", tiny(), "--data_path", data_file, *quiet, *flags)
    assert_refused(empty, argv, message)


def test_faulty_rows_are_listed_and_nothing_is_trained(empty: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "bad.jsonl", [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": ""}]
    )
    argv = ("train", "--model_name_or_path", tiny(), "--data_path", data, "--report_to", "none")
    assert_refused(empty, argv, f'{data}:2: "output" is empty', "(1 of 2 rows.)", "--on_bad_row skip")


@pytest.mark.parametrize("flags", [(), ("--overwrite_output_dir",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("command", ["train", "merge", "export"])
def test_folder_of_other_files_is_left_alone(
    empty: Path, tiny: Callable[..., Path], data_file: Path, tmp_path: Path, command: str, flags: tuple[str, ...]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work", encoding="utf-8")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    what = {
        "train": ("--model_name_or_path", tiny(), "--data_path", data_file, "--report_to", "none"),
        "merge": ("--base_model", tiny(), "--lora_model", adapter),
        "export": ("--base_model", tiny()),
    }
    assert_refused(empty, (command, *what[command], "--output_dir", theirs, *flags), f"{theirs}: output_dir contains")
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]
    assert (theirs / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_output_folder_that_is_a_file_is_left_alone(
    empty: Path, tiny: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    note.write_text("mine", encoding="utf-8")
    argv = ("train", "--model_name_or_path", tiny(), "--data_path", data_file, "--output_dir")
    assert_refused(empty, (*argv, note), f"{note}: output_dir is a file")
    assert_refused(empty, (*argv, note / "below"), "output_dir cannot be written")
    assert note.read_text(encoding="utf-8") == "mine"


# --- The guide's commands, as processes of their own -----------------------------------------------------------------


def test_the_guides_two_scripts(
    run: Callable[..., subprocess.CompletedProcess[str]], tiny: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output_lora"
    where = ("--model_name_or_path", tiny(), "--data_path", data_file, "--output_dir", output)
    how = ("--use_lora", "--lora_r", "64", "--lora_alpha", "16", "--learning_rate", "1e-4", "--max_steps", "1")
    ended = run("fine_tune_qwen.py", *where, *how)
    assert ended.returncode == 0, ended.stderr
    together = ("--base_model", tiny(), "--lora_model", output)
    assert f"Chat with it: {sys.executable} inference_lora.py --chat {' '.join(map(str, together))}\n" in ended.stdout
    ended = run("-c", WATCHED, "fine_tune_qwen.py", *where, *how)  # again: it is seen at once that nothing is to do
    assert f"This run is already finished; its result is in {output}." in ended.stderr
    assert ended.stderr.endswith("ended with 0\nloaded []\n")
    ended = run("inference_lora.py", *together, "--prompt", "hi", "--max_new_tokens", "4")
    assert ended.returncode == 0, ended.stderr
    assert "tok/s" in ended.stderr


def test_benchmarks_run_in_a_clone_that_is_not_installed(
    empty: Path, tiny: Callable[..., Path], run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = ROOT / "benchmarks" / "train.py"
    done = run(script, "--model", tiny(), "--systems", "LoRA", "--repeats", "0", cwd=empty, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "| system |" in done.stdout
