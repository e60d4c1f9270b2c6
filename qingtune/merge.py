"""The recipe of merging: base and adapter become one model, which is loaded again and compared."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from qingtune.adapters.files import load_adapter, read_adapter_config
from qingtune.adapters.lora import merge_lora
from qingtune.config import MergeConfig
from qingtune.data.tokenize import make_template, prompt_ids
from qingtune.errors import UserError
from qingtune.files import move_into_place, staging_folder
from qingtune.inference import bundled_prompts, find_base, logits_of
from qingtune.models.load import load_model, load_tokenizer, save_model, stop_ids, stored_dtype
from qingtune.models.source import context_length
from qingtune.quiet import quieten
from qingtune.record import write_record

# Rounding the merged weights to 16 bits moves logits a little. Mean difference measured in bf16, as a share of the
# logits' spread: 0.5 % on SmolLM2-135M, 1.8 % on Qwen2.5-0.5B.
MOST_MEAN_DIFFERENCE = 0.03  # of the logits' standard deviation


def merge(config: MergeConfig) -> None:
    """Write the merged model to output_dir, load it again and compare its logits with base + adapter.

    Raises:
        UserError: something is missing or does not fit, or the merged model differs by more than the bound.
    """
    quieten()
    adapter, output_dir = Path(config.lora_model), Path(config.output_dir)
    read_adapter_config(adapter)
    _check_output(output_dir, config.overwrite_output_dir)
    base, record = find_base(config, adapter)
    dtype = stored_dtype(base)
    own = (adapter / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(adapter if own else base)
    template = make_template(tokenizer, record.stop_ids if record else stop_ids(base))
    prompts = [
        prompt_ids(template, prompt)[: context_length(base)]
        for chinese in (True, False)
        for _, prompt in bundled_prompts(chinese=chinese)
    ]

    with staging_folder(output_dir) as half_done:
        before = _merge_into(half_done, base, adapter, dtype, prompts)
        tokenizer.save_pretrained(half_done)
        _compare(before, _logits(half_done, prompts))
        if record:
            write_record(half_done, record)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        move_into_place(half_done, output_dir)
    print(f"Merged model: {output_dir}\nTalk to it: qingtune chat --base_model {output_dir}")


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


def _merge_into(
    folder: Path, base: Path, adapter: Path, dtype: torch.dtype, prompts: list[list[int]]
) -> list[torch.Tensor]:
    """Write the merged model in the base's dtype; returns the logits of base + adapter, computed in fp32."""
    model = load_model(base, torch.float32)
    load_adapter(model, adapter)
    model.eval()
    logits = [logits_of(model, ids) for ids in prompts]
    merge_lora(model)
    save_model(model, folder, dtype)
    return logits


def _logits(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    model = load_model(folder, torch.float32)
    model.eval()
    return [logits_of(model, ids) for ids in prompts]


def _compare(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """Tell how far the logits moved.

    Raises:
        UserError: further than the bound.
    """
    one, two = torch.cat(before), torch.cat(after)
    difference = (one - two).abs()
    spread = float(one.std())
    agree = float((one.argmax(1) == two.argmax(1)).float().mean())
    print(
        f"Merged against base + adapter, {len(one):,} places: logits differ by {float(difference.max()):.4f} at most, "
        f"{float(difference.mean()):.5f} on average (their spread is {spread:.2f}); "
        f"the likeliest token agrees at {agree:.1%}.",
        file=sys.stderr,
    )
    if float(difference.mean()) > MOST_MEAN_DIFFERENCE * spread:
        raise UserError("the merged model differs from base + adapter beyond rounding; nothing was written")
