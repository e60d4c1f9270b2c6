"""`qingtune plan`: settings and a model's header -> memory and time of a run; no weights are read."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qingtune.config.commands import PlanConfig
from qingtune.config.load import Loaded
from qingtune.data.format import Conversation, read_conversations
from qingtune.data.prepare import check_files_exist
from qingtune.data.rules import rules_of
from qingtune.data.tokenizer_calls import panics_as_errors
from qingtune.data.tokenizer_limits import check_tokenizer_file, has_foreign_patterns
from qingtune.errors import UserError
from qingtune.files.write import disk_errors
from qingtune.kernels.footprint import PassTokens
from qingtune.machine.resources import Machine, find_machine, supposed_gpu
from qingtune.models.find import CONVERTED, cache_folder, find_header
from qingtune.output.console import give
from qingtune.output.units import counted
from qingtune.planning.blueprint import read_blueprint
from qingtune.planning.planner import Samples, fullest_group, most_tokens_of, training_batches
from qingtune.planning.report import as_json, as_lines, make_report
from qingtune.planning.speed import read_speeds

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens that a chat template puts around a message, and at a sample's beginning; ChatML takes 5 and a system message.
TEMPLATE_A_MESSAGE, TEMPLATE_A_SAMPLE = 5, 24


def plan(loaded: Loaded[PlanConfig], _command: str) -> None:
    """Print the plan.

    Raises:
        UserError: the model, its header or the data cannot be read, or a setting names what the model has not.
    """
    config = loaded.config
    check_files_exist({"data_path": config.data_path, "eval_data_path": config.eval_data_path})
    source = find_header(config.model_name_or_path, config.cache_dir, config.hub)
    blueprint = read_blueprint(source.path)
    if config.gpu_memory_gib is not None and config.calibrate:
        raise UserError("calibrate measures this machine, but the plan is for another one", fix="Remove one of them.")
    machine = find_machine(config.bf16, config.fp16)
    if config.gpu_memory_gib is not None:
        machine = supposed_gpu(config.gpu_memory_gib)
    cache = cache_folder(config.cache_dir)
    if config.calibrate:
        from qingtune.planning.calibrate import calibrate

        with disk_errors("the speed of this machine", cache, "Choose another cache_dir."):
            calibrate(cache, machine)
    samples = suppose_samples(config, blueprint.context, machine, source.path)
    report = make_report(source.name, blueprint, config, machine, samples, read_speeds(cache))
    if config.json_report:
        give(json.dumps(as_json(report), ensure_ascii=False, indent=2))
    else:
        give("\n".join(as_lines(report)))


def suppose_samples(config: PlanConfig, context: int | None, machine: Machine, model: Path) -> Samples:
    """The sizes of the data: counted if there is a tokenizer, otherwise an upper bound.

    Args:
        context: tokens that the model knows positions for; None if unknown.
        model: its folder or file.
    """
    limit = min(config.max_seq_length, context or config.max_seq_length)
    if not config.data_path:
        return Samples(limit, limit, 1.0, None, config.has_evaluation, "max_seq_length; no data given")
    reading = read_conversations(config.data_path, config.system_prompt, "skip", rules_of(config))
    path = tokenizer_file(model, cache_folder(config.cache_dir))
    tokenizer = None if path is None else _open_tokenizer(path)
    if tokenizer is not None:
        trained, all_tokens = _count(reading.conversations, tokenizer)
        share = min(1.0, trained / sum(all_tokens))
        basis = "samples counted, their template guessed"
    else:
        share, all_tokens = 1.0, [len(_text(row).encode()) + _around(row) for row in reading.conversations]
        basis = "samples, at most one token per byte, because there is no tokenizer"
    kept = [n for n in all_tokens if n <= limit or tokenizer is None or config.on_long == "truncate"]
    if not kept:
        raise UserError(
            f"every sample is longer than {limit:,} tokens",
            where=", ".join(config.data_path),
            fix="Raise max_seq_length, or pass --on_long truncate.",
        )
    left_out = len(reading.faults) + len(all_tokens) - len(kept)
    basis += f"; {counted(left_out, 'row')} skipped" * bool(left_out)
    lengths = [min(n, limit) for n in kept]
    batches, most_tokens = training_batches(len(lengths), config), most_tokens_of(machine)
    group = fullest_group(lengths, batches, most_tokens)
    tokens = sum(lengths[number] for number in group)
    if config.method == "full" or not config.lora_dropout:  # beginnings that are computed once leave room for others
        tokens = max(tokens, min(most_tokens, max(sum(lengths[number] for number in batch) for batch in batches)))
    return Samples(
        longest=max(lengths),
        mean=sum(lengths) / len(lengths),
        trained_share=share,
        count=len(lengths),
        evaluates=config.has_evaluation,
        basis=f"{len(lengths):,} {basis}",
        lengths=tuple(lengths),
        fullest=PassTokens(tokens, round(share * tokens), max(lengths[number] for number in group)),
    )


def tokenizer_file(model: Path, cache: Path) -> Path | None:
    """The tokenizer of a model's folder, or of a .gguf file that an earlier run converted."""
    folders = [model] if model.is_dir() else list((cache / CONVERTED).glob(f"{glob.escape(model.stem)}-*"))
    found = [folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()]
    return found[0] if len(found) == 1 else None  # of several, it is not known which is this file's


def _text(row: Conversation) -> str:
    return row.text if row.text is not None else "".join(message.content for message in row.messages)


def _around(row: Conversation) -> int:
    """Tokens that a template adds to a row."""
    return 0 if row.text is not None else TEMPLATE_A_SAMPLE + TEMPLATE_A_MESSAGE * len(row.messages)


def _open_tokenizer(path: Path) -> Tokenizer | None:
    """A tokenizer to count with; None where it is not known how long it takes."""
    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            if has_foreign_patterns(check_tokenizer_file(path)):
                return None
            tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library's own class is Exception itself
        raise UserError(f"the tokenizer cannot be read ({error})", where=str(path)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _count(rows: list[Conversation], tokenizer: Tokenizer) -> tuple[int, list[int]]:
    """Tokens of all answers and texts, which are trained, and of each row with what a template adds."""

    def counts(texts: list[str]) -> list[int]:
        with panics_as_errors():
            return [len(encoding) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    whole = [count + _around(row) for count, row in zip(counts([_text(row) for row in rows]), rows, strict=True)]
    answers = counts(["".join(m.content for m in row.messages if m.role == "assistant") for row in rows])
    texts = sum(count for count, row in zip(whole, rows, strict=True) if row.text is not None)
    return texts + sum(answers), whole
