"""The recipe of exporting: base and adapter become GGUF files that are read back and compared, each tensor in its turn;
with Ollama's Modelfile and a model card."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

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
from qingtune.export.gguf_architectures import Value
from qingtune.export.gguf_file import K_QUANTS, GGUFPlan, check_gguf, write_gguf
from qingtune.export.gguf_layout import GGUFLayout, Read, layout_of
from qingtune.export.gguf_lora import LORA_FORMS, lora_layout
from qingtune.export.gguf_vocab import (
    MOST_ENDS,
    Ending,
    cuts_by_capitals,
    name_in_file,
    normalizes,
    spares_a_space,
    swallows_spaces,
    vocabulary_of,
)
from qingtune.export.kquants import quantize_gguf, require_quantizer
from qingtune.export.model_card import CARD, ExportedFile, Origin, shown_name, write_card
from qingtune.export.modelfile import GO_PLAIN, TemplateNotExpressible, find_turns, left_out, modelfile
from qingtune.files.digests import sha256_of
from qingtune.files.write import disk_errors, write_text
from qingtune.models.config_file import read_generation_config
from qingtune.models.find import fingerprint, read_model_config, stored_in_4bit
from qingtune.models.load import load_template
from qingtune.output.console import say, show
from qingtune.output.invocation import command_line, shown
from qingtune.output.quiet import quieten
from qingtune.output.redaction import find_token
from qingtune.output.units import counted
from qingtune.runs.record import Record
from qingtune.runs.result_folder import open_result_folder

MODELFILE = "Modelfile"
_SOURCE_OF_K_QUANTS = "bf16"
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


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: the GGUF files.
        remarks: what a user should know of them, in sentences.
        uses: how to use them, in lines, given the folder in which they lie.
    """

    files: list[ExportedFile]
    remarks: list[str]
    uses: Callable[[Path], list[str]]


def export(config: ExportConfig) -> None:
    """Write a model to output_dir as GGUF files with a Modelfile and a model card; or an adapter alone, with a card.

    Raises:
        UserError: something is missing, does not fit, or cannot be expressed; or a file is not what it should be.
    """
    quieten()
    quantize = _forms(config)
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
    if weights.adapter and config.format == "gguf":
        _check_names(weights.adapter, layout)
    with (
        disk_errors("the export", output_dir, "Free disk space, or choose another output_dir."),
        place.staging() as half_done,
    ):
        origin = Origin(shown_name(_base_name(config, record)), fingerprint(base), base, adapter_folder, record)
        if config.format == "gguf_lora":
            model = _base_name(config, record)
            parts = _export_lora(half_done, name, layout, weights, quantize, origin, model)
        else:
            speech = _speech(config, base, record, layout)
            parts = _export_model(half_done, name, layout, speech, weights, quantize, origin)
        place.put(half_done, {file.name: file.sha256 for file in parts.files})
    for remark in parts.remarks:
        say(f"Note: {remark}")
    names = [*(file.name for file in parts.files), *([MODELFILE] if config.format == "gguf" else []), CARD]
    show("\n".join([f"Exported: {output_dir} ({', '.join(names)})", *parts.uses(output_dir)]))


def _forms(config: ExportConfig) -> list[str]:
    """The forms to write, each once, with a UserError for what the settings alone show to be impossible."""
    if config.format == "gguf_lora":
        forms = list(dict.fromkeys(config.quantize or ["f32"]))
        if config.lora_model is None:
            raise UserError("gguf_lora is an adapter's format", where="format", fix="Pass --lora_model.")
        if other := [form for form in forms if form not in LORA_FORMS]:
            what = f"{other[0]} is not for adapters"
            raise UserError(what, where="quantize", fix=f"Choose from {', '.join(LORA_FORMS)}.")
        return forms
    forms = list(dict.fromkeys(config.quantize or ["q8_0"]))
    if config.base_model is None and config.lora_model is None:
        raise UserError("no model was given", fix="Pass --lora_model, --base_model, or both.")
    if any(form in K_QUANTS for form in forms):
        require_quantizer()
    return forms


