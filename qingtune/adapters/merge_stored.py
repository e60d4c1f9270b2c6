"""An adapter's files read without a model, so that merging, exporting and answering can go through the base's weights
one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from qingtune.adapters.full_modules import modules_of
from qingtune.adapters.variants import LowRank, LowRankStack
from qingtune.errors import UserError
from qingtune.models.stored_weights import PARTS_OF_EXPERTS, StoredWeights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Names of modules that hold a model's embedding, by the conventions of Transformers.
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "word_embeddings", "wte"})


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter by the full names of the parameters that it changes, such as `model.layers.0.mlp.up_proj.weight`, or
    `model.layers.0.mlp.experts.down_proj`; of a multimodal model's, by those in a model of text alone.

    Attributes:
        folder: where its files lie.
        layers: low-rank changes of weights.
        whole: parameters that take the place of the base's.
        transposed: whether the base holds weights as [in, out], as GPT-2 does.
        keeps_tie: whether a head and an embedding that are one matrix stay so.
    """

    folder: Path
    layers: dict[str, LowRank | LowRankStack]
    transposed: bool
    whole: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    keeps_tie: bool = True

    @property
    def names(self) -> set[str]:
        """The parameters that it changes; the head too where it stays as it is and the embedding, if tied, does not."""
        return {*self.layers, *self.whole, *({HEAD} if self.parts_head else ())}

    @property
    def parts_head(self) -> bool:
        """Whether head and embedding can be one matrix no longer.

        The merged model's config.json then says tie_word_embeddings false, and its weights hold the head: where the
        base's do not, it is `merged(HEAD, the base's embedding)`.
        """
        modules = {module.rpartition(".")[2] for module in modules_of(self.whole)}
        return not self.keeps_tie and (HEAD in self.whole or bool(modules & _EMBEDDINGS))

    def for_base(self, stored: Collection[str]) -> StoredAdapter:
        """The same for a base of these tensors, which may hold an expert's matrices one by one, gate and up apart."""
        layers: dict[str, LowRank | LowRankStack] = {}
        for name, layer in self.layers.items():
            module, _, matrix = name.rpartition(".")
            if not isinstance(layer, LowRankStack) or name in stored:
                layers[name] = layer
                continue
            parts = PARTS_OF_EXPERTS[matrix]
            for number in range(len(layer.a)):
                expert = layer.expert(number)
                for part, b in zip(parts, expert.b.chunk(len(parts)), strict=True):
                    layers[f"{module}.{number}.{part}.weight"] = replace(expert, b=b)
        return replace(self, layers=layers)

    def check_names(self, stored: Collection[str]) -> None:
        """Raise a UserError unless a base holds all that the adapter changes."""
        if unknown := sorted(self.names - set(stored) - {HEAD}):  # a tied head is not stored
            raise UserError(
                f"the adapter belongs to another model: this one has no {unknown[0]}",
                where=str(self.folder),
                fix="Pass the base model that the adapter was trained on.",
            )

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A stored parameter with the adapter's change, in fp32; the parameter itself where there is none.

        Args:
            name: the parameter's.
            weight: as the base stores it. For a head tied to the embedding, the embedding.

        Raises:
            UserError: their shapes do not fit.
        """
        if name in self.whole:
            self._check(name, weight, self.whole[name].shape == weight.shape)
            return self.whole[name].float()
        layer = self.layers.get(name)
        if layer is None:
            return weight
        dense = weight.t() if self.transposed else weight
        self._check(name, weight, tuple(dense.shape) == layer.shape)
        merged = layer.merged(dense)
        return merged.t() if self.transposed else merged

    def _check(self, name: str, weight: torch.Tensor, fits: bool) -> None:
        if not fits:
            raise UserError(
                f"the adapter does not fit: {name} is {list(weight.shape)} in the base",
                where=str(self.folder),
                fix="Pass the base model that the adapter was trained on.",
            )


class MergedWeights(StoredWeights):
    """A base's tensors with an adapter's changes, read one at a time; without an adapter, the base's alone.

    A separate head that is missing in the files is made of the embedding.

    Attributes:
        adapter: the adapter.
        changed: names of the parameters that it changes; they are read in fp32.

    Raises:
        UserError: the base's files are broken.
    """

    def __init__(self, base: Path, adapter: StoredAdapter | None) -> None:
        super().__init__(base)
        self.adapter = adapter = adapter and adapter.for_base(self.shapes)
        self.changed = adapter.names if adapter else set[str]()

    def unchanged(self, name: str) -> torch.Tensor:
        """The base's own tensor, in separate memory."""
        return super().read(EMBEDDING if name == HEAD and HEAD not in self.shapes else name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own memory."""
        weight = self.unchanged(name)
        return self.adapter.merged(name, weight) if self.adapter else weight

    def expert(self, name: str, number: int) -> torch.Tensor:
        """One expert's part of a tensor of all experts, not to be written to."""
        weight = super().mapped(name)[number]
        if not self.adapter:
            return weight
        if name in self.adapter.whole:
            return self.adapter.whole[name][number].float()
        layer = self.adapter.layers.get(name)
        return layer.expert(number).merged(weight) if isinstance(layer, LowRankStack) else weight

    def mapped(self, name: str) -> torch.Tensor:
        """A tensor that stays in its file if the adapter does not change it."""
        return self.read(name) if name in self.changed else super().mapped(name)
