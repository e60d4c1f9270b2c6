"""The model card of an export: what it was made of, how, what was measured, and what is not known."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qingtune import __version__
from qingtune.config.methods import METHOD_NAMES
from qingtune.config.resolve import default_settings
from qingtune.export.gguf_file import Kept
from qingtune.files.json_files import open_plain
from qingtune.files.write import write_text
from qingtune.output.markdown import code, prose, table, value
from qingtune.output.redaction import redact, redact_values
from qingtune.output.units import duration
from qingtune.runs.page.source import read_curves
from qingtune.runs.record import METRICS, Record

CARD = "README.md"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # OWNER/NAME
# Shown in separate lines, or of no interest to others.
_ELSEWHERE = {"model_name_or_path", "data_path", "eval_data_path", "system_prompt", "use_lora", "use_qlora"}
_MOST_FRONT_MATTER = 1 << 20  # bytes of a base's card that are looked at for its licence


@dataclass(frozen=True)
class ExportedFile:
    """A GGUF file: its name, size, SHA-256, and what it keeps of the tensors, by form."""

    name: str
    bytes: int
    sha256: str
    kept: Mapping[str, Kept]


@dataclass(frozen=True)
class Origin:
    """What an export was made of.

    Attributes:
        base_model: the base's name, as others know it.
        fingerprint: of the base's weights.
        base: its folder.
        adapter: the folder of the adapter.
        record: of the training run.
    """

    base_model: str
    fingerprint: str
    base: Path
    adapter: Path | None
    record: Record | None


def shown_name(model: str) -> str:
    """A model's name without the folders of this machine: a hub's OWNER/NAME stays, of a path the last part."""
    on_hub = model.count("/") == 1 and model[0] not in "./~" and not os.path.exists(os.path.dirname(model))
    return model if on_hub and "\\" not in model else _last_part(model)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def write_card(
    path: Path, name: str, origin: Origin, files: Sequence[ExportedFile], limits: Sequence[str], use: Sequence[str]
) -> None:
    """Write a model's card, without secrets or paths of this machine.

    Args:
        limits: what a user should know, in sentences.
        use: commands.
    """
    source = "the adapter" if origin.adapter else "the model"
    no_record = f"Not known: {source} brings no record of qingtune's. Fingerprint of the base's weights: "
    lines = [
        *_front_matter(origin),
        f"# {name}",
        "",
        f"{_what(origin)}, exported as GGUF by qingtune {__version__}.",
        "",
        "## Training",
        "",
        *(_training(origin.record, origin) if origin.record else [f"{no_record}`{origin.fingerprint}`."]),
        "",
        "## Files",
        "",
        *_files(files),
        "",
        "## Use",
        "",
        "```bash",
        *use,
        "```",
    ]
    unknown = ["Nobody has judged the model's answers, unless a person adds it here."]
    if not _HUB_ID.fullmatch(origin.base_model):
        unknown.append("The base model's name on a hub is not known; add `base_model: OWNER/NAME` above.")
    if _licence(origin.base) is None:
        unknown.append("The licence is not known: it depends on the base model's and the data's.")
    lines += ["", "## What to know", "", *(f"- {sentence}" for sentence in [*map(prose, limits), *unknown])]
    write_text(path, redact("\n".join(lines) + "\n"))


def _what(origin: Origin) -> str:
    if origin.record:
        return f"{value(origin.base_model)} after {_method(origin.record)}"
    return value(origin.base_model) + " with an adapter merged in" * (origin.adapter is not None)


def _method(record: Record) -> str:
    names: dict[str, str] = {**METHOD_NAMES}
    return names.get(record.method) or value(record.method)


def _front_matter(origin: Origin) -> list[str]:
    method = origin.record.method if origin.record else None
    tags = ["gguf", "qingtune", *([method] if method in ("lora", "qlora") else [])]
    licence = _licence(origin.base)
    return [
        "---",
        *([f"base_model: {origin.base_model}"] if _HUB_ID.fullmatch(origin.base_model) else []),
        "library_name: gguf",
        *([f"license: {licence}"] if licence else []),
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
    ]


def _licence(base: Path) -> str | None:
    """The licence that the base's own card names."""
    try:
        with open_plain(base / "README.md") as card:
            text = card.read(_MOST_FRONT_MATTER).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = re.search(r"(?m)^license:[ \t]*(\w[\w.-]*)[ \t]*$", head, re.ASCII)
    return found[1] if found else None


