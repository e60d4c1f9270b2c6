"""The recipe of exporting: base and adapter become GGUF files that are read back and compared, each tensor in its turn;
with Ollama's Modelfile and a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qingtune.adapters.base_of import find_base
from qingtune.adapters.merge_stored import EMBEDDING, HEAD, MergedWeights, StoredAdapter
from qingtune.adapters.peft_files import read_adapter, read_adapter_config
from qingtune.config.commands import ExportConfig
from qingtune.config.training import DEFAULT_MODEL
from qingtune.data.format import Message
from qingtune.data.templates import render_template
from qingtune.data.tokenize import Template, prompt_ids
from qingtune.data.tokenizer_calls import encode
from qingtune.errors import UserError
from qingtune.export.gguf_file import GGUFPlan, Read, check_gguf, write_gguf
from qingtune.export.gguf_layout import GGUFLayout, Value, layout_of
from qingtune.export.gguf_vocab import MOST_ENDS, Ending, normalizes, vocabulary_of
from qingtune.export.model_card import CARD, ExportedFile, Origin, shown_name, write_card
from qingtune.export.modelfile import GO_PLAIN, TemplateNotExpressible, find_turns, left_out, modelfile
from qingtune.files.digests import sha256_of
from qingtune.files.write import disk_errors, write_text
from qingtune.models.config_file import read_generation_config
from qingtune.models.find import fingerprint, read_model_config, stored_in_4bit
from qingtune.models.load import load_template
from qingtune.output.console import say, show
from qingtune.output.invocation import shown
from qingtune.output.quiet import quieten
from qingtune.output.redaction import find_token
from qingtune.runs.record import Record
from qingtune.runs.result_folder import open_result_folder

MODELFILE = "Modelfile"
# generation_config.json -> Ollama's parameters
_SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip


@dataclass(frozen=True)
class Speech:
    """How the model is spoken to.

    Attributes:
        template: tokenizer and chat template.
        plain: whether it was trained on plain text, without a template.
        ending: how answers end.
        system_prompt: of training, or as the settings say.
    """

    template: Template
    plain: bool
    ending: Ending
    system_prompt: str | None


def export(config: ExportConfig) -> None:
    """Write a model to output_dir as GGUF files with a Modelfile and a model card.

    Raises:
        UserError: something is missing, does not fit, or cannot be expressed; or a file is not what it should be.
    """
    quieten()
    if config.base_model is None and config.lora_model is None:
        raise UserError("no model was given", fix="Pass --lora_model, --base_model, or both.")
    adapter_folder = Path(config.lora_model) if config.lora_model else None
    output_dir = Path(config.output_dir)
    name = re.sub(r"[^\w.-]+", "-", output_dir.absolute().name).strip("-") or "model"
    place = open_result_folder(output_dir, "export", "an export", overwrite=config.overwrite_output_dir)
    place.refuse_input("the adapter", adapter_folder)
    adapter = read_adapter(adapter_folder) if adapter_folder else None
    base, record = find_base(config, adapter_folder)
    place.refuse_input("the base model", base)
    weights = MergedWeights(base, adapter)
    parts_head = adapter is not None and adapter.parts_head
    head = {HEAD: weights.shapes[EMBEDDING]} if parts_head and HEAD not in weights.shapes else {}
    layout = layout_of(base, weights.shapes | head, untie=parts_head)
    if adapter:
        _check_names(adapter, layout)
    speech = _speech(config, base, record, layout)
    metadata = _metadata(name, layout, speech)
    with (
        disk_errors("the export", output_dir, "Free disk space, or choose another output_dir."),
        place.staging() as half_done,
    ):
        plans = [GGUFPlan(layout, metadata, kind) for kind in dict.fromkeys(config.quantize)]
        files = [_write(half_done, name, plan, weights.read) for plan in plans]
        say(f"Writing {MODELFILE} and {CARD} ...")
        remarks = [
            *_write_modelfile(half_done, files[0].name, base, speech), *_limits(base, speech, config.quantize)
        ]  # fmt: skip
        origin = Origin(shown_name(_base_name(config, record)), fingerprint(base), base, adapter_folder, record)
        write_card(half_done / CARD, name, origin, files, remarks)
        place.put(half_done, {file.name: file.sha256 for file in files})
    for remark in remarks:
        say(f"Note: {remark}")
    show(
        f"Exported: {output_dir} ({', '.join(file.name for file in files)}, {MODELFILE}, {CARD})\n"
        f"Chat with it: {shown(['llama-cli', '-m', str(output_dir / files[0].name), '--jinja'])}\n"
        f"or: {shown(['cd', str(output_dir)])} && ollama create {name} -f {MODELFILE} && ollama run {name}"
    )


def _base_name(config: ExportConfig, record: Record | None) -> str:
    if record:
        return record.base_model
    own = read_adapter_config(Path(config.lora_model)).get("base_model_name_or_path") if config.lora_model else None
    return config.base_model or own or DEFAULT_MODEL


# --- Weights ---------------------------------------------------------------------------------------------------------


def _check_names(adapter: StoredAdapter, layout: GGUFLayout) -> None:
    """See that the file will hold all that an adapter changes; a UserError if it will not."""
    if unknown := sorted(adapter.names - {tensor.source for tensor in layout.tensors}):
        raise UserError(
            f"the adapter changes {unknown[0]}, which this base does not have",
            where=str(adapter.folder),
            fix="Pass the base model that the adapter was trained on.",
        )


def _metadata(name: str, layout: GGUFLayout, speech: Speech) -> dict[str, Value]:
    """The content of a file except tensors and its type."""
    tokenizer = speech.template.tokenizer
    metadata: dict[str, Value] = {"general.type": "model", "general.name": name, **layout.metadata}
    metadata |= vocabulary_of(tokenizer, layout.embeddings, speech.ending)
    if not speech.plain:
        metadata["tokenizer.chat_template"] = tokenizer.get_chat_template()
    return metadata


def _write(folder: Path, name: str, plan: GGUFPlan, read: Read) -> ExportedFile:
    """Write one GGUF file, read it back and compare it."""
    path = folder / f"{name}-{plan.quantize}.gguf"
    say(f"Writing {path.name} ({len(plan.layout.tensors)} tensors) ...")
    if plan.undivided:
        say(f"{len(plan.undivided)} tensors stay in 16 bits (row length not a multiple of 32): {plan.undivided[0]} ...")
    write_gguf(path, plan, read)
    say(f"Reading {path.name} back ...")
    worst = check_gguf(path, plan, read)
    largest = ", ".join(f"{kind} {error:.3%} ({tensor})" for kind, (error, tensor) in worst.items())
    say(f"Read back and compared with the source weights; largest error of a tensor: {largest}.")
    errors = {kind: error for kind, (error, _) in worst.items()}
    return ExportedFile(path.name, path.stat().st_size, sha256_of(path), errors)


# --- Speech ----------------------------------------------------------------------------------------------------------


def _speech(config: ExportConfig, base: Path, record: Record | None, layout: GGUFLayout) -> Speech:
    """Tokenizer, template and endings, as inference uses them."""
    adapter = Path(config.lora_model) if config.lora_model else None
    template = load_template(base, adapter, record.stop_ids if record else None)
    tokenizer = template.tokenizer
    plain = record is not None and record.prompt_style == "plain"
    probe = prompt_ids(template, "a" if plain else [Message("user", "a")])
    bos = cast("int | None", tokenizer.bos_token_id)
    add_bos = bos is not None and probe[0] == bos
    if plain and probe[add_bos:] != encode(tokenizer, "a"):
        raise UserError("the tokenizer adds tokens around a text that llama.cpp cannot add", where=str(base))
    of_model = read_model_config(base).get("bos_token_id")
    if bos is None and isinstance(of_model, int):
        bos = of_model
    others = sorted(number for number in template.stop_ids - {template.end_of_turn} if number < layout.embeddings)
    system = config.system_prompt if config.system_prompt is not None else record.system_prompt if record else None
    if system is not None and (found := find_token(system)):
        fix = "Pass --system_prompt without it, or take it out of the environment."
        raise UserError(f"the system prompt holds {found}, which would be written to the Modelfile", fix=fix)
    return Speech(template, plain, Ending(template.end_of_turn, others, bos, add_bos), system)


def _limits(base: Path, speech: Speech, quantize: Sequence[str]) -> list[str]:
    """What the files cannot say, or say less well."""
    limits: list[str] = []
    if stored_in_4bit(base):
        limits.append("The base's linear layers were stored in 4 bits, which had rounded them before they came here.")
    if "q4_0" in quantize:
        limits.append(
            "q4_0 is coarse, and a model of less than a billion weights may answer otherwise: try it before use."
        )
    if normalizes(speech.template.tokenizer):
        limits.append("llama.cpp does not bring text into Unicode's composed form (NFC) as this tokenizer does.")
    if len(speech.ending.others) > MOST_ENDS - 1:
        limits.append(f"GGUF holds {MOST_ENDS} ids that end an answer, this model has {len(speech.ending.others) + 1}.")
    return limits


def _write_modelfile(folder: Path, gguf: str, base: Path, speech: Speech) -> list[str]:
    """Write the Modelfile; returns remarks on it."""
    tokenizer = speech.template.tokenizer
    text = tokenizer.get_chat_template()

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return render_template(text, tokenizer.special_tokens_map, turns, add_generation_prompt=add_generation_prompt)

    template, remarks = GO_PLAIN, list[str]()
    if not speech.plain:
        bos = cast("str", tokenizer.bos_token) if speech.ending.add_bos else None
        try:
            turns = find_turns(text, render, bos)
            template = turns.go_template()
            remarks = [
                f"The Modelfile's template leaves alone what the model's own changes: {c}." for c in turns.changed
            ]
        except TemplateNotExpressible as reason:
            template = None
            remarks = [
                f"The Modelfile has no TEMPLATE, as the model's own has no equal in Go's template language: {reason}. "
                "llama.cpp renders the one inside the GGUF file (llama-server --jinja)."
            ]
    stops = [cast("str", tokenizer.convert_ids_to_tokens(number)) for number in sorted(speech.template.stop_ids)]
    remarks += left_out(stops, speech.system_prompt)
    written = modelfile(gguf, template, remarks, stops, speech.system_prompt, _sampling(base))
    write_text(folder / MODELFILE, written)
    return remarks


def _sampling(base: Path) -> dict[str, float]:
    """The model's own sampling settings, by Ollama's names."""
    own = read_generation_config(base)
    return {theirs: own[ours] for ours, theirs in _SAMPLING.items() if own.get(ours) is not None}
