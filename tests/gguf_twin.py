"""GGUF files in forms that the gguf package reads but does not write: copies of a file with other tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

# Bytes of a block at which a scale in 16 bits lies; all others may hold anything.
_SCALES = {
    Kind.Q4_0: (0,), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,), Kind.IQ4_NL: (0,),
    Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip
Encode = Callable[[str, Any], tuple[Any, Kind]]


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> Any:
    """Blocks with every bit of numbers and scales in use, uint8 [rows, bytes a row]; their size is that of weights."""
    numbers, size = GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows * columns // numbers, size), dtype=np.uint8)
    for place in _SCALES[kind]:
        scale = draw.uniform(0.5, 1.5, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scale[:, None].view(np.uint8)
    size_of_numbers = np.sqrt(np.mean(dequantize(blocks, kind) ** 2))
    for place in _SCALES[kind]:
        scale = blocks[:, place : place + 2].copy().view(np.float16) * np.float16(0.1 / size_of_numbers)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


def copy_gguf(source: Path, target: Path, encode: Encode) -> None:
    """Write a file's copy with its tensors in other forms, or with others in their place.

    Args:
        encode: gives for a tensor's name and numbers, fp32, its bytes and their form.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        data, kind = encode(tensor.name, numbers)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_form(kind: Kind) -> Encode:
    """Matrices in a form that gguf writes; vectors in fp32."""

    def encode(_: str, numbers: Any) -> tuple[Any, Kind]:
        wanted = Kind.F32 if numbers.ndim == 1 else kind
        return quantize(np.ascontiguousarray(numbers, np.float32), wanted), wanted

    return encode
