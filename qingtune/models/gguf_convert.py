"""A .gguf file -> a folder of Transformers' layout with the weights dequantised to bf16."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch

from qingtune.files.foreign import foreign_files
from qingtune.files.staging import move_into_place, staging_folder
from qingtune.files.write import disk_errors
from qingtune.models.gguf_header import TIED_BELOW, check_gguf_header, config_of_gguf, takes_whole_tokens
from qingtune.output.quiet import quieten_transformers

_CACHE = "Free disk space, or choose another folder with --cache_dir or the environment variable QINGTUNE_CACHE."

# What Transformers' reader takes to be as in the published models, whatever a file says: of Qwen3, how wide heads and
# experts are; and of all models, these.
_AS_PUBLISHED = ("head_dim", "moe_intermediate_size")
_UNREAD = (
    "rope_parameters", "original_max_position_embeddings", "query_pre_attn_scalar", "layer_types",
    "attn_logit_softcapping", "final_logit_softcapping", "attention_bias", "mlp_bias",
)  # fmt: skip


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a dequantised copy of a GGUF model in bf16, tied where head and embedding are the same matrix.

    Raises:
        UserError: the file is broken or of an unknown kind, or the disk is full.
    """
    quieten_transformers()
    check_gguf_header(path)
    with disk_errors("the converted model", folder.parent, _CACHE):
        folder.parent.mkdir(parents=True, exist_ok=True)  # before half a minute of work
    with foreign_files("Transformers cannot read this GGUF file", path):
        model, tokenizer = _read_dequantised(path)
    with disk_errors("the converted model", folder.parent, _CACHE), staging_folder(folder) as half_done:
        model.save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)
        if not folder.exists():  # another process may have been faster
            move_into_place(half_done, folder)


def _read_dequantised(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import transformers

    file = str(path.resolve())
    with (
        contextlib.redirect_stderr(io.StringIO()),  # the converter's bars; its errors are exceptions
        tempfile.TemporaryDirectory() as empty,  # without the files next to the .gguf, such as an adapter
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(empty, gguf_file=file)
        if takes_whole_tokens(path):  # which Transformers leaves at the default
            tokenizer.backend_tokenizer.model.ignore_merges = True
        dequantise = transformers.GgufConfig(dequantize=True)
        config = transformers.AutoConfig.from_pretrained(empty, gguf_file=file)
        written = config_of_gguf(path)
        names = {*_UNREAD, *(_AS_PUBLISHED if config.model_type in ("qwen3", "qwen3_moe") else ())}
        config.update({name: value for name, value in written.items() if name in names})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            empty, gguf_file=file, config=config, dtype=torch.bfloat16, quantization_config=dequantise
        )
    tie_if_same(model)
    return model, tokenizer


@torch.no_grad()
def tie_if_same(model: Any) -> None:
    """Tie head and embedding if they differ by quantisation alone."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if head is embedding or head.shape != embedding.shape:
        return
    if (head.float() - embedding.float()).norm() / embedding.float().norm() < TIED_BELOW:
        model.config.tie_word_embeddings = True
        model.tie_weights()
