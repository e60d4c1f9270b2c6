"""The recipe of evaluating: losses and answers of a model, before and after training, and what they say.

Each model in turn goes over the rows and writes what it made of each as a line of predictions_before.jsonl or
predictions_after.jsonl; the metrics are made of these files alone. So a stopped evaluation resumes at the row at
which it stopped, and a model with a complete file is not loaded again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qingtune.answering.answer_file import ROWS_A_SLOT, SLOTS, AnswerFile, Question, answer_file, answer_questions
from qingtune.answering.score import score_sample
from qingtune.answering.speaker import Speaker, check_bits, prepare_speaker
from qingtune.answering.thinking import split_thinking
from qingtune.config.commands import EvaluateConfig, InferConfig
from qingtune.data.faults import faulty_rows
from qingtune.data.prepare import check_files_exist
from qingtune.data.prompts import EvaluationRow, asked_rows
from qingtune.data.read import Fault
from qingtune.data.rules import rules_of
from qingtune.data.tokenize import Sample, Template, tokenize
from qingtune.errors import UserError, raise_all
from qingtune.evaluation.form import form_of, kept_rules
from qingtune.evaluation.metrics import Outcome
from qingtune.evaluation.report import MARKDOWN, RESULT, About, Side, print_report, write_report
from qingtune.files.digests import sha256_of
from qingtune.files.json_files import INDEX_BYTES, read_object_if_there
from qingtune.files.paths import refuse_same_file
from qingtune.files.write import disk_errors, write_json
from qingtune.kernels.device import give_back_memory
from qingtune.machine.signals import Terminated
from qingtune.models.find import find_model, fingerprint, is_here
from qingtune.models.load import local_folder
from qingtune.output.console import labelled, say, show
from qingtune.output.quiet import quieten
from qingtune.output.units import counted
from qingtune.runs.folder import only_run_in
from qingtune.runs.page.source import PREDICTIONS
from qingtune.runs.page.write import write_page
from qingtune.runs.record import SETTINGS, read_record

BEFORE, AFTER = "before", "after"
SHOWN_PROBLEMS = 10
HARNESS = "lm_eval==0.4.13"  # the extra of pyproject.toml


@dataclass(frozen=True)
class Prepared:
    """A row for one model: the samples that give its loss, and what it is asked; None for plain text."""

    asked: EvaluationRow
    samples: list[Sample]
    question: Question | None


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate what the settings name; the table goes to stdout, everything else to stderr and output_dir.

    Raises:
        UserError: any error that the user can fix.
    """
    quieten()
    _check(config)
    output_dir = Path(config.output_dir)
    speakers = _speakers(config)
    rows = _read(config, speakers[AFTER].system_prompt)
    with only_run_in(output_dir):
        if config.overwrite_output_dir:
            for name in (RESULT, MARKDOWN, *PREDICTIONS, *_unfinished(BEFORE), *_unfinished(AFTER)):
                (output_dir / name).unlink(missing_ok=True)
        sides: dict[str, Side] = {}
        try:
            for name in list(speakers):
                sides[name] = _go_through(name, speakers.pop(name), rows, config)
                give_back_memory()
        except (KeyboardInterrupt, Terminated):
            without = " without --overwrite_output_dir" * config.overwrite_output_dir
            say(f"Stopped; to resume, run the same command{without}.")
            raise
        about = About(
            data={path: sha256_of(Path(path)) for path in config.data or []},
            rows=len(rows),
            references=sum(row.reference is not None for row in rows),
            settings=config.model_dump(mode="json"),
        )
        with disk_errors("the evaluation", output_dir, "Free disk space and run the same command again."):
            changes = write_report(output_dir, about, sides)
        for name in sides:
            for kept in _unfinished(name):
                (output_dir / kept).unlink(missing_ok=True)
        if (output_dir / SETTINGS).exists():  # a run's own folder
            write_page(output_dir)
    print_report(about, changes, sides)
    show(f"Written: {output_dir}")


def _check(config: EvaluateConfig) -> None:
    """Look for what is wrong before anything is loaded."""
    if not config.data and not config.lm_eval:
        raise UserError("--data is missing", fix="Pass a data file, for example --data data/store_xhs_heldout.jsonl.")
    if config.base_model is None and config.lora_model is None:
        raise UserError("no model was given", fix="Pass --base_model, --lora_model, or both.")
    if config.only_after and config.before_model:
        raise UserError("only_after and before_model are both given", fix="Choose one.")
    check_bits(config)
    check_files_exist({"data": config.data})
    for name in (RESULT, MARKDOWN, *PREDICTIONS):
        data = {"a data file": [Path(path) for path in config.data or []]}
        refuse_same_file(Path(config.output_dir) / name, "output_dir", data)
    if config.lm_eval:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-evaluation-harness is not installed (lm_eval)", fix=f"pip install {HARNESS}")
        from qingtune.evaluation.harness import find_tasks

        find_tasks(config.lm_eval)
    output_dir = Path(config.output_dir)
    if (output_dir / RESULT).exists() and not config.overwrite_output_dir:
        raise UserError(
            "output_dir contains a finished evaluation",
            where=str(output_dir),
            fix="Choose another one, or pass --overwrite_output_dir.",
        )


