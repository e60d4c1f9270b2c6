"""The recipe of merging: an adapter goes into its base's weights, and the result is compared with the two."""

from __future__ import annotations

from pathlib import Path

import torch

from qingtune.adapters.base_of import find_base
from qingtune.adapters.lora import merge_lora
from qingtune.adapters.merge_stored import EMBEDDING, HEAD, StoredAdapter
from qingtune.adapters.peft_files import load_adapter, read_adapter, read_adapter_config
from qingtune.config.commands import MergeConfig
from qingtune.data.format import prompt_of
from qingtune.data.prompts import bundled_rows
from qingtune.data.tokenize import Sample, Template, prompt_ids, tokenize
from qingtune.errors import UserError
from qingtune.export.merge_check import Lost, check_rounded_once, check_same, judge_merging, measure_lost
from qingtune.export.merge_nf4 import check_weights, judge, write_in_4bit
from qingtune.files.weights_file import weight_files
from qingtune.files.write import disk_errors, write_json
from qingtune.kernels.device import choose_hardware, memory_errors
from qingtune.models.find import context_length, read_model_config, stored_in_4bit
from qingtune.models.load import load_model, load_template, save_model, stored_dtype
from qingtune.models.multimodal import has_multimodal_names, text_name
from qingtune.models.shards import add_tensor, convert_changed, copy_changed, rounded
from qingtune.models.stored_weights import StoredWeights
from qingtune.models.whole import copy_settings
from qingtune.output.console import say, show
from qingtune.output.invocation import command_line
from qingtune.output.quiet import quieten
from qingtune.runs.record import write_record
from qingtune.runs.result_folder import open_result_folder

PROMPT_TOKENS = 160  # of each prompt that is compared, at most
SAMPLE_TOKENS = 384  # of each sample whose answer's loss is compared, at most

_SMALLER = "Close other programs, or merge on a machine with more memory."


def merge(config: MergeConfig) -> None:
    """Write the merged model to output_dir, load it and compare it with base and adapter.

    Raises:
        UserError: something is missing or does not fit, or the merged model differs by more than the bound.
    """
    quieten()
    if config.save_in_4bit and config.save_dtype:
        raise UserError("save_in_4bit and save_dtype are both given", fix="Choose one.")
    folder, output_dir = Path(config.lora_model), Path(config.output_dir)
    place = open_result_folder(output_dir, "merge", "a merged model", overwrite=config.overwrite_output_dir)
    read_adapter_config(folder)
    place.refuse_input("the adapter", folder)
    base, record = find_base(config, folder)
    place.refuse_input("the base model", base)
    if stored_in_4bit(base):
        raise UserError(
            "the base is stored in 4 bits, and merging into it would round a second time",
            where=str(base),
            fix="Pass the 16-bit model that it was made from: --base_model NAME --allow_other_base. "
            "--save_in_4bit rounds the result, once.",
        )
    adapter = read_adapter(folder).for_base(StoredWeights(base).shapes)
    template = load_template(base, folder, record.stop_ids if record else None)
    hardware = choose_hardware()
    with place.staging() as half_done:
        with disk_errors("the merged model", output_dir, "Free disk space, or choose another output_dir."):
            size = sum(file.stat().st_size for file in weight_files(base))
            say(f"Merging: {size / 1e9:.2f} GB of weights, written and read back ...")
            with memory_errors("the adapter was merged", base, _SMALLER):
                if config.save_in_4bit:
                    write_in_4bit(half_done, base, adapter)
                    say(check_weights(half_done, base, adapter))
                    dtypes = set[torch.dtype]()
                else:
                    dtypes = _write(half_done, base, adapter, config.save_dtype and getattr(torch, config.save_dtype))
            copy_settings(base, half_done)
            template.tokenizer.save_pretrained(half_done)
        prompts = _prompts(template, base)
        with memory_errors("the merged model was compared", output_dir, _SMALLER):
            samples = _samples(template, base) if config.save_in_4bit else []
            say("Comparing the merged model's logits and answers with those of base and adapter ...")
            lost = measure_lost(
                base, adapter, half_done, prompts, samples, template.stop_ids, hardware,
                rounded=dtypes != {torch.float32},
            )  # fmt: skip
            say(judge(lost) if config.save_in_4bit else _judge(lost, dtypes))
        if record:
            write_record(half_done, record)
        with disk_errors("the merged model", output_dir, "Free disk space, or choose another output_dir."):
            place.put(half_done)
    show(f"Merged model: {output_dir}\nChat with it: {command_line('chat', base_model=output_dir)}")


