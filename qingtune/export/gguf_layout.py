"""How a model of Transformers' layout lies in a GGUF file: names, order of rows, and the settings llama.cpp reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.tensor_mapping import get_tensor_name_map

from qingtune.errors import UserError
from qingtune.export.gguf_architectures import ARCHITECTURES, Architecture, Value, head_dim_of, window_of
from qingtune.export.gguf_rope import SCALINGS, Rope, RopeNotExpressible, rope_in_gguf, rope_of
from qingtune.models.load import config_of
from qingtune.models.stored_weights import PARTS_OF_EXPERTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Read = Callable[[str], torch.Tensor]  # gives a tensor of the model by its name in the folder, in any float dtype

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+\.weight)")
_EXPERTS = re.compile(rf"(?P<experts>.+\.experts)\.(?P<matrix>{'|'.join(PARTS_OF_EXPERTS)})")
# Multimodal models, of which the text part is exported.
_MULTIMODAL = (
    "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen2_5_vl", "qwen2_vl", "gemma3", "mistral3", "internvl", "llava",
)  # fmt: skip
_VISION = "the vision tower"
_NOT_TEXT = {
    **dict.fromkeys(
        (
            "model.visual.",
            "visual.",
            "model.vision_tower.",
            "vision_tower.",
            "model.multi_modal_projector.",
            "multi_modal_projector.",
        ),
        _VISION,
    ),
    "mtp.": "the layers that predict several tokens (mtp)",
}


@dataclass(frozen=True)
class Order:
    """Another order of rows or columns: those after `first` as blocks of a shape whose first axes change places."""

    shape: tuple[int, int, int]
    axes: tuple[int, int, int]
    first: int = 0

    def index(self) -> torch.Tensor:
        """For each place, which row lies there: int64 [rows]."""
        moved = torch.arange(math.prod(self.shape)).reshape(self.shape).permute(self.axes).reshape(-1)
        return torch.cat([torch.arange(self.first), moved + self.first])


def interleaved(heads: int, rows: int) -> Order:
    """The order for llama.cpp's `llama`, which turns neighbouring rows of a head against each other, not its halves."""
    return Order((heads, 2, rows // heads // 2), (0, 2, 1))


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of the file to be.

    Attributes:
        name: in the GGUF file.
        source: in the model's folder; of stacked ones the first.
        shape: as in the file; GGUF counts dimensions the other way round.
        rows: their order.
        columns: theirs.
        change: of its numbers.
        stacked: all sources, where the file holds several as one.
        part: which of how many equal parts of each source's rows it is.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rows: Order | None = None
    columns: Order | None = None
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    stacked: tuple[str, ...] = ()
    part: tuple[int, int] = (0, 1)

    @property
    def sources(self) -> tuple[str, ...]:
        """What it is made of."""
        return self.stacked or (self.source,)

    def read(self, read: Read) -> torch.Tensor:
        """The tensor as it lies in the file."""
        if not self.stacked:
            return self.arrange(read(self.source))
        whole = [read(source) for source in self.stacked]
        return torch.stack(whole)

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the folder as it lies in the file."""
        number, parts = self.part
        if parts > 1:
            tensor = tensor.chunk(parts, -2)[number]
        if self.change:
            tensor = self.change(tensor.float())
        if self.rows:
            tensor = tensor[self.rows.index()]
        return tensor[:, self.columns.index()] if self.columns else tensor


@dataclass(frozen=True)
class GGUFLayout:
    """A model in GGUF, without its tokenizer.

    Attributes:
        architecture: llama.cpp's name.
        metadata: the settings, in order.
        tensors: those that come from the folder, in order.
        constants: further tensors, fp32.
        embeddings: rows of the embedding, which the vocabulary must fill.
        limits: what the file lacks of the model, in sentences.
    """

    architecture: str
    metadata: dict[str, Value]
    tensors: list[PlacedTensor]
    embeddings: int
    constants: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)


def layout_of(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, untie: bool = False) -> GGUFLayout:
    """How a model lies in GGUF.

    Args:
        folder: of the model.
        shapes: of its stored tensors, by name.
        untie: the head is a separate matrix here, though the model's configuration has it tied.

    Raises:
        UserError: the architecture, or something about this model, cannot be expressed.
    """
    whole: Any = config_of(folder)
    config = _text_config(whole)
    if config.model_type not in ARCHITECTURES or (config is not whole and whole.model_type not in _MULTIMODAL):
        fix = f"{', '.join([*ARCHITECTURES, *_MULTIMODAL])} can."
        raise UserError(f'the architecture "{whole.model_type}" cannot be exported', where=str(folder), fix=fix)
    architecture = ARCHITECTURES[config.model_type]
    scaling = _rope_scaling(config, architecture, folder)
    kind, head_dim, window, rope = architecture.name, head_dim_of(config), window_of(config), rope_of(config)
    settings: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": window or config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        **({"feed_forward_length": config.intermediate_size} if hasattr(config, "intermediate_size") else {}),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        **scaling.settings,
        **architecture.settings(config),
    }
    metadata = {f"{kind}.{name}": value for name, value in settings.items()}
    config.tie_word_embeddings = config.tie_word_embeddings and not untie
    tensors, limits = _place(config, architecture, folder, shapes)
    if window:
        limits.append(f"llama.cpp has no sliding window for {kind}: the file says that it reads {window:,} tokens.")
    embeddings = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    return GGUFLayout(kind, metadata, tensors, embeddings, scaling.constants, limits + scaling.limits)


def _text_config(whole: Any) -> Any:
    """The configuration of the text part, which may be tied though only the whole says so."""
    config = whole.get_text_config(decoder=True)
    config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", False)
    return config


def _rope_scaling(config: Any, architecture: Architecture, folder: Path) -> Rope:
    """The scaling of positions; a UserError for what llama.cpp would pass over, there or elsewhere."""
    what = f"llama.cpp's {architecture.name} cannot represent this model"
    if problem := _inexpressible(config, architecture):
        raise UserError(f"{what}: {problem}", where=str(folder))
    try:
        return rope_in_gguf(config, architecture)
    except RopeNotExpressible as reason:
        raise UserError(f"{what}: {reason}", where=str(folder / "config.json"), fix=SCALINGS) from None


def _inexpressible(config: Any, architecture: Architecture) -> str | None:
    """What llama.cpp would pass over, computing something else."""
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != architecture.activation:
        return f"hidden_act is {activation}"
    if problem := architecture.problem(config):
        return problem
    if not architecture.partial_rotary and rope_of(config).get("partial_rotary_factor", 1.0) != 1.0:
        return "RoPE covers only a part of each head (partial_rotary_factor)"
    return None


# --- Tensors ---------------------------------------------------------------------------------------------------------


def _place(
    config: Any, architecture: Architecture, folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[PlacedTensor], list[str]]:
    """Every stored tensor at its place, and what is left out; a UserError if one has no place, or one is missing."""
    kind, tied = architecture.name, bool(config.tie_word_embeddings)
    if not tied and "lm_head.weight" not in shapes:
        raise UserError("the head (lm_head.weight) is missing", where=str(folder), fix="Download the model again.")
    names = get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    layers = range(config.num_hidden_layers)
    wanted = [f"blk.{layer}.{part}" for layer in layers for part in architecture.weights_of_layer(config, layer)]
    wanted = ["token_embd.weight", "output_norm.weight", *wanted]
    known = {*wanted, "output.weight", *(f"blk.{layer}.{bias}" for layer in layers for bias in architecture.biases)}
    placed: dict[str, PlacedTensor] = {}
    left_out: set[str] = set()
    for found in _of_file(shapes):
        source = found.source
        if source == "lm_head.weight" and tied:
            continue  # llama.cpp takes the embedding where there is no head
        if source.endswith("rotary_emb.inv_freq"):
            continue  # old folders hold this; it follows from the settings
        if part := next(filter(source.startswith, _NOT_TEXT), None):
            left_out.add(_NOT_TEXT[part])
            continue
        name = names.get_name(found.name.replace(".dt_bias", ".dt_proj.bias"), (".weight", ".bias")) or ""
        # gguf's map also has the names of other libraries, which may arrange tensors in another way.
        if not source.startswith(("model.", "lm_head.")) or name not in known or name in placed:
            raise UserError(f"{source} has no place in llama.cpp's {kind}", where=str(folder))
        placed[name] = _arranged(replace(found, name=name), config, architecture)
    if missing := [name for name in wanted if name not in placed]:
        raise UserError(
            f"{len(missing)} weights are missing, for example {missing[0]}", where=str(folder), fix="Download it again."
        )
    limits = [f"The file does not hold {part}." for part in sorted(left_out)]
    return sorted(placed.values(), key=lambda tensor: _order(tensor.name)), limits


def _of_file(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[PlacedTensor]:
    """What a file holds as one tensor, by the names that gguf's map takes.

    A file has the matrices of a layer's experts together, gates and ups apart; a model, one by one or gates and ups
    together. A UserError if experts are missing, or differ in shape.
    """
    found: dict[str, dict[int, str]] = {}
    for source, shape in shapes.items():
        if matrix := _EXPERTS.fullmatch(source):
            parts = PARTS_OF_EXPERTS[matrix["matrix"]]
            count, rows, columns = shape
            for number, part in enumerate(parts):
                name, size = f"{matrix['experts']}.{part}.weight", (count, rows // len(parts), columns)
                yield PlacedTensor(name, source, size, part=(number, len(parts)))
        elif expert := _EXPERT.fullmatch(source):
            found.setdefault(f"{expert['experts']}.{expert['part']}", {})[int(expert["number"])] = source
        else:
            yield PlacedTensor(source, source, shape)
    for name, sources in found.items():
        if sorted(sources) != list(range(len(sources))) or len({shapes[source] for source in sources.values()}) != 1:
            raise UserError(f"some experts of {name} are missing, or differ in shape", fix="Download the model again.")
        stacked = tuple(sources[number] for number in range(len(sources)))
        yield PlacedTensor(name, stacked[0], (len(stacked), *shapes[stacked[0]]), stacked=stacked)


def _arranged(tensor: PlacedTensor, config: Any, architecture: Architecture) -> PlacedTensor:
    """A tensor with the order of its rows and columns, and the change of its numbers."""
    part, shape = tensor.name.rpartition(".")[0].rpartition(".")[2], tensor.shape
    rows = columns = change = None
    if architecture.interleaved and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        rows = interleaved(heads, shape[0])
    if architecture.offset_norms and tensor.name.endswith("norm.weight") and part != "ssm_norm":
        change = _plus_one
    if "linear_attn" in tensor.source:
        rows, columns = _orders_of_linear_attention(tensor, config)
        if tensor.name.endswith("ssm_a"):
            change = _negative_exp
        if part == "ssm_conv1d":
            shape, change = (shape[0], shape[-1]), _without_middle
    if part == "ffn_gate_inp_shexp":
        shape, change = shape[1:], _only_row
    return replace(tensor, shape=shape, rows=rows, columns=columns, change=change)


def _plus_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


def _negative_exp(tensor: torch.Tensor) -> torch.Tensor:
    return -tensor.exp()


def _without_middle(tensor: torch.Tensor) -> torch.Tensor:
    """A convolution of each channel alone, [channels, 1, width], as [channels, width]."""
    return tensor.squeeze(1)


def _only_row(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix of one row as a vector."""
    return tensor[0]


def _orders_of_linear_attention(tensor: PlacedTensor, config: Any) -> tuple[Order | None, Order | None]:
    """The order of rows and columns for llama.cpp, which repeats all key heads in turn, where Transformers repeats each
    key head for its value heads; the rows of queries and keys, where they come first, stay."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if keys == values:
        return None, None
    both = 2 * keys * config.linear_key_head_dim
    size, first = {
        "attn_qkv.weight": (config.linear_value_head_dim, both),
        "ssm_conv1d.weight": (config.linear_value_head_dim, both),
        "attn_gate.weight": (config.linear_value_head_dim, 0),
        "ssm_out.weight": (config.linear_value_head_dim, 0),
    }.get(tensor.name.split(".", 2)[2], (1, 0))
    order = Order((keys, values // keys, size), (1, 0, 2), first)
    if tensor.name.endswith("ssm_norm.weight"):
        return None, None
    return (None, order) if tensor.name.endswith("ssm_out.weight") else (order, None)


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, head, layers by number, as llama.cpp's own files have them."""
    parts = name.split(".")
    return (1, int(parts[1]), name) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0, name)
