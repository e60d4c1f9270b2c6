"""The model that a run trains: the base in the right dtype, quantised and with adapters as the settings ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qingtune.adapters.of_settings import adapt, weights_dtype
from qingtune.adapters.variants import TAKEN
from qingtune.config.training import TrainConfig
from qingtune.kernels.device import Hardware
from qingtune.kernels.linear import QuantizedLinear
from qingtune.models.base import load_base
from qingtune.models.load import config_of, dtype_of_all, model_on_meta, stored_dtype
from qingtune.output.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_adapted_model(config: TrainConfig, folder: Path, hardware: Hardware) -> PreTrainedModel:
    """The model on its device, quantised and with adapters as the method asks; reports the trained share."""
    full = config.method == "full"
    bits = config.quantization_bit if config.method == "qlora" else None
    stored = dtype_of_all(folder)
    dtype = weights_dtype(
        config, hardware.device.type, hardware.dtype, stored, lambda: model_on_meta(config_of(folder), stored, folder)
    )
    model = load_base(folder, dtype, bits, hardware.device, config.cache_dir)
    if full and dtype == stored_dtype(folder):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # what is loaded as it is stored may lie in the file's pages
    if not full:
        start = config.init_lora_weights
        if start in TAKEN:
            say(f"{start}: subtracting the initial adapters from the weights; this may take minutes.")
        for notice in adapt(config, model, hardware.dtype):
            say(notice)
    trained, everything = count_parameters(model)
    say(f"Trainable: {trained:,} of {everything:,} parameters ({trained / everything:.2%}).")
    return model


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Trained parameters, and all of them; packed weights, parameters where they are sharded, count with their
    original size."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, packed + sum(p.numel() for p in model.parameters() if p.is_floating_point())
