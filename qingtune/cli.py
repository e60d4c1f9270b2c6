"""The commands. Imports are lazy: --help and the checks of settings never load torch."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from qingtune import __version__
from qingtune.config import CheckConfig, ExportConfig, InferConfig, MergeConfig, PushConfig, TrainConfig
from qingtune.config_load import check_flags, load_train_config
from qingtune.errors import UserError
from qingtune.flags import parse_flags
from qingtune.redaction import redacted_output

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}

USAGE = """usage: qingtune COMMAND [--name value ...]

commands:
  train   fine-tune a model by full training, LoRA or QLoRA
  infer   answer prompts with a model, with or without an adapter
  chat    talk to a model
  merge   write base model and adapter as one model
  export  write a model, with or without an adapter, as GGUF for llama.cpp and Ollama
  push    upload a folder to Hugging Face or ModelScope; shows what it would do first
  check   report on a data set without training

`qingtune COMMAND --help` lists a command's settings."""


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Args:
        argv: the command and its flags; sys.argv's by default.
        program: the name to show in help and hints, where it is not `qingtune COMMAND`.
    """
    with redacted_output():
        try:
            return _run([*(sys.argv[1:] if argv is None else argv)], program)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG_USAGE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except OSError as error:
            if error.errno not in _NO_ROOM:
                traceback.print_exc()
                return FAILED
            print(f"error: {error.filename or 'writing'}: {error.strerror}. Make room on the disk.", file=sys.stderr)
            return WRONG_USAGE
        except Exception:  # a fault of ours; Python would show it past the redaction
            traceback.print_exc()
            return FAILED


def _run(argv: Sequence[str], program: str | None) -> int:
    command, *rest = argv or ["--help"]
    commands = {
        "train": _train, "infer": _infer, "chat": _chat, "merge": _merge,
        "export": _export, "push": _push, "check": _check,
    }  # fmt: skip
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command in ("-V", "--version"):
        print(f"qingtune {__version__}")
    elif command not in commands:
        raise UserError(f'"{command}" is not a command', fix=f"The commands are {', '.join(commands)}.")
    else:
        return commands[command](rest, program or f"qingtune {command}")
    return DONE


def _train(argv: Sequence[str], program: str) -> int:
    config_file, flags = parse_flags(
        TrainConfig, program, "Fine-tune a model by full training, LoRA or QLoRA.", argv, config_file=True
    )
    loaded = load_train_config(config_file, flags)
    from qingtune.finetune import finetune

    again = f"{'python ' * program.endswith('.py')}{program} {shlex.join(argv)}"
    chat = "python inference_lora.py --chat" if program.endswith(".py") else "qingtune chat"
    finished = finetune(loaded.config, notices=loaded.notices, command=again, chat_command=chat)
    return DONE if finished else INTERRUPTED


def _infer(argv: Sequence[str], program: str) -> int:
    _, flags = parse_flags(InferConfig, program, "Answer prompts with a model, with or without an adapter.", argv)
    config = check_flags(InferConfig, flags)
    from qingtune.inference import infer

    infer(config)
    return DONE


def _chat(argv: Sequence[str], program: str) -> int:
    return _infer(["--chat", *argv], program)


def _merge(argv: Sequence[str], program: str) -> int:
    _, flags = parse_flags(MergeConfig, program, "Write base model and adapter as one model.", argv)
    config = check_flags(MergeConfig, flags)
    from qingtune.merge import merge

    merge(config)
    return DONE


def _export(argv: Sequence[str], program: str) -> int:
    _, flags = parse_flags(ExportConfig, program, "Write a model as GGUF for llama.cpp and Ollama.", argv)
    config = check_flags(ExportConfig, flags)
    from qingtune.export import export

    export(config)
    return DONE


def _push(argv: Sequence[str], program: str) -> int:
    _, flags = parse_flags(PushConfig, program, "Upload a folder to Hugging Face or ModelScope.", argv)
    config = check_flags(PushConfig, flags)
    from qingtune.push import push

    push(config, again=f"{program} {shlex.join(argv)}")
    return DONE


def _check(argv: Sequence[str], program: str) -> int:
    _, flags = parse_flags(CheckConfig, program, "Report on a data set without training.", argv)
    config = check_flags(CheckConfig, flags)
    from qingtune.check import check

    return WRONG_USAGE if check(config) and config.strict else DONE