def _unfinished(side: str) -> tuple[str, str]:
    """The files of a model's part that are kept until the evaluation is whole."""
    return f"predictions_{side}.jsonl.unfinished.json", f"lm_eval_{side}.json"


# --- The models ------------------------------------------------------------------------------------------------------


def _to_infer(config: EvaluateConfig, base: str | None, adapter: str | None, system_prompt: str | None) -> InferConfig:
    """How answers are made: greedily, and without the repetition penalty that a model may bring."""
    shared = ("cache_dir", "hub", "allow_other_base", "load_in_4bit", "load_in_8bit", "max_new_tokens")
    return InferConfig(
        **{name: getattr(config, name) for name in shared},
        base_model=base,
        lora_model=adapter,
        system_prompt=system_prompt,
        temperature=0,
        top_p=1,
        top_k=0,
        repetition_penalty=1,
    )


def _speakers(config: EvaluateConfig) -> dict[str, Speaker]:
    """The models in the order in which they are loaded; both are given the same prompts."""
    slots = 1 if config.skip_generation else min(SLOTS, config.limit or SLOTS)
    after = prepare_speaker(_to_infer(config, config.base_model, config.lora_model, config.system_prompt), slots)
    name = None if config.only_after else config.before_model or _base_of(config, after)
    if name is None:
        return {AFTER: after}
    before = prepare_speaker(_to_infer(config, name, None, None), slots)
    system = after.system_prompt
    identity = before.identity | {"system_prompt": system}
    return {BEFORE: replace(before, system_prompt=system, plain=after.plain, identity=identity), AFTER: after}


def _base_of(config: EvaluateConfig, after: Speaker) -> str | None:
    """What the model was trained from, if that is known and on this machine."""
    if config.lora_model:
        return str(after.base)
    record = read_record(after.base)
    if record is None:
        return None
    fix = "Pass the model to compare with as --before_model."
    if not is_here(record.base_model, config.cache_dir, config.hub):
        say(f"Compared with nothing: {record.base_model}, the base it was trained from, is not on this machine. {fix}")
        return None
    base = local_folder(find_model(record.base_model, config.cache_dir, config.hub), config.cache_dir)
    if fingerprint(base) != record.base_fingerprint:
        say(f"Compared with nothing: {base} is not the base it was trained from (its weights differ). {fix}")
        return None
    return str(base)


# --- The rows --------------------------------------------------------------------------------------------------------


def _read(config: EvaluateConfig, system_prompt: str | None) -> list[EvaluationRow]:
    """The rows to evaluate on; a UserError where there are none, or rows or their rules are faulty."""
    rows: list[EvaluationRow] = []
    faults: list[Fault] = []
    rules = rules_of(config)
    read = (row for path in config.data or [] for row in asked_rows(path, system_prompt, rules))
    for row in read:
        if isinstance(row, Fault):
            faults.append(row)
        else:
            try:
                form_of(row.values, row.origin)  # checked before hours go into answers
                rows.append(row)
            except UserError as error:
                faults.append(Fault(row.origin, " ".join(filter(None, (f"{error.what}.", error.fix)))))
        if len(rows) == config.limit:
            break
    if faults:
        raise faulty_rows(faults, len(rows) + len(faults), fix="Fix or remove the rows.")
    if config.data and not rows:
        raise UserError("no row to evaluate on", where=", ".join(config.data))
    return rows


# --- A model over the rows -------------------------------------------------------------------------------------------


def _go_through(name: str, speaker: Speaker, rows: Sequence[EvaluationRow], config: EvaluateConfig) -> Side:
    """What one model makes of the rows."""
    output_dir = Path(config.output_dir)
    identity = {
        **speaker.identity,
        "data": [sha256_of(Path(path)) for path in config.data or []],
        "limit": config.limit,
        "max_seq_length": config.max_seq_length,
        "skip_generation": config.skip_generation,
    }
    path = output_dir / f"predictions_{name}.jsonl"
    if rows:
        file = AnswerFile(path, identity, overwrite=False, setting="output_dir")
        if file.rows_there() < len(rows):
            prepared = _prepare(speaker, rows, min(config.max_seq_length, speaker.context_length))
            with labelled(name):
                answer_file(file, len(rows), lambda done: _records(speaker, prepared[done:], config))
    harness = _run_harness(name, speaker, identity, config) if config.lm_eval else None
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if rows else []
    asks = not config.skip_generation
    outcomes = [_outcome(row, json.loads(line), asks=asks) for row, line in zip(rows, lines, strict=True)]
    too_long = [
        row.origin for row, one in zip(rows, outcomes, strict=True)
        if row.conversation is not None and not one.trained_tokens
    ]  # fmt: skip
    model = f"{speaker.base} + {config.lora_model}" if name == AFTER and config.lora_model else str(speaker.base)
    model += f", in {speaker.identity['bits']} bits" if speaker.identity["bits"] else ""
    return Side(model, identity, outcomes, too_long, harness)


