"""What a run leaves: an adapter, or after full training a model, of a multimodal checkpoint with all it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qingtune.adapters.peft_files import save_adapter
from qingtune.config.training import TrainConfig
from qingtune.data.tokenize import Template
from qingtune.errors import UserError
from qingtune.files.staging import staging_folder
from qingtune.files.write import disk_errors
from qingtune.models.find import fingerprint
from qingtune.models.load import save_model, stored_dtype
from qingtune.models.multimodal import has_multimodal_names, is_multimodal
from qingtune.models.whole import bytes_of_whole, holds_all_of, save_whole
from qingtune.output.redaction import redact
from qingtune.runs.folder import put_result
from qingtune.runs.record import Record, write_record
from qingtune.training.checkpoint import checkpoints
from qingtune.training.loop import Progress, Work
from qingtune.training.processes import Processes


@dataclass(frozen=True)
class Base:
    """The model that a run starts from, as it was then: its files may be gone when the result is written.

    Attributes:
        dtype: in which its weights are kept on disk.
        multimodal: whether the model is only the text of what its folder holds.
        multimodal_names: whether an adapter's tensors are named as in the multimodal class.
    """

    folder: Path
    fingerprint: str
    dtype: torch.dtype
    multimodal: bool
    multimodal_names: bool

    @classmethod
    def of(cls, folder: Path) -> Base:
        """What its files say."""
        names = has_multimodal_names(folder)
        return cls(folder, fingerprint(folder), stored_dtype(folder), is_multimodal(folder), names)

    def bytes_taken(self, config: TrainConfig, model: Any) -> int | None:
        """Bytes of a result that takes from the base all that is not text; None for one that takes nothing."""
        takes = config.method == "full" and self.multimodal and holds_all_of(model, self.folder)
        return bytes_of_whole(self.folder) if takes else None

    def result_bytes(self, config: TrainConfig, model: Any) -> int:
        """Bytes of the result's weights: of adapters as they are trained, of a model as its base is stored."""
        if (taken := self.bytes_taken(config, model)) is not None:
            return taken
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        full = config.method == "full"
        return sum(p.numel() * (self.dtype.itemsize if full else p.element_size()) for p in trained)


def keep_run_without_base(base: Base, output_dir: Path, processes: Processes, work: Work, progress: Progress) -> None:
    """At the end of a run whose result takes from the base what is not text: if that is gone, save the last step.

    Raises:
        UserError: it is gone, or another one; says how the run is finished.
    """
    if processes.by_first(lambda: fingerprint(base.folder) == base.fingerprint):
        return
    if not processes.by_first(lambda: progress.step in checkpoints(output_dir)):
        work.save(progress)
    raise UserError(
        "the base model is no longer there as it was, and the result takes from it all that is not text; the trained "
        f"weights are kept in checkpoint-{progress.step}",
        where=str(base.folder),
        fix="Put its files back and run the same command again: it writes the result.",
    )


def save_result(config: TrainConfig, model: Any, template: Template, base: Base, record: Record) -> None:
    """Write the adapter, or after full training the model, with its tokenizer; the record comes last."""
    output_dir = Path(config.output_dir)
    fix = "Free disk space and run the same command again: it resumes from the last checkpoint."
    with disk_errors("the result", output_dir, fix), staging_folder(output_dir / "result") as half_done:
        if base.bytes_taken(config, model) is not None:
            save_whole(model, base.folder, half_done)
        elif config.method == "full":
            save_model(model, half_done, base.dtype)
        else:
            name = str(base.folder.absolute()) if is_gguf(config) else config.model_name_or_path
            save_adapter(model, half_done, redact(name), config.lora_dropout, multimodal=base.multimodal_names)
        template.tokenizer.save_pretrained(half_done)
        put_result(half_done, output_dir)
    write_record(output_dir, record)


def is_gguf(config: TrainConfig) -> bool:
    """Whether the base is a .gguf file, which PEFT cannot open: it is given the converted copy in the cache."""
    return config.model_name_or_path.endswith(".gguf")
