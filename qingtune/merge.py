"""The recipe of merging: an adapter goes into its base's weights, and the result is compared with the two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qingtune.adapters.files import load_adapter, read_adapter_config
from qingtune.adapters.lora import merge_lora
from qingtune.adapters.stored import EMBEDDING, HEAD, StoredAdapter, read_adapter
from qingtune.command_config import MergeConfig
from qingtune.data.format import read_conversations
from qingtune.data.tokenize import Sample, Template, make_template, prompt_ids, tokenize
from qingtune.errors import UserError
from qingtune.files import copy_file, disk_errors, move_into_place, staging_folder, write_json
from qingtune.hardware import choose_hardware, memory_errors
from qingtune.inference import bundled_heldout, bundled_prompts, find_base
from qingtune.invocation import command_line
from qingtune.merge_4bit import check_weights, judge, write_in_4bit
from qingtune.merge_check import Comparison, compare_merged, measure_lost
from qingtune.models.load import StoredWeights, load_model, load_tokenizer, save_model, stop_ids, stored_dtype
from qingtune.models.shards import add_tensor, copy_changed
from qingtune.models.source import context_length, read_model_config, stored_in_4bit
from qingtune.output import say, show
from qingtune.quiet import quieten
from qingtune.record import write_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rounding the merged weights to 16 bits moves logits a little. Mean difference measured in bf16, as a share of the
# logits' spread: 1.9 % on SmolLM2-135M, 0.2 % on Qwen2.5-0.5B (docs/measurements.md).
MOST_MEAN_DIFFERENCE = 0.03  # of the logits' standard deviation
PROMPT_TOKENS = 160  # of each prompt that is compared, at most
SAMPLE_TOKENS = 384  # of each sample whose answer's loss is compared, at most

_SMALLER = "Close other programs, or merge on a machine with more memory."


def merge(config: MergeConfig) -> None:
    """Write the merged model to output_dir, load it and compare it with base and adapter.

    Raises:
        UserError: something is missing or does not fit, or the merged model differs by more than the bound.
    """
    quieten()
    folder, output_dir = Path(config.lora_model), Path(config.output_dir)
    read_adapter_config(folder)
    _check_output(output_dir, config.overwrite_output_dir)
    base, record = find_base(config, folder)
    if stored_in_4bit(base):
        raise UserError(
            "the base is stored in 4 bits, and merging into these would round a second time",
            where=str(base),
            fix="Name the 16-bit model that it was made of: --base_model NAME --allow_other_base. "
            "--save_in_4bit rounds the result, once.",
        )
    if output_dir.resolve() == base.resolve():
        raise UserError("output_dir holds the base model", where=str(output_dir), fix="Choose another output_dir.")
    adapter = read_adapter(folder)
    own = (folder / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(folder if own else base)
    template = make_template(tokenizer, record.stop_ids if record else stop_ids(base))
    hardware = choose_hardware()
    with staging_folder(output_dir) as half_done:
        with disk_errors("the merged model", output_dir, "Make room on the disk, or choose another output_dir."):
            with memory_errors("the adapter was merged", base, _SMALLER):
                if config.save_in_4bit:
                    write_in_4bit(half_done, base, adapter)
                else:
                    _write(half_done, base, adapter)
            _write_rest(half_done, base, tokenizer)
        prompts = _prompts(template, base)
        with memory_errors("the merged model was compared", output_dir, _SMALLER):
            if config.save_in_4bit:
                samples = _samples(template, base)
                say(check_weights(half_done, base, adapter))
                lost = measure_lost(base, adapter, half_done, prompts, samples, template.stop_ids, hardware)
                say(judge(lost))
            else:
                _judge(compare_merged(base, adapter, half_done, prompts, template.stop_ids, hardware))
        if record:
            write_record(half_done, record)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        move_into_place(half_done, output_dir)
    show(f"Merged model: {output_dir}\nTalk to it: {command_line('chat', base_model=output_dir)}")


def _check_output(output_dir: Path, overwrite: bool) -> None:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    ours = (
        output_dir.is_dir()
        and (output_dir / "config.json").exists()
        and not (output_dir / "adapter_config.json").exists()
    )
    if not ours:
        raise UserError("output_dir holds something else", where=str(output_dir), fix="Choose another output_dir.")
    if not overwrite:
        raise UserError(
            "output_dir holds a model already", where=str(output_dir), fix="Pass --overwrite_output_dir to replace it."
        )


def _write(folder: Path, base: Path, adapter: StoredAdapter) -> None:
    """Write the merged weights and their configuration, one tensor in memory at a time where names allow it."""
    stored = StoredWeights(base).shapes
    if not adapter.names - {HEAD} <= set(stored):  # stored under names that Transformers translates while it loads
        say("Merging in whole: the base's tensors have other names in its files than in the model.")
        model = load_model(base, torch.float32)
        load_adapter(model, adapter.folder)
        merge_lora(model)
        save_model(model, folder, stored_dtype(base))
        return
    copy_changed(base, folder, adapter.names, adapter.merged)
    settings = read_model_config(base)
    if adapter.unties(settings):
        embedding = StoredWeights(base).read(EMBEDDING)
        add_tensor(folder, HEAD, adapter.merged(HEAD, embedding).to(embedding.dtype))
        settings["tie_word_embeddings"] = False
    write_json(folder / "config.json", settings)


def _write_rest(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    generation = base / "generation_config.json"
    if generation.exists() and not (folder / generation.name).exists():
        copy_file(generation, folder / generation.name)
    tokenizer.save_pretrained(folder)


def _prompts(template: Template, base: Path) -> list[list[int]]:
    """Prompts of bundled samples in both languages, the beginning of long ones."""
    most = min(PROMPT_TOKENS, (context_length(base) or PROMPT_TOKENS) // 2)
    return [
        prompt_ids(template, prompt)[:most]
        for chinese in (True, False)
        for _, prompt in bundled_prompts(chinese=chinese)
    ]


def _samples(template: Template, base: Path) -> list[Sample]:
    """Bundled samples in both languages with their answers, the beginning of long ones."""
    most = min(SAMPLE_TOKENS, context_length(base) or SAMPLE_TOKENS)
    conversations = [
        conversation
        for chinese in (True, False)
        for conversation in read_conversations([str(bundled_heldout(chinese=chinese))], None, "raise").conversations[:3]
    ]
    return tokenize(template, conversations, most, "truncate").samples


def _judge(found: Comparison) -> None:
    """Tell how far the logits moved.

    Raises:
        UserError: further than the bound.
    """
    say(
        f"Merged against base + adapter, {found.places:,} places: logits differ by {found.largest:.4f} at most, "
        f"{found.mean:.5f} on average (their spread is {found.spread:.2f}); the likeliest token agrees at "
        f"{found.agree:.1%}. Greedy answers: {found.same_answers} of {found.answers} are the same."
    )
    if not found.mean <= MOST_MEAN_DIFFERENCE * found.spread:
        raise UserError("the merged model differs from base + adapter beyond rounding; nothing was written")