def _training(record: Record, origin: Origin) -> list[str]:
    settings = record.settings
    rows = {
        "base model": f"{value(origin.base_model)} (fingerprint {code(record.base_fingerprint)})",
        "method": _method(record),
        "data": _data(settings.get("data_path")),
        "fingerprint of the tokenised data": code(str(settings.get("data", "not known"))),
        "evaluation data": _held_out(settings) or _data(settings.get("eval_data_path")),
        "system prompt": code(record.system_prompt) if record.system_prompt else "none",
        **_results(record.results),
        **_last_line(origin.adapter or origin.base),
        "versions": ", ".join(value(f"{name} {version}") for name, version in record.versions.items()) or "not known",
    }
    return [
        *table(("", ""), rows.items()),
        "",
        "Settings other than the defaults:",
        "",
        *table(("setting", "value"), _changed(settings).items()),
    ]


def _data(paths: Any) -> str:
    names = [paths] if isinstance(paths, str) else list(paths or [])
    return ", ".join(code(_last_part(str(name))) for name in names) or "none named"


def _held_out(settings: Mapping[str, Any]) -> str | None:
    """The rows that val_size took out of the training data, in words; None without it."""
    size = settings.get("val_size") or 0
    if not size:
        return None
    seed = settings.get("seed") if settings.get("val_seed") is None else settings["val_seed"]
    what = f"{size:.3%}".rstrip("0%").rstrip(".") + " %" if size < 1 else f"{int(size):,}"
    return f"{what} of the training rows, held out (seed {seed})"


def _results(results: Mapping[str, Any]) -> dict[str, str]:
    """Losses, duration and memory; values that were not measured are marked as such."""
    losses = [("eval_loss_before", "before"), ("eval_loss", "after"), ("best_eval_loss", "best")]
    shown_losses = [f"{word} {results[name]:.4f}" for name, word in losses if results.get(name) is not None]
    rows = {"evaluation loss": ", ".join(shown_losses) or "not measured"}
    if results.get("steps") is not None:
        rows["optimizer steps"] = f"{results['steps']:,}"
    if results.get("seconds") is not None:
        rows["duration"] = duration(results["seconds"])
    if results.get("peak_bytes") is not None:
        rows["peak memory"] = f"{results['peak_bytes'] / 1e9:.2f} GB"
    return rows


def _last_line(folder: Path) -> dict[str, str]:
    """The last logged training loss and the run's speed, from metrics.jsonl."""
    curves = read_curves(folder / METRICS)
    losses = curves.values["loss"]
    if not losses or math.isnan(losses[-1]):
        return {"training loss": "not measured"}
    rows = {"training loss": f"{losses[-1]:.4f}, last logged"}
    if speed := curves.tokens_per_second:
        rows["speed"] = f"{speed:,.0f} tokens/s"
    return rows


def _changed(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that are not the defaults, as text; paths without their folders."""
    changed: dict[str, str] = {}
    for name, default in default_settings(settings).items():
        given = redact_values(settings.get(name, default))
        if name in _ELSEWHERE or given == default:
            continue
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        changed[f"`{name}`"] = code(_last_part(text) if text and text[0] in "./~" else text)
    changed["samples a step"] = value(str(settings.get("samples a step", "not known")))
    return changed


def _files(files: Sequence[ExportedFile]) -> list[str]:
    rows = [
        (
            f"`{file.name}`",
            f"{file.bytes / 1e6:,.0f} MB",
            ", ".join(f"{kind} {kept.error:.3%} ({kept.tensors})" for kind, kept in file.kept.items()),
            f"`{file.sha256}`",
        )
        for file in files
    ]
    note = (
        "Each file was read back and compared with the source weights: the largest error of a tensor by the form in "
        "which it is kept, and the number of tensors kept so."
    )
    return [*table(("file", "size", "error (tensors)", "SHA-256"), rows), "", note]
