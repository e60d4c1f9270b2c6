"""A model as a run would hold it, built by the run's own code on PyTorch's meta device, and what is counted on that.

The architecture is Transformers', from config.json or the header of a .gguf file; adapters, quantised layers and the
choice of kernels are those of training. No weight is read and none is allocated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qingtune.adapters.expert_lora import expert_adapters
from qingtune.adapters.lora import lora_layers, member, why_general
from qingtune.adapters.of_settings import adapt, weights_dtype
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.kernels.buffers import Arithmetic, ModelSizes
from qingtune.kernels.decoder import TrainingDecoder
from qingtune.kernels.end_to_end import changes_logits, why_samples_would_mix
from qingtune.kernels.footprint import GeneralSizes
from qingtune.kernels.linear import QuantizedLinear
from qingtune.machine.resources import Machine
from qingtune.models.config_file import CONFIG, check_config, read_model_config
from qingtune.models.gguf_header import config_of_gguf
from qingtune.models.layers import BALANCE, JOINED, expert_modules, wants_balance
from qingtune.models.load import check_architecture, make_config, model_on_meta
from qingtune.models.multimodal import FAMILIES
from qingtune.models.quantize import quantize_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ONLY_TEXT = "Only the language part of this model is loaded and counted."
# Settings that change neither modules nor dtypes; plans that differ in nothing else share what was built.
_OF_DATA = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "samples_per_step",
    "max_seq_length", "gradient_checkpointing", "optim",
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """What a run holds before its first pass, in bytes unless named otherwise.

    Attributes:
        weights: dense weights; in full training the trained ones, otherwise the frozen ones.
        weight_itemsize: bytes a number of the dense frozen weights.
        quantized: packed weights with their scales.
        adapters: what is trained on frozen weights.
        taken: copies of the adapters' start, kept in main memory where it was taken out of the weights.
        gradients: one for each trained number.
        trainable: trained numbers; likewise low_rank, those of the adapters' alone.
        adapter_width: sum of the ranks of a layer's adapters, as a mean over the layers.
        kernels: sizes and arithmetic of the fast kernels, without recomputation; None if the model's own modules
            compute.
        one_by_one: whether these get the samples of a pass one by one.
        plain_head: whether they need not hold all logits of a sample at once.
        short_context: of the fast kernels' architecture.
    """

    weights: int
    weight_itemsize: int
    quantized: int
    adapters: int
    taken: int
    gradients: int
    trainable: int
    low_rank: int
    adapter_width: int
    kernels: tuple[ModelSizes, Arithmetic] | None
    one_by_one: bool
    plain_head: bool
    short_context: int | None = None


class Blueprint:
    """A model that is planned with.

    Args:
        config: as Transformers holds it.
        where: its file, for messages.

    Attributes:
        model_type: Transformers' name of the architecture.
        parameters: of the whole model, a matrix that is head and embedding counted once.
        layers: of the decoder.
        hidden: size of a token between layers.
        vocabulary: rows of the embedding.
        largest_read: numbers of the largest tensor that is read whole, which head, embedding and experts are.
        active_body: weights that a token is multiplied by, embedding and head not counted.
        attention_width: all query heads together.
        attention_layers: layers in which a token attends to those before it.
        context: tokens that it knows positions for; None if it does not say.
        experts: numbers in parameters that hold several experts each.
        reaches_experts: whether adapters and quantisation reach these.
        stored_itemsize: bytes a number on disk.
        by_tensor: whether the weights are loaded one tensor at a time, as the text of a multimodal checkpoint is.
        renamed: whether Transformers renames tensors while it loads them by more than a prefix, or joins others than
            experts.
        notices: what the user should know of the counting.

    Raises:
        UserError: Transformers cannot make the model.
    """

    def __init__(
        self, config: PretrainedConfig, where: Path, notices: tuple[str, ...] = (), *, by_tensor: bool = False
    ) -> None:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        self._config, self._where, self.notices, self.by_tensor = config, where, notices, by_tensor
        self._built: dict[tuple[Any, ...], Built] = {}
        model = self._model(None)
        text: Any = model.config.get_text_config(decoder=True)
        self.model_type = str(config.model_type)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.layers, self.hidden, self.vocabulary = (
            _size(text, name, where) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
        )
        kinds: list[str] = getattr(text, "layer_types", None) or ["full_attention"] * self.layers
        self.attention_layers = sum(kind != "linear_attention" for kind in kinds)
        self.context = _largest(text, "max_position_embeddings")
        self.heads = _largest(text, "num_attention_heads") or 1
        head_size = _largest(text, "head_dim") or self.hidden // self.heads
        self.attention_width = self.heads * head_size
        self._keys = (_largest(text, "num_key_value_heads") or self.heads) * head_size
        stored: Any = config.dtype or text.dtype or torch.float32
        self._stored: torch.dtype = stored
        self.stored_itemsize = self._stored.itemsize
        kind = cast("Any", model.config).model_type
        stacks = [weight for experts in expert_modules(model).values() for weight in experts.parameters()]
        self.largest_read = max(tensor.numel() for tensor in [*_ends(model), *stacks])
        self.reaches_experts = bool(stacks)
        self.experts, self.active_body = _body(model, _largest(text, "num_experts_per_tok") or 1)
        changes: list[Any] = get_checkpoint_conversion_mapping(kind) or []
        plain = by_tensor or kind in JOINED or all(isinstance(change, PrefixChange) for change in changes)
        self.renamed = not plain
        if type(model.config) is not type(config):
            self.notices += (ONLY_TEXT,)
        if wants_balance(config):
            self.notices += (BALANCE,)

    def _model(self, dtype: torch.dtype | None) -> PreTrainedModel:
        return model_on_meta(copy.deepcopy(self._config), dtype, self._where)  # models change their configuration

    @cached_property
    def _as_stored(self) -> PreTrainedModel:
        return self._model(self._stored)

    def built(self, config: TrainConfig, machine: Machine) -> Built:
        """What a run of these settings would hold there.

        Raises:
            UserError: a setting names what the model does not have, or what cannot be trained.
        """
        dtype = torch.bfloat16 if machine.itemsize == 2 else torch.float32
        weights = weights_dtype(config, machine.kind, dtype, self._stored, lambda: self._as_stored)
        key = (config.model_dump_json(exclude=_OF_DATA), machine.kind, dtype, machine.int8_units, weights)
        if key not in self._built:
            self._built[key] = self._build(config, machine, dtype, weights)
        return self._built[key]

    def _build(self, config: TrainConfig, machine: Machine, dtype: torch.dtype, weights: torch.dtype) -> Built:
        model, full = self._model(weights), config.method == "full"
        if config.method == "qlora":
            quantize_model(model, config.quantization_bit, torch.device("meta"))
        if not full:
            alpha = config.lora_alpha or 1.0  # a factor, which takes no memory
            adapt(config.model_copy(update={"lora_alpha": alpha}), model, dtype)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        packed = [
            buffer for layer in model.modules() if isinstance(layer, QuantizedLinear) for buffer in layer.buffers()
        ]
        taken = [matrix for adapter in lora_layers(model).values() for matrix in adapter.taken or ()]
        adapters = [*lora_layers(model).values(), *expert_adapters(model).values()]
        width = sum(adapter.r for adapter in adapters) // self.layers
        kernels = short_context = None
        if why_general(model, machine.kind) is None:
            dropout = 0.0 if full else config.lora_dropout
            decoder = TrainingDecoder(model, dtype, member, dropout=dropout, int8_units=machine.int8_units)
            kernels = decoder.sizes, replace(decoder.arithmetic, on_cpu=machine.kind == "cpu")
            short_context = decoder.this.short_context
        plain_head = not changes_logits(model.config)
        return Built(
            weights=_bytes(trained if full else frozen),
            weight_itemsize=weights.itemsize,
            quantized=_bytes(packed),
            adapters=0 if full else _bytes(trained),
            taken=_bytes(taken) if machine.kind == "cpu" else 0,
            gradients=_bytes(trained),
            trainable=sum(parameter.numel() for parameter in trained),
            low_rank=sum(p.numel() for adapter in adapters for p in adapter.parameters() if p.requires_grad),
            adapter_width=width,
            kernels=kernels,
            one_by_one=not plain_head or why_samples_would_mix(model.config) is not None,
            plain_head=plain_head,
            short_context=short_context,
        )

    @property
    def general_sizes(self) -> GeneralSizes:
        """The layers' mean sizes; all that a token is multiplied by beyond its attention counts as a gated MLP."""
        attention = 2 * self.hidden * (self.attention_width + self._keys)
        inner = (self.active_body // self.layers - attention) // (3 * self.hidden)
        return GeneralSizes(self.layers, self.hidden, max(0, inner), queries=self.attention_width, keys=self._keys)


def read_blueprint(path: Path) -> Blueprint:
    """The blueprint of a model folder, of which config.json is enough, or of a .gguf file by its header.

    Raises:
        UserError: there is no such header, it is broken, or Transformers does not know the architecture.
    """
    where = path if path.is_file() else path / CONFIG
    return make_blueprint(config_of_gguf(path) if path.is_file() else read_model_config(path), where)


def make_blueprint(content: dict[str, Any], where: Path) -> Blueprint:
    """The blueprint of a model by what its config.json holds.

    Args:
        where: the file, for messages.

    Raises:
        UserError: as read_blueprint.
    """
    check_config(content, str(where))
    check_architecture(content, str(where))
    stored: Any = content.get("quantization_config")
    method = cast("dict[str, Any]", stored).get("quant_method") if isinstance(stored, dict) else None
    quantised = f"Its weights are stored quantised by {method}, which training refuses; this plans its 16-bit version."
    notices = () if method in (None, "bitsandbytes") else (quantised,)
    only_text = content["model_type"] in FAMILIES
    notices += (ONLY_TEXT,) * only_text
    return Blueprint(make_config(content, where), where, notices, by_tensor=only_text)


def _size(text: Any, name: str, where: Path) -> int:
    """A size that every plan needs; a UserError where the architecture has none."""
    value = _largest(text, name)
    if value is None:
        raise UserError(
            f'"{text.model_type}" models have no "{name}", without which they cannot be planned', where=str(where)
        )
    return value


def _largest(text: Any, name: str) -> int | None:
    """A size by the configuration, the largest where layers differ; None where it does not say."""
    layers: list[Any] = list(text.per_layer_config) if text.is_heterogeneous else [text]
    values = [value for layer in layers for value in _as_list(getattr(layer, name, None))]
    return max((value for value in values if value is not None), default=None)


def _as_list(value: Any) -> list[int | None]:
    return cast("list[int | None]", value) if isinstance(value, list) else [value]


def _ends(model: PreTrainedModel) -> list[torch.Tensor]:
    """The matrices of embedding and head."""
    return [cast("Any", end).weight for end in (model.get_input_embeddings(), model.get_output_embeddings())]


def _body(model: PreTrainedModel, experts_per_token: int) -> tuple[int, int]:
    """Numbers of experts, and weights of the decoder that a token is multiplied by."""
    outside = {id(end) for end in _ends(model)}
    matrices = {
        name: parameter
        for name, parameter in cast("Any", model.get_decoder()).named_parameters()
        if parameter.ndim > 1 and id(parameter) not in outside
    }
    experts = {name: matrix for name, matrix in matrices.items() if ".experts." in name}
    numbers = sum(matrix.numel() for matrix in experts.values())
    active = sum(matrix.numel() * experts_per_token // len(matrix) for matrix in experts.values())
    return numbers, sum(matrix.numel() for matrix in matrices.values()) - numbers + active


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
