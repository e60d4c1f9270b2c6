"""One new token of each of several sequences, through a whole decoder in C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import cast

import torch

from qingtune.answering.decoder.cache import AnswerCache, AnswerShape
from qingtune.answering.decoder.layer import AnswerLayer, AnswerNorm, AttentionBlock, MLPBlock
from qingtune.answering.decoder.native.matrices import MatrixStruct, NativeMatrix

Pointer = ctypes.c_void_p


class _LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, MatrixStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((name, Pointer) for name in ("input_norm", "q_norm", "k_norm", "mlp_norm")),
    ]


class _ModelStruct(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_LayerStruct)),
        ("head", MatrixStruct),
        *((name, Pointer) for name in ("norm", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "inner", "queries", "keys", "size")),
        *((name, ctypes.c_float) for name in ("scale", "epsilon", "head_epsilon")),
    ]


class _CacheStruct(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("wide", "slots", "capacity")),
        ("places", Pointer),
    ]


class AnswerStep:
    """A model as answer_step.c reads it.

    Args:
        layers: with native matrices only; likewise the head, [V, D].
        norm: the last one.
        rotary: cos and sin, each [context, d / 2].
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        shape: AnswerShape,
        layers: Sequence[AnswerLayer],
        norm: AnswerNorm,
        head: NativeMatrix,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._library = library
        self._held: list[torch.Tensor] = []  # what pointers point to
        self._layers = (_LayerStruct * len(layers))(*(self._layer(layer) for layer in layers))
        self._vocabulary = head.struct().rows
        first = cast("AttentionBlock", layers[0].mixer)
        self._model = _ModelStruct(
            self._layers, head.struct(), *(self._wide(part) for part in (norm.weight, *rotary)),
            len(layers), len(norm.weight), self._layers[0].down.columns, shape.queries, shape.keys, shape.size,
            shape.scale, norm.epsilon, first.q_norm.epsilon if first.q_norm else 0.0,
        )  # fmt: skip
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def logits(self, x: torch.Tensor, cache: AnswerCache) -> torch.Tensor:
        """The logits [T, V] after one more token of each of the first T slots, from their embeddings [T, D]; fp32.

        Keys and values go into the cache, in which there must be room for them; the caller notes their ids.
        """
        x, count, places = x.float().contiguous(), len(x), torch.tensor([len(ids) for ids in cache.ids[: len(x)]])
        keys, values = cache.keys, cache.values
        slots, capacity = keys.shape[1], keys.shape[3]
        assert count <= slots
        assert int(places.max()) < capacity
        wide = cache.dtype == torch.float32
        held = _CacheStruct(keys.data_ptr(), values.data_ptr(), wide, slots, capacity, places.data_ptr())
        model, inner = ctypes.byref(self._model), ctypes.byref(held)
        numbers = ctypes.c_int64(count), ctypes.c_int64(torch.get_num_threads())
        needed = self._library.scratch_bytes(model, inner, *numbers)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        logits = torch.empty(count, self._vocabulary)
        self._library.answer_step(
            model, inner, Pointer(x.data_ptr()), *numbers, Pointer(self._scratch.data_ptr()), Pointer(logits.data_ptr())
        )
        return logits

    def _layer(self, layer: AnswerLayer) -> _LayerStruct:
        mixer, mlp = cast("AttentionBlock", layer.mixer), cast("MLPBlock", layer.mlp)
        matrices = (cast("NativeMatrix", part).struct() for part in (mixer.qkv, mixer.o, mlp.gate_up, mlp.down))
        norms = (layer.input_norm, mixer.q_norm, mixer.k_norm, layer.mlp_norm)
        return _LayerStruct(*matrices, *(self._wide(norm.weight) if norm else None for norm in norms))

    def _wide(self, numbers: torch.Tensor) -> int:
        """Where a copy in fp32 lies, which lives as long as this does."""
        self._held.append(numbers.float().contiguous())
        return self._held[-1].data_ptr()
