"""The commands. Imports are lazy: --help and the checks of settings never load torch."""

from __future__ import annotations

import errno
import gc
import importlib
import sys
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qingtune import __version__
from qingtune.config.commands import (
    CheckConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    InferConfig,
    MergeConfig,
    PlanConfig,
    PushConfig,
    ReportConfig,
)
from qingtune.config.flags import parse_flags
from qingtune.config.load import Loaded, check_flags, did_you_mean, load_config
from qingtune.config.training import Settings, TrainConfig
from qingtune.errors import UserError
from qingtune.machine.signals import Terminated, unwinding
from qingtune.output.console import OutputClosed, give, guarded_output, lost_output, open_standard_streams, say
from qingtune.output.invocation import program, shown

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
UNREAD = 141  # as of programs that end with SIGPIPE when `| head` has seen enough
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last one at a limit as `ulimit -f` sets it


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        purpose: a line of help.
        settings: what it takes; with those of training among them, a configuration file too.
        function: the name, in commands/, of the module and of its function that does it, imported only then. It is
            given the settings, or where a file is taken, what was loaded and the command that resumes it; it may
            return an exit code.
        flags: given before those typed.
    """

    purpose: str
    settings: type[Settings]
    function: str
    flags: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("Fine-tune a model by full training, LoRA or QLoRA.", TrainConfig, "train"),
    "infer": Command("Answer prompts with a model, with or without an adapter.", InferConfig, "infer"),
    "chat": Command("Chat with a model, with or without an adapter.", InferConfig, "infer", ("--chat",)),
    "merge": Command("Merge an adapter into its base model.", MergeConfig, "merge"),
    "export": Command("Write a model as GGUF for llama.cpp and Ollama.", ExportConfig, "export"),
    "push": Command("Upload a folder to Hugging Face or ModelScope; without --confirm, a preview.", PushConfig, "push"),
    "report": Command("Rewrite a training run's report.html.", ReportConfig, "report"),
    "evaluate": Command("Measure a model on data, before and after training.", EvaluateConfig, "evaluate"),
    "check": Command("Check a data set without training.", CheckConfig, "check"),
    "plan": Command("Estimate the memory and time of a run.", PlanConfig, "plan"),
    "compare": Command("Train methods or settings on the same data, and compare them.", CompareConfig, "compare"),
}


def usage() -> str:
    """The help that lists the commands."""
    lines = [f"  {name:<8} {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {shown(program('COMMAND'))} [--name value ...]",
            "",
            "commands:",
            *lines,
            "",
            f"`{shown(program('COMMAND'))} --help` lists a command's settings.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 nobody read,
    128 + the number of a signal that ended it before anything could be saved.

    Args:
        argv: the command and its flags; sys.argv's by default.
    """
    open_standard_streams()
    with guarded_output():
        try:
            with unwinding():
                return _run([*(sys.argv[1:] if argv is None else argv)])
        except UserError as error:
            say(f"error: {error}")
            return WRONG_USAGE
        except OutputClosed:
            return UNREAD
        except KeyboardInterrupt as ended:  # with a message where it is known what was saved
            say(str(ended) or "interrupted")
            return INTERRUPTED
        except Terminated as ended:
            say(f"ended by {ended.name}")
            return int(ended.code or FAILED)
        except SystemExit:  # of --help
            if any(lost.startswith("stdout") for lost in lost_output()):
                return FAILED
            raise
        except BaseException as error:  # a fault of ours, or Rust's panic; Python would show it past the redaction
            if reason := _why_the_system_refused(error):
                say(f"error: {reason}")
                return WRONG_USAGE
            say(traceback.format_exc())
            return FAILED


def _why_the_system_refused(error: BaseException) -> str | None:
    """What the machine lacks, and a fix; None where the error is another one."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"{error.filename or 'writing'}: {error.strerror}. Free disk space."
    if (isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN) or (
        isinstance(error, RuntimeError) and str(error).startswith("can't start new thread")
    ):
        return (
            "the system does not allow this user more processes or threads. "
            "Raise the limit (ulimit -u), or end other programs."
        )
    if isinstance(error, FileNotFoundError) and not _current_folder_exists():
        return "the current folder was removed. Change to another one."
    return None


def _current_folder_exists() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _run(argv: Sequence[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        give(usage())
    elif name in ("-V", "--version"):
        give(f"qingtune {__version__}")
    elif name in COMMANDS:
        return _run_command(name, rest)
    else:
        commands = f"The commands are {', '.join(COMMANDS)}."
        fix = " ".join(filter(None, (did_you_mean(name, COMMANDS), commands)))
        raise UserError(f'"{name}" is not a command', fix=fix)
    return DONE


def _run_command(name: str, argv: Sequence[str]) -> int:
    command = COMMANDS[name]
    as_training = issubclass(command.settings, TrainConfig)
    words, called = [*command.flags, *argv], shown(program(name))
    config_file, flags = parse_flags(command.settings, called, command.purpose, words, config_file=as_training)
    if not issubclass(command.settings, TrainConfig):
        given = (check_flags(command.settings, flags),)
    else:
        loaded = load_config(command.settings, config_file, flags)
        # The command that resumes this one must not overwrite its output.
        keep = ["--overwrite_output_dir", "false"] if loaded.config.overwrite_output_dir else []
        given = (loaded, shown([*program(name), *argv, *keep]))
        if name == "train":
            return _train(*given)
    with _without_collection():
        module = importlib.import_module(f"qingtune.commands.{command.function}")
    return getattr(module, command.function)(*given) or DONE


@contextmanager
def _without_collection() -> Generator[None]:
    """Import without Python's search for cycles, which takes a fifth of the time of torch and Transformers."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _train(loaded: Loaded[TrainConfig], command: str) -> int:
    """Train, but first look without torch whether that is done already."""
    from qingtune.training.finished import already_finished, is_surely_finished

    if is_surely_finished(loaded.config):
        say("\n".join([*loaded.notices, already_finished(Path(loaded.config.output_dir))]))
        return DONE

    with _without_collection():
        from qingtune.commands.train import train
    return DONE if train(loaded.config, notices=loaded.notices, command=command) else INTERRUPTED