def _prepare(speaker: Speaker, rows: Sequence[EvaluationRow], longest: int) -> list[Prepared]:
    """The rows in the model's tokens, all of them before hours go into the first; a UserError names those that the
    template cannot express, or that leave no room for an answer."""
    prepared: list[Prepared] = []
    problems: list[UserError] = []
    for asked in rows:
        try:
            samples = _samples(speaker.template, asked, longest)
            question = None
            if asked.prompt is not None:
                ids = speaker.ids(asked.prompt)
                question = Question(asked.values, ids, speaker.within_context(ids, speaker.decoding))
            prepared.append(Prepared(asked, samples, question))
        except UserError as error:
            problems.append(UserError(error.what, where=asked.origin, fix="Shorten or remove the row."))
    raise_all(problems[:SHOWN_PROBLEMS])
    return prepared


def _samples(template: Template, asked: EvaluationRow, longest: int) -> list[Sample]:
    """What is trained of a row; nothing without an answer, or where it is too long."""
    if asked.conversation is None:
        return []
    tokenized = tokenize(template, [asked.conversation], longest, "drop")
    if tokenized.faults:
        raise UserError(tokenized.faults[0].reason)
    return [] if tokenized.too_long else tokenized.samples


def _records(
    speaker: Speaker, rows: Sequence[Prepared], config: EvaluateConfig
) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row with its loss and, unless it is plain text, the answer; and the tokens that were made."""
    window = ROWS_A_SLOT * speaker.decoder.slots
    for start in range(0, len(rows), window):
        group = rows[start : start + window]
        say(f"losses of {counted(len(group), 'row')}")
        records = [_with_loss(speaker, row) for row in group]
        asked = [
            replace(row.question, values=record)
            for row, record in zip(group, records, strict=True)
            if row.question is not None and not config.skip_generation
        ]
        answers = answer_questions(speaker.decoder, speaker.template, asked)
        for row, record in zip(group, records, strict=True):
            yield (record, 0) if row.question is None or config.skip_generation else next(answers)


def _with_loss(speaker: Speaker, row: Prepared) -> dict[str, Any]:
    """The row with its summed loss and trained tokens."""
    scores = [score_sample(speaker.decoder, sample) for sample in row.samples]
    loss = sum(score.loss for score in scores)
    if not abs(loss) < float("inf"):
        raise UserError(f"the loss is {loss}", where=row.asked.origin, fix="Check the model's weights.")
    return {**row.asked.values, "summed_loss": loss, "trained_tokens": sum(score.tokens for score in scores)}


def _outcome(row: EvaluationRow, record: dict[str, Any], *, asks: bool) -> Outcome:
    """What the metrics see of a line of predictions; without `asks` an "answer" there is the row's own column."""
    asks = asks and row.prompt is not None
    answer = split_thinking(record["answer"])[1].strip() if asks else None
    reference = None if row.reference is None else split_thinking(row.reference)[1].strip()
    form = form_of(row.values, row.origin)
    return Outcome(
        loss=record["summed_loss"],
        trained_tokens=record["trained_tokens"],
        answer=answer,
        ended=asks and record["answer_ended"],
        reference=reference,
        form={} if form is None or answer is None else kept_rules(form, answer),
    )


def _run_harness(name: str, speaker: Speaker, identity: dict[str, Any], config: EvaluateConfig) -> dict[str, Any]:
    """The harness's results, kept in a file until the evaluation is whole, as its tasks take long."""
    from qingtune.evaluation.harness import run_tasks

    assert config.lm_eval
    path = Path(config.output_dir) / f"lm_eval_{name}.json"
    installed = importlib.metadata.version("lm_eval")
    made_by = json.loads(json.dumps({**identity, "tasks": config.lm_eval, "lm_eval": installed}))
    kept = read_object_if_there(path, INDEX_BYTES, nan=True)
    if kept and kept.get("made_by") == made_by:
        return kept["results"]
    with labelled(name):
        results = run_tasks(speaker, config.lm_eval, config.limit)
    write_json(path, {"made_by": made_by, "results": results})
    return results
