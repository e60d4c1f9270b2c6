"""An adapter's files read without a model, so that merging, exporting and answering can go through the base's weights
one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from qingtune.adapters.files import read_adapter_config, read_adapter_tensors
from qingtune.errors import UserError

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight.

    Attributes:
        a: fp32 [r, in].
        b: fp32 [out, r].
        scaling: of their product.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] with the addition, fp32."""
        return torch.addmm(weight.float(), self.b, self.a, alpha=self.scaling)

    def product(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] times the weight [out, in] and the addition beside it, as in training: [T, out]."""
        low = x @ self.a.to(x).t()
        return torch.addmm(x @ weight.t(), low, self.b.to(x).t(), alpha=self.scaling)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter by the full names of the parameters that it changes, such as `model.layers.0.mlp.up_proj.weight`."""

    folder: Path
    layers: dict[str, LowRank]
    transposed: bool  # GPT-2's weights are held as [in, out]

    @property
    def names(self) -> set[str]:
        """The parameters that it changes."""
        return set(self.layers)

    def check_names(self, stored: Collection[str]) -> None:
        """Whether a base holds all that the adapter changes.

        Raises:
            UserError: it does not.
        """
        if unknown := sorted(self.names - set(stored) - {HEAD}):  # a tied head is not stored
            raise UserError(
                f"the adapter is for another model: this one has no {unknown[0]}",
                where=str(self.folder),
                fix="Name the base model that the adapter was trained on.",
            )

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A stored parameter with the adapter's change, in fp32; the parameter itself where there is none.

        Raises:
            UserError: their shapes do not fit.
        """
        layer = self.layers.get(name)
        if layer is None:
            return weight
        dense = weight.t() if self.transposed else weight
        if dense.shape != (len(layer.b), layer.a.shape[1]):
            raise UserError(
                f"the adapter does not fit: {name} is {list(weight.shape)} in the base",
                where=str(self.folder),
                fix="Name the base model that the adapter was trained on.",
            )
        merged = layer.merged(dense)
        return merged.t() if self.transposed else merged


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter's files.

    Raises:
        UserError: no adapter here, a broken one, or one of a kind that is not supported.
    """
    config = read_adapter_config(folder)
    tensors = read_adapter_tensors(folder)
    scaling = float(config["lora_alpha"]) / int(config["r"])
    layers: dict[str, LowRank] = {}
    for layer in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        a, b = (tensors.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            raise UserError(f"the adapter is not whole: {layer} has only one matrix", where=str(folder))
        layers[f"{layer}.weight"] = LowRank(a.float(), b.float(), scaling)
    return StoredAdapter(folder, layers, bool(config.get("fan_in_fan_out")))
