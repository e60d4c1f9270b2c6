"""One new token of each of several sequences, through a whole decoder in C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch

from qingtune.answering.decoder.cache import AnswerCache, AnswerShape
from qingtune.answering.decoder.layer import AnswerLayer, AnswerNorm, AttentionBlock, DeltaBlock, ExpertsBlock, MLPBlock
from qingtune.answering.decoder.native.experts import MixtureStruct, MLPStruct
from qingtune.answering.decoder.native.matrices import MatrixStruct, NativeMatrix
from qingtune.answering.decoder.packed import Matrix
from qingtune.answering.decoder.rotary import Rotary
from qingtune.kernels.delta.rule import EPSILON

Pointer, Number = ctypes.c_void_p, ctypes.c_int64
NO_WINDOW = 2**62


def _matrices(*names: str) -> list[tuple[str, Any]]:
    return [(name, MatrixStruct) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, Pointer) for name in names]


def _numbers(*names: str) -> list[tuple[str, Any]]:
    return [(name, Number) for name in names]


class _AttentionStruct(ctypes.Structure):
    _fields_ = [*_matrices("qkv", "o"), *_pointers("q_norm", "k_norm"), *_numbers("window", "rotary")]


class _DeltaStruct(ctypes.Structure):
    _fields_ = [*_matrices("qkv_z", "b_a", "out"), *_pointers("taps", "rate", "bias", "weight")]


class _LayerStruct(ctypes.Structure):
    _fields_ = [
        *_pointers("input_norm", "mlp_norm", "mixer_output_norm", "mlp_output_norm"),
        ("attention", ctypes.POINTER(_AttentionStruct)),
        ("net", ctypes.POINTER(_DeltaStruct)),
        ("mlp", ctypes.POINTER(MLPStruct)),
        ("mixture", ctypes.POINTER(MixtureStruct)),
        *_numbers("number"),
    ]


class _ModelStruct(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_LayerStruct)),
        *_matrices("head"),
        *_pointers("norm"),
        *_numbers("count", "hidden", "queries", "keys", "size", "gated"),
        *_numbers("key_heads", "value_heads", "key_size", "value_size", "seen"),
        *((name, ctypes.c_float) for name in ("scale", "epsilon", "length_epsilon", "cap")),
    ]


class _TurnsStruct(ctypes.Structure):
    _fields_ = [*_pointers("cos", "sin"), *_numbers("half")]


class _CacheStruct(ctypes.Structure):
    _fields_ = [
        *_pointers("keys", "values"),
        *_numbers("wide", "slots", "capacity"),
        *_pointers("places", "rows", "states"),
        ("turns", ctypes.POINTER(_TurnsStruct)),
        *_pointers("factors"),
    ]


class AnswerStep:
    """A model as answer_step.c reads it.

    Args:
        layers: with native matrices only; likewise the head, [V, D].
        norm: the last one; all have its epsilon.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        shape: AnswerShape,
        layers: Sequence[AnswerLayer],
        norm: AnswerNorm,
        head: NativeMatrix,
        rotary: Rotary,
    ) -> None:
        self._library, self._rotary = library, rotary
        self._tables = list(rotary.tables)
        self._held: list[torch.Tensor] = []  # what pointers point to
        structs = (_LayerStruct * len(layers))(*(self._layer(layer) for layer in layers))
        self._vocabulary, self._filled = head.rows, head.shape[0]
        net = shape.delta
        sizes = (net.key_heads, net.value_heads, net.key_size, net.value_size, net.kernel) if net else (0,) * 5
        self._model = _ModelStruct(
            structs, head.struct(), self._wide(norm.weight), len(layers), len(norm.weight), shape.queries, shape.keys,
            shape.size, shape.gated, *sizes, shape.scale, norm.epsilon, EPSILON, shape.cap or 0.0,
        )  # fmt: skip
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def logits(self, x: torch.Tensor, cache: AnswerCache) -> torch.Tensor:
        """The logits [T, V] after one more token of each of the first T slots, from their embeddings [T, D]; fp32.

        What layers keep goes into the cache, in which there must be room; the caller notes the tokens' ids.
        """
        x, count, lengths = x.float().contiguous(), len(x), [len(ids) for ids in cache.ids[: len(x)]]
        slots, capacity = cache.keys.shape[1], cache.keys.shape[3]
        assert count <= slots
        assert max(lengths) < capacity
        places = torch.tensor(lengths)
        factor = self._rotary.query_factor(places)
        tables = self._rotary.at(lengths, cache.stretched[:count])
        turned = [[part.float().contiguous() for part in tables[name]] for name in self._tables]
        turns = (_TurnsStruct * len(turned))(*((cos.data_ptr(), sin.data_ptr(), cos.shape[2]) for cos, sin in turned))
        held = _CacheStruct(
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.dtype == torch.float32, slots, capacity,
            places.data_ptr(), cache.rows.data_ptr(), cache.states.data_ptr(), turns,
            None if factor is None else factor.data_ptr(),
        )  # fmt: skip
        model, inner = ctypes.byref(self._model), ctypes.byref(held)
        numbers = Number(count), Number(torch.get_num_threads())
        needed = self._library.scratch_bytes(model, inner, *numbers)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        logits = torch.empty(count, self._filled)
        cache.whole[:count] = [False] * count  # until it is through
        self._library.answer_step(
            model, inner, Pointer(x.data_ptr()), *numbers, Pointer(self._scratch.data_ptr()), Pointer(logits.data_ptr())
        )
        return logits[:, : self._vocabulary]

    def _layer(self, layer: AnswerLayer) -> _LayerStruct:
        norms = (layer.input_norm, layer.mlp_norm, layer.mixer_output_norm, layer.mlp_output_norm)
        mixer, mlp = layer.mixer, layer.mlp
        return _LayerStruct(
            *map(self._norm, norms),
            ctypes.pointer(self._attention(mixer)) if isinstance(mixer, AttentionBlock) else None,
            ctypes.pointer(self._delta_net(mixer)) if isinstance(mixer, DeltaBlock) else None,
            ctypes.pointer(_mlp(mlp)) if isinstance(mlp, MLPBlock) else None,
            ctypes.pointer(_mixture(mlp)) if isinstance(mlp, ExpertsBlock) else None,
            mixer.number,
        )

    def _attention(self, block: AttentionBlock) -> _AttentionStruct:
        this = block.attention
        window = NO_WINDOW if this.window is None else this.window
        norms = map(self._norm, (block.q_norm, block.k_norm))
        return _AttentionStruct(_struct(block.qkv), _struct(block.o), *norms, window, self._tables.index(this.rotary))

    def _delta_net(self, block: DeltaBlock) -> _DeltaStruct:
        core = block.core
        matrices = map(_struct, (block.qkv_z, block.b_a, block.out))
        return _DeltaStruct(*matrices, *map(self._wide, (core.taps, core.rate, core.bias, core.weight)))

    def _norm(self, norm: AnswerNorm | None) -> int | None:
        return self._wide(norm.weight) if norm else None

    def _wide(self, numbers: torch.Tensor) -> int:
        """Where a copy in fp32 lies, which lives as long as this does."""
        self._held.append(numbers.float().contiguous())
        return self._held[-1].data_ptr()


def _struct(matrix: Matrix) -> MatrixStruct:
    return cast("NativeMatrix", matrix).struct()


def _mlp(block: MLPBlock) -> MLPStruct:
    pair = cast("NativeMatrix", block.gate_up), cast("NativeMatrix", block.down)
    return MLPStruct.of(pair, block.activation)


def _mixture(block: ExpertsBlock) -> MixtureStruct:
    assert block.native
    return block.native.struct
