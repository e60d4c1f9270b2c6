"""`qingtune check`: files and a tokenizer -> the report on a data set; no model is loaded."""

from __future__ import annotations

import json

from qingtune.config.commands import CheckConfig
from qingtune.data.check import CheckReport, Seen, as_json, as_lines, check_data
from qingtune.data.prepare import check_files_exist
from qingtune.data.rules import rules_of
from qingtune.data.tokenize import Template
from qingtune.errors import UserError
from qingtune.output.console import give, say
from qingtune.output.redaction import redact


def check(config: CheckConfig) -> int:
    """Print the report; returns the exit code: 2 if the data is faulty and that was asked for, else 0.

    Raises:
        UserError: nothing to check, or a file or the tokenizer cannot be read.
    """
    if not config.data:
        raise UserError("--data is missing", fix="Pass a data file, for example --data data/train.jsonl.")
    check_files_exist({"data": config.data, "eval_data": config.eval_data})
    template, limit = _template(config) if config.model_name_or_path else (None, config.max_seq_length)
    reports: dict[str, CheckReport] = {}
    training: Seen | None = None
    for name, paths in (("Training data", config.data), ("Evaluation data", config.eval_data)):
        if paths:
            reports[name], seen = check_data(
                paths, config.system_prompt, template, limit, config.on_long, training, rules_of(config)
            )
            training = training or seen
    if config.json_report:
        give(json.dumps({name: as_json(report) for name, report in reports.items()}, ensure_ascii=False, indent=2))
    else:
        for name, report in reports.items():
            give(redact("\n".join(as_lines(name, report, limit))))
        if template is None:
            give("Token lengths and the chat template were not checked; pass --model_name_or_path to check them.")
    return 2 if config.strict and any(report.faulty for report in reports.values()) else 0


def _template(config: CheckConfig) -> tuple[Template, int]:
    """The model's template, and the longest sample that it and the setting allow."""
    from qingtune.models.find import context_length, find_model
    from qingtune.models.load import load_template, local_folder
    from qingtune.output.quiet import quieten

    quieten()
    assert config.model_name_or_path is not None
    source = find_model(config.model_name_or_path, config.cache_dir, config.hub)
    folder = local_folder(source, config.cache_dir)
    template = load_template(folder)
    for notice in template.notices:
        say(notice)
    return template, min(config.max_seq_length, context_length(folder) or config.max_seq_length)
