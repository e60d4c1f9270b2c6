"""The base model of an adapter, and whether it is the one that the adapter was trained on."""

from __future__ import annotations

from pathlib import Path

from qingtune.adapters.peft_files import read_adapter_config
from qingtune.config.commands import ModelSettings
from qingtune.config.training import DEFAULT_MODEL
from qingtune.errors import UserError
from qingtune.models.find import find_model, fingerprint
from qingtune.models.load import local_folder
from qingtune.output.console import say
from qingtune.runs.record import Record, read_record


def find_base(config: ModelSettings, adapter: Path | None) -> tuple[Path, Record | None]:
    """The base model's folder and the record of the adapter, or of the base if it came out of full training.

    Raises:
        UserError: not found, or the adapter was trained on other weights.
    """
    record = read_record(adapter) if adapter else None
    name = config.base_model
    if name is None and adapter:
        name = record.base_model if record else read_adapter_config(adapter).get("base_model_name_or_path")
    try:
        source = find_model(name or DEFAULT_MODEL, config.cache_dir, config.hub)
    except UserError as error:
        if adapter is None or config.base_model is not None:
            raise
        what = f"its base model was not found: {error.where or name}: {error.what}"
        raise UserError(what, where=str(adapter), fix="Pass it as --base_model.") from error
    folder = local_folder(source, config.cache_dir)
    if adapter is None:
        return folder, read_record(folder)
    if record is None:
        say("The adapter has no record of its base (qingtune did not write it); only shapes are checked.")
    elif record.base_fingerprint != fingerprint(folder):
        problem = UserError(
            f"the adapter was trained on weights other than those of this base ({record.base_model})",
            where=str(adapter),
            fix="Pass that model as --base_model, or pass --allow_other_base.",
        )
        if not config.allow_other_base:
            raise problem
        say(f"Warning: {problem.what}.")
    return folder, record