def _write(folder: Path, base: Path, adapter: StoredAdapter, dtype: torch.dtype | None) -> set[torch.dtype]:
    """Write the merged weights and their configuration, one tensor in memory at a time where names allow it.

    `dtype` is that of all weights, None for that in which the base keeps each. Returns the dtypes in which the changed
    weights are stored, as read back.
    """
    stored = StoredWeights(base)
    if outside := sorted(adapter.names - {HEAD} - stored.shapes.keys()) if has_multimodal_names(base) else []:
        raise UserError(
            f"the adapter changes {outside[0]}, which is not of the model's text",
            where=str(adapter.folder),
            fix="Merge it with PEFT, or train an adapter of the text alone.",
        )
    if not adapter.names - {HEAD} <= set(stored.shapes):
        say("Merging in memory: the base's tensors have other names in its files than in the model.")
        return _write_whole(folder, base, adapter, dtype or stored_dtype(base))
    settings = read_model_config(base)
    changed = {stored.own_names[name] for name in adapter.names & set(stored.shapes)}

    def merged(own: str, weight: torch.Tensor) -> torch.Tensor:
        return adapter.merged(text_name(own), weight)

    if dtype is None:
        copy_changed(base, folder, changed, merged)
    else:
        convert_changed(base, folder, changed, merged, dtype)
        names = ("dtype", *(name for name in ("torch_dtype",) if name in settings))  # as older configurations call it
        settings |= dict.fromkeys(names, str(dtype).removeprefix("torch."))
    if adapter.parts_head:
        if HEAD not in stored.shapes:
            embedding = stored.read(EMBEDDING)
            add_tensor(folder, HEAD, rounded(HEAD, adapter.merged(HEAD, embedding), dtype or embedding.dtype, base))
        settings["tie_word_embeddings"] = False
    write_json(folder / "config.json", settings)
    return check_rounded_once(folder, base, adapter)


def _write_whole(folder: Path, base: Path, adapter: StoredAdapter, dtype: torch.dtype) -> set[torch.dtype]:
    """The same by Transformers, which translates the names in the files while it loads and saves."""
    model = load_model(base, torch.float32)
    load_adapter(model, adapter.folder)
    merge_lora(model)
    for name, parameter in model.named_parameters():
        parameter.data = rounded(name, parameter.data, dtype, base)
    save_model(model, folder, dtype)
    written = load_model(folder, dtype)
    for (name, wanted), (_, found) in zip(model.named_parameters(), written.named_parameters(), strict=True):
        check_same(name, found.data, wanted.data, folder)
    return {dtype}


def _prompts(template: Template, base: Path) -> list[list[int]]:
    """Prompts of bundled samples in both languages, the beginning of long ones."""
    most = min(PROMPT_TOKENS, (context_length(base) or PROMPT_TOKENS) // 2)
    return [
        prompt_ids(template, prompt_of(row))[:most]
        for chinese in (True, False)
        for row in bundled_rows(chinese=chinese)
    ]


def _samples(template: Template, base: Path) -> list[Sample]:
    """Bundled samples in both languages with their answers, the beginning of long ones."""
    most = min(SAMPLE_TOKENS, context_length(base) or SAMPLE_TOKENS)
    conversations = [row for chinese in (True, False) for row in bundled_rows(chinese=chinese)]
    return tokenize(template, conversations, most, "truncate").samples


def _judge(lost: Lost, dtypes: set[torch.dtype]) -> str:
    """Where the difference from base + adapter comes from, for the user; a UserError if merging itself made one.

    Args:
        lost: merging in fp32 and the written model, each against base + adapter.
        dtypes: in which the changed weights are stored.
    """
    merging, found = judge_merging(lost.merging), lost.result
    agreed = (
        f"the most likely token agrees at {found.agree:.1%}. Greedy answers: {found.same_answers} of {found.answers} "
        "are the same."
    )
    if dtypes <= {torch.float32}:
        return f"{merging}\nStored in float32 and read back: nothing is rounded; {agreed}"
    kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return (
        f"{merging}\nStored in {kinds}, and read back: each weight is the merged one rounded once. That alone moves "
        f"logits by {found.largest:.4f} at most, {found.mean:.5f} on average, {found.mean / found.spread:.2%} of their "
        f"spread; {agreed} --save_dtype float32 rounds nothing, at twice the size."
    )
