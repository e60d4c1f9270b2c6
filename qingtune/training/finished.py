"""Whether a run is finished already, found out without torch and without tokenising its data.

A run's record holds the digests of all that its samples were made of. Where these, the settings and the versions are
the same, so are the samples; in every other case the recipe of training looks for itself.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.files.digests import sha256_of
from qingtune.machine.describe import launched_processes
from qingtune.models.find import converted_folder, find_model, fingerprint, is_here
from qingtune.runs.record import differences, read_record, settings_to_compare, versions

START_OVER = "Pass --overwrite_output_dir to train again, or choose another output_dir."
_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")  # configuration, tokenizer and template


def already_finished(output_dir: Path) -> str:
    """A line for the user."""
    return f"This run is already finished; its result is in {output_dir}. {START_OVER}"


def digests_of_inputs(config: TrainConfig, folder: Path) -> dict[str, str]:
    """SHA-256 of the training data, in order, and of the base's files other than weights, such as the tokenizer's.

    Raises:
        OSError: a file cannot be read.
    """
    others = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _BESIDE_WEIGHTS]
    data = {f"data {number}": sha256_of(Path(path)) for number, path in enumerate(config.data_path or [])}
    files = {path.name: sha256_of(path) for path in others}
    return {**data, **files, "version of tokenizers": importlib.metadata.version("tokenizers")}


def is_surely_finished(config: TrainConfig) -> bool:
    """Whether output_dir holds the result of this very run; False where it does not, or where that takes longer."""
    output_dir = Path(config.output_dir)
    if launched_processes() > 1:
        return False
    if config.overwrite_output_dir or config.dry_run or config.resume_from_checkpoint not in ("auto", True):
        return False
    try:
        record = read_record(output_dir) if output_dir.is_dir() else None
        if record is None or not is_here(config.model_name_or_path, config.cache_dir, config.hub):
            return False
        source = find_model(config.model_name_or_path, config.cache_dir, config.hub)
        folder = converted_folder(source.path, config.cache_dir) if source.is_gguf else source.path
        if record.versions != versions() or record.results.get("inputs") != digests_of_inputs(config, folder):
            return False
        now = settings_to_compare(config, 1, str(record.settings.get("data")), fingerprint(folder))
    except (OSError, UserError):  # training finds the same, and reports it
        return False
    return not differences(record.settings, now)