def _export_model(
    folder: Path,
    name: str,
    layout: GGUFLayout,
    speech: Speech,
    weights: MergedWeights,
    quantize: Sequence[str],
    origin: Origin,
) -> Exported:
    """Write a model's files, a Modelfile and a card."""
    files = _write_files(folder / name, layout, _metadata(name, layout, speech), quantize, weights.read)
    say(f"Writing {MODELFILE} and {CARD} ...")
    remarks = [
        *_write_modelfile(folder, files[0].name, origin.base, speech), *_limits(origin.base, speech, quantize),
        *_undivided(layout, files, quantize), *layout.limits,
    ]  # fmt: skip
    use = [f"llama-cli -m {files[0].name} --jinja", f"ollama create {name} -f {MODELFILE} && ollama run {name}"]
    write_card(folder / CARD, name, origin, files, remarks, use)
    return Exported(
        files,
        remarks,
        lambda output_dir: [
            f"Chat with it: {shown(['llama-cli', '-m', str(output_dir / files[0].name), '--jinja'])}",
            f"or: {shown(['cd', str(output_dir)])} && {use[1]}",
        ],
    )


def _export_lora(
    folder: Path,
    name: str,
    base_layout: GGUFLayout,
    weights: MergedWeights,
    quantize: Sequence[str],
    origin: Origin,
    base_model: str,
) -> Exported:
    """Write an adapter's files and a card; `base_model` is what the base is called on this machine."""
    assert weights.adapter is not None
    layout, tensors = lora_layout(weights.adapter, base_layout, weights.unchanged)
    files = _write_files(
        folder / name, layout, {"general.name": name, **layout.metadata}, quantize, tensors.__getitem__
    )
    say(f"Writing {CARD} ...")
    remarks = _undivided(layout, files, quantize)
    if stored_in_4bit(origin.base):
        remarks.append("The base's linear layers were stored in 4 bits; the adapter fits these and no others exactly.")
    words = ["llama-cli", "-m", "BASE.gguf", "--lora", files[0].name, "--jinja"]
    write_card(folder / CARD, name, origin, files, remarks, [shown(words)])
    return Exported(
        files,
        remarks,
        lambda output_dir: [
            f"Put it on its base: {shown([*words[:4], str(output_dir / words[4]), *words[5:]])}",
            f"(BASE.gguf: {command_line('export', base_model=base_model, output_dir='DIR')})",
        ],
    )


def _base_name(config: ExportConfig, record: Record | None) -> str:
    if record:
        return record.base_model
    own = read_adapter_config(Path(config.lora_model)).get("base_model_name_or_path") if config.lora_model else None
    return config.base_model or own or DEFAULT_MODEL


# --- Weights ---------------------------------------------------------------------------------------------------------


def _check_names(adapter: StoredAdapter, layout: GGUFLayout) -> None:
    """See that the file will hold all that an adapter changes; a UserError if it will not."""
    if unknown := sorted(adapter.names - {source for tensor in layout.tensors for source in tensor.sources}):
        raise UserError(
            f"the adapter changes {unknown[0]}, which this base does not have",
            where=str(adapter.folder),
            fix="Pass the base model that the adapter was trained on.",
        )


def _metadata(name: str, layout: GGUFLayout, speech: Speech) -> dict[str, Value]:
    """The content of a file except tensors and its type."""
    tokenizer = speech.template.tokenizer
    shown_as = name_in_file(tokenizer, name)
    metadata: dict[str, Value] = {"general.type": "model", "general.name": shown_as, **layout.metadata}
    metadata |= vocabulary_of(tokenizer, layout.embeddings, speech.ending)
    if not speech.plain:
        metadata["tokenizer.chat_template"] = tokenizer.get_chat_template()
    return metadata


def _write_files(
    stem: Path, layout: GGUFLayout, metadata: dict[str, Value], quantize: Sequence[str], read: Read
) -> list[ExportedFile]:
    """Write a GGUF file of each form, read it back and compare it; K-quants are made of one in bf16."""
    plans = {form: GGUFPlan(layout, metadata, form) for form in (*quantize, _SOURCE_OF_K_QUANTS)}
    paths = {form: stem.with_name(f"{stem.name}-{form}.gguf") for form in plans}
    source = paths[_SOURCE_OF_K_QUANTS]
    files: list[ExportedFile] = []
    for form in quantize:
        if form in K_QUANTS:
            _write_once(source, plans[_SOURCE_OF_K_QUANTS], read)
            say(f"Quantising it to {paths[form].name} with llama.cpp ...")
            quantize_gguf(source, paths[form], form, torch.get_num_threads())
        else:
            _write_once(paths[form], plans[form], read)
        files.append(_check(paths[form], plans[form], read))
    if _SOURCE_OF_K_QUANTS not in quantize:
        source.unlink(missing_ok=True)
    return files


