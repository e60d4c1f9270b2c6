"""What a GGUF file says of its model's shape, in the words of a config.json; the weights are not read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qingtune.errors import UserError, shorten
from qingtune.files.foreign import foreign_files
from qingtune.models.gguf_settings import ROPE_FACTORS, GGUFSettings

# A GGUF file may hold the head apart from the embedding although the model ties them: the same matrix, quantised twice,
# differs by a few per cent (Qwen2.5-0.5B Q4_K_M: 4.5 %); two matrices trained apart differ by more than their size.
TIED_BELOW = 0.15
ROWS_TO_COMPARE = 64

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_UNREADABLE = "the header of this GGUF file cannot be read"
MOST_DIMENSIONS, MOST_DEPTH = 8, 8  # of a tensor; of arrays within arrays
_MODEL_TYPES = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text", "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
}  # fmt: skip
_WHOLE_TOKENS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
# config.json's names -> GGUF's, after the architecture's.
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_value_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "full_attention_interval": "full_attention_interval",
}


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: its sizes, innermost first, its number format, and its place after the header."""

    sizes: tuple[int, ...]
    kind: int
    offset: int

    def block(self) -> tuple[Any, int, int]:
        """Its number format, with the numbers and bytes of a block of it; ValueError: the format is not known."""
        from gguf import GGMLQuantizationType
        from gguf.constants import GGML_QUANT_SIZES

        kind = GGMLQuantizationType(self.kind)
        return kind, *GGML_QUANT_SIZES[kind]


class _Reader:
    """Reads numbers, texts and arrays of numbers; other arrays are passed by."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def number(self, code: str) -> Any:
        length = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self._bytes(length))[0]

    def text(self) -> str:
        return self._bytes(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a kind; None for an array that is not of numbers."""
        if depth > MOST_DEPTH:
            raise ValueError("arrays are nested too deeply")
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            size = struct.calcsize(_NUMBERS[inner])
            return [n for (n,) in struct.iter_unpack(f"<{_NUMBERS[inner]}", self._bytes(size * count))]
        for _ in range(count):
            self._bytes(self.number("Q")) if inner == _TEXT else self.value(inner, depth + 1)
        return None

    def _bytes(self, length: int) -> bytes:
        found = b"" if length > self.size else self.file.read(length)
        if len(found) < length:
            raise ValueError("it is cut off")
        return found


def check_gguf_header(path: Path) -> None:
    """Raise a UserError unless a .gguf file holds a model, its header can be read, and its tensors lie within it."""
    with foreign_files(_UNREADABLE, path), path.open("rb") as file:
        size = path.stat().st_size
        values, tensors, data = _read(file, size)
        for name, tensor in tensors.items():
            _, numbers, block_bytes = tensor.block()
            end = data + tensor.offset + math.prod(tensor.sizes) // numbers * block_bytes
            if end > size:
                raise ValueError(f"{shorten(name)} ends at byte {end:,} of {size:,}")
    if values.get("general.type") == "adapter":
        fix = "Pass the base model, and the adapter's own folder as --lora_model."
        raise UserError("this file holds an adapter, not a model", where=str(path), fix=fix)


def takes_whole_tokens(path: Path) -> bool:
    """Whether llama.cpp takes a piece of text that is a token as it is, without regard to merges."""
    with foreign_files(_UNREADABLE, path), path.open("rb") as file:
        values, _, _ = _read(file, path.stat().st_size)
    return values.get("tokenizer.ggml.model") == "gpt2" and values.get("tokenizer.ggml.pre") in _WHOLE_TOKENS


def config_of_gguf(path: Path) -> dict[str, Any]:
    """What a .gguf file says of a config.json: sizes, positions, attention; a UserError if its header is broken."""
    with foreign_files(_UNREADABLE, path), path.open("rb") as file:
        values, tensors, data = _read(file, path.stat().st_size)
        tied = _is_tied(file, tensors, data)
        factors = {name: _vector(file, tensors[name], data) for name in ROPE_FACTORS if name in tensors}
        kind = str(values.get("general.architecture"))
        further = GGUFSettings(kind, values, tensors, factors).config()
    config: dict[str, Any] = {
        name: values[f"{kind}.{theirs}"] for name, theirs in _SIZES.items() if f"{kind}.{theirs}" in values
    }
    config["vocab_size"] = tensors["token_embd.weight"].sizes[1] if "token_embd.weight" in tensors else None
    config["model_type"] = "mixtral" if kind == "llama" and config.get("num_experts") else _MODEL_TYPES.get(kind, kind)
    return {**config, **further, "tie_word_embeddings": tied, "dtype": "bfloat16"}  # as it is converted


def _read(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, _Tensor], int]:
    """The header's values, the tensors by name, and where their data begin."""
    reader = _Reader(file, size)
    if file.read(4) != b"GGUF":
        raise ValueError("it is not a GGUF file")
    if reader.number("I") not in (2, 3):
        raise ValueError("its version is not supported")
    count_of_tensors, count_of_values = reader.number("Q"), reader.number("Q")
    values: dict[str, Any] = {}
    for _ in range(count_of_values):
        name = reader.text()
        if name in values:
            raise ValueError(f"{shorten(name)} occurs twice")
        values[name] = reader.value(reader.number("I"))
    tensors: dict[str, _Tensor] = {}
    for _ in range(count_of_tensors):
        name = reader.text()
        dimensions = reader.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{shorten(name)} has {dimensions:,} dimensions")
        sizes = tuple(reader.number("Q") for _ in range(dimensions))
        if name in tensors:
            raise ValueError(f"{shorten(name)} occurs twice")
        tensors[name] = _Tensor(sizes, reader.number("I"), reader.number("Q"))
    aligned = values.get("general.alignment", 32)
    if not isinstance(aligned, int) or not 0 < aligned <= 1 << 20:
        raise ValueError(f"its alignment is {aligned!r}")
    return values, tensors, -(-file.tell() // aligned) * aligned


def _vector(file: BinaryIO, tensor: _Tensor, data: int) -> list[float]:
    """The numbers of a tensor in fp32; ValueError if it is in another form."""
    if tensor.kind != 0 or len(tensor.sizes) != 1:
        raise ValueError("factors of rotary positions are not in fp32")
    count = tensor.sizes[0]
    file.seek(data + tensor.offset)
    return list(struct.unpack(f"<{count}f", file.read(4 * count)))


def _is_tied(file: BinaryIO, tensors: dict[str, _Tensor], data: int) -> bool:
    """Whether head and embedding are one matrix, by the rows at the vocabulary's beginning.

    The conversion (gguf_convert.py) compares all rows.
    """
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return True
    if head.sizes != embedding.sizes:
        return False
    import numpy as np
    from gguf.quants import dequantize

    width, rows = head.sizes[0], min(ROWS_TO_COMPARE, head.sizes[1])
    found: list[Any] = []
    for tensor in (head, embedding):
        kind, numbers, size = tensor.block()
        file.seek(data + tensor.offset)
        packed = np.frombuffer(file.read(width // numbers * size * rows), dtype=np.uint8).reshape(rows, -1)
        found.append(dequantize(packed, kind).astype(np.float64))
    apart = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1])
    return bool(apart < TIED_BELOW)
