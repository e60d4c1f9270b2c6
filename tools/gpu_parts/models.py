"""Models with random weights, made where they are used, and samples for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from gpu_parts.scale import Scale, Shape
from qingtune.adapters.lora import member
from qingtune.adapters.of_settings import adapt, weights_dtype
from qingtune.config.training import TrainConfig
from qingtune.data.batch import Batch, collate
from qingtune.data.tokenize import Sample
from qingtune.kernels.decoder import TrainingDecoder
from qingtune.kernels.linear import QuantizedLinear
from qingtune.models.quantize import quantize_model
from qingtune.planning.planner import SETTINGS
from qingtune.training.engine import trained_bytes
from qingtune.training.optim import make_optimizer

METHODS = ("full", "lora", "qlora8", "qlora4")


def config_of(method: str, **settings: Any) -> TrainConfig:
    """Settings of a method, with adapters of rank 16 on all linear layers."""
    low_rank = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0}
    return TrainConfig.model_validate({**low_rank, **SETTINGS[method], **settings})


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, made on the device."""
    kind, sizes = shape
    config = transformers.AutoConfig.for_model(kind, max_position_embeddings=40960, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def prepare(model: Any, config: TrainConfig, scale: Scale) -> Any:
    """The model as a run trains it: quantised and with adapters as the settings ask."""
    if config.method == "qlora":
        assert config.quantization_bit is not None
        quantize_model(model, config.quantization_bit, scale.device)
    if config.method != "full":
        adapt(config, model, scale.hardware.dtype)
    return model.train()


def dense_dtype(config: TrainConfig, scale: Scale) -> torch.dtype:
    """Of the weights that a run would hold."""
    hardware = scale.hardware
    return weights_dtype(config, hardware.device.type, hardware.dtype, hardware.dtype, lambda: None)


@dataclass
class Trained:
    """A model in training: its decoder, its optimizer, and bytes that a plan counts."""

    config: TrainConfig
    model: Any
    decoder: TrainingDecoder
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> torch.Tensor:
        """One pass and an update; the loss."""
        scale = torch.tensor(1.0 / max(1, len(batch.targets)), device=batch.token_ids.device)
        loss = self.decoder.add_gradients(batch, scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss

    def planned_bytes(self, tokens: int, longest: int) -> int:
        """Weights, gradients, optimizer states and the buffers of a pass."""
        held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in self._tensors()}
        return (
            sum(held.values())
            + sum(trained_bytes(self.config, self.model.parameters()))
            + self.decoder.pass_bytes(tokens, longest)
        )

    def _tensors(self) -> list[torch.Tensor]:
        packed = [
            tensor
            for module in self.model.modules()
            if isinstance(module, QuantizedLinear)
            for tensor in module.packed_tensors().values()
        ]
        # Some of the packed ones are buffers too, which the caller counts once by their addresses.
        return [*self.model.parameters(), *self.model.buffers(), *packed]


def in_training(shape: Shape, method: str, scale: Scale, recompute: bool = False) -> Trained:
    """A random model by a method."""
    config = config_of(method, learning_rate=1e-4)
    model = prepare(random_model(shape, dense_dtype(config, scale), scale.device), config, scale)
    decoder = TrainingDecoder(model, scale.hardware.dtype, member)
    decoder.recompute = len(decoder.mlps) if recompute else 0
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer, _ = make_optimizer(config, named, scale.device)
    return Trained(config, model, decoder, optimizer)


def batch_of(shape: Shape, tokens: int, sample: int, device: torch.device, seed: int = 0) -> Batch:
    """Samples of random tokens, the second half of each trained; about as many tokens as asked for in all."""
    draw = np.random.default_rng(seed)
    vocabulary = shape[1]["vocab_size"]
    samples: list[Sample] = []
    for number in range(max(1, tokens // sample)):
        ids = draw.integers(3, vocabulary, sample).astype(np.int32)
        trained = np.arange(sample) >= sample // 2
        samples.append(Sample(ids, trained, f"row {number}"))
    return collate(samples).to(device)