def _write_once(path: Path, plan: GGUFPlan, read: Read) -> None:
    if not path.exists():
        say(f"Writing {path.name} ({counted(len(plan.layout.tensors), 'tensor')}) ...")
        write_gguf(path, plan, read)


def _check(path: Path, plan: GGUFPlan, read: Read) -> ExportedFile:
    """Read a file back, compare it and report what it lost."""
    say(f"Reading {path.name} back ...")
    kept = check_gguf(path, plan, read)
    largest = ", ".join(
        f"{kind} {of.error:.3%} ({counted(of.tensors, 'tensor')}, {of.worst})" for kind, of in kept.items()
    )
    say(f"Read back and compared with the source weights; largest error of a tensor: {largest}.")
    return ExportedFile(path.name, path.stat().st_size, sha256_of(path), kept)


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
    content = read_model_config(base)
    of_model = content.get("bos_token_id", (content.get("text_config") or {}).get("bos_token_id"))
    if bos is None and isinstance(of_model, int):
        bos = of_model
    others = sorted(number for number in template.stop_ids - {template.end_of_turn} if number < layout.embeddings)
    system = config.system_prompt if config.system_prompt is not None else record.system_prompt if record else None
    if system is not None and (found := find_token(system)):
        fix = "Pass --system_prompt without it, or take it out of the environment."
        raise UserError(f"the system prompt holds {found}, which would be written to the Modelfile", fix=fix)
    return Speech(template, plain, Ending(template.end_of_turn, others, bos, add_bos), system)


def _undivided(layout: GGUFLayout, files: Sequence[ExportedFile], quantize: Sequence[str]) -> list[str]:
    """For which tensors a form other than the one asked for was used, a sentence for each file."""
    found: list[str] = []
    for file, form in zip(files, quantize, strict=True):
        if not (undivided := GGUFPlan(layout, {}, form).undivided):
            continue
        rows = f"{len(undivided)} of {len(layout.tensors)} tensors have rows that are not a multiple of"
        if form in K_QUANTS:
            other = [f"{kind} ({of.tensors})" for kind, of in file.kept.items() if not kind.endswith(("_K", "F32"))]
            found.append(f"{form}: {rows} 256, as K-quants need; llama.cpp keeps them as {', '.join(other)}.")
        else:
            found.append(f"{form}: {rows} 32; they stay in 16 bits.")
    return found


def _limits(base: Path, speech: Speech, quantize: Sequence[str]) -> list[str]:
    """What the files cannot say, or say less well."""
    limits: list[str] = []
    if stored_in_4bit(base):
        limits.append("The base's linear layers were stored in 4 bits, which had rounded them before they came here.")
    if coarse := [form for form in ("q4_0", "q3_k_m") if form in quantize]:
        limits.append(
            f"{' and '.join(coarse)}: coarse; a model of less than a billion weights may answer otherwise, so try it "
            "before use."
        )
    if normalizes(speech.template.tokenizer):
        limits.append("llama.cpp does not bring text into Unicode's composed form (NFC) as this tokenizer does.")
    if cuts_by_capitals(speech.template.tokenizer):
        limits.append(
            "llama.cpp cuts words with capitals after small letters other than a-z, and with combining marks, at other "
            "places than this tokenizer."
        )
    if spares_a_space(speech.template.tokenizer):
        limits.append("A text that begins with a space, also after a special token, gets a second one in llama.cpp.")
    if swallows_spaces(speech.template.tokenizer):
        limits.append(
            "Special tokens swallow the spaces after them: in llama.cpp ASCII's alone, with this tokenizer all others "
            "too, such as U+3000. llama.cpp does so if the name in the file (general.name) holds Phi-3: leave it there."
        )
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
