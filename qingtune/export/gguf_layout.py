"""How a model of Transformers' layout lies in a GGUF file: names, order of rows, and the settings llama.cpp reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.tensor_mapping import get_tensor_name_map

from qingtune.errors import UserError
from qingtune.export.gguf_architectures import ARCHITECTURES, Architecture, Value, head_dim_of, window_of
from qingtune.models.config_file import read_model_config
from qingtune.models.load import config_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

Read = Callable[[str], torch.Tensor]  # gives a tensor of the model by its name in the folder, in any float dtype

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+\.weight)")
_TEXT_OF = {"qwen3_5": "qwen3_5_text"}  # models that see, of which the part that reads and writes is exported
_NOT_TEXT = {"model.visual.": "the vision tower", "mtp.": "the layers that predict several tokens (mtp)"}


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
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rows: Order | None = None
    columns: Order | None = None
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    stacked: tuple[str, ...] = ()

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
    of_whole = read_model_config(folder)["model_type"]
    of_text = _TEXT_OF.get(of_whole, of_whole)
    if of_text not in ARCHITECTURES:
        fix = f"{', '.join([*ARCHITECTURES, *_TEXT_OF])} can."
        raise UserError(f'the architecture "{of_whole}" cannot be exported', where=str(folder), fix=fix)
    architecture, config = ARCHITECTURES[of_text], _config(folder)
    if problem := _inexpressible(config, architecture):
        raise UserError(f"llama.cpp's {architecture.name} cannot represent this model: {problem}", where=str(folder))
    kind, head_dim, window = architecture.name, head_dim_of(config), window_of(config)
    rope = _rope_of(config)
    settings: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": window or config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        **architecture.settings(config),
    }
    metadata = {f"{kind}.{name}": value for name, value in settings.items()}
    constants: dict[str, NDArray[np.float32]] = {}
    _add_rope_scaling(config, kind, folder, metadata, constants)
    config.tie_word_embeddings = config.tie_word_embeddings and not untie
    tensors, limits = _place(config, architecture, folder, shapes)
    if window:
        limits.append(f"llama.cpp has no sliding window for {kind}: the file says that it reads {window:,} tokens.")
    embeddings = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    return GGUFLayout(kind, metadata, tensors, embeddings, constants, limits)


def _config(folder: Path) -> Any:
    """The configuration of the part that reads and writes, which may be tied though only the whole says so."""
    whole: Any = config_of(folder)
    config = whole.get_text_config(decoder=True)
    config.tie_word_embeddings = whole.tie_word_embeddings
    return config


def _rope_of(config: Any) -> Mapping[str, Any]:
    """How positions turn heads: where that differs by layers, in those with full attention."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _inexpressible(config: Any, architecture: Architecture) -> str | None:
    """What llama.cpp would pass over, computing something else."""
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != architecture.activation:
        return f"hidden_act is {activation}"
    if problem := architecture.problem(config):
        return problem
    if architecture.name not in ("phi3", "qwen35") and _rope_of(config).get("partial_rotary_factor", 1.0) != 1.0:
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
    for source, (sources, shape) in _stacked(shapes).items():
        if source == "lm_head.weight" and tied:
            continue  # llama.cpp takes the embedding where there is no head
        if source.endswith("rotary_emb.inv_freq"):
            continue  # old folders hold this; it follows from the settings
        if kind == "qwen35" and (part := next(filter(source.startswith, _NOT_TEXT), None)):
            left_out.add(_NOT_TEXT[part])
            continue
        plain = source.replace("model.language_model.", "model.", 1) if kind == "qwen35" else source
        name = names.get_name(plain.replace(".dt_bias", ".dt_proj.bias"), (".weight", ".bias")) or ""
        # gguf's map also has the names of other libraries, which may arrange tensors in another way.
        if not source.startswith(("model.", "lm_head.")) or name not in known or name in placed:
            raise UserError(f"{source} has no place in llama.cpp's {kind}", where=str(folder))
        placed[name] = _arranged(PlacedTensor(name, sources[0], shape), config, architecture, sources)
    if missing := [name for name in wanted if name not in placed]:
        raise UserError(
            f"{len(missing)} weights are missing, for example {missing[0]}", where=str(folder), fix="Download it again."
        )
    limits = [f"The file does not hold {part}." for part in sorted(left_out)]
    return sorted(placed.values(), key=lambda tensor: _order(tensor.name)), limits


def _stacked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Sources and shape of each tensor, those of a layer's experts together; a UserError if these differ in shape."""
    found: dict[str, dict[int, str]] = {}
    for source in shapes:
        expert = _EXPERT.fullmatch(source)
        name = f"{expert['experts']}.{expert['part']}" if expert else source
        found.setdefault(name, {})[int(expert["number"]) if expert else 0] = source
    stacked: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for name, sources in found.items():
        first = next(iter(sources.values()))
        if name == first:
            stacked[name] = (name,), shapes[name]
            continue
        if sorted(sources) != list(range(len(sources))) or len({shapes[source] for source in sources.values()}) != 1:
            raise UserError(f"some experts of {name} are missing, or differ in shape", fix="Download the model again.")
        stacked[name] = tuple(sources[n] for n in range(len(sources))), (len(sources), *shapes[first])
    return stacked


def _arranged(tensor: PlacedTensor, config: Any, architecture: Architecture, sources: tuple[str, ...]) -> PlacedTensor:
    """A tensor with the order of its rows and columns, and the change of its numbers."""
    part, shape = tensor.name.rpartition(".")[0].rpartition(".")[2], tensor.shape
    rows = columns = change = None
    if architecture.interleaved and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        rows = interleaved(heads, shape[0])
    if architecture.offset_norms and tensor.name.endswith("norm.weight") and part != "ssm_norm":
        change = _plus_one
    if architecture.name == "qwen35" and "linear_attn" in tensor.source:
        rows, columns = _orders_of_linear_attention(tensor, config)
        if tensor.name.endswith("ssm_a"):
            change = _negative_exp
        if part == "ssm_conv1d":
            shape, change = (shape[0], shape[-1]), _without_middle
    stacked = sources if len(shape) == 3 else ()
    return PlacedTensor(tensor.name, tensor.source, shape, rows, columns, change, stacked)


def _plus_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


def _negative_exp(tensor: torch.Tensor) -> torch.Tensor:
    return -tensor.exp()


def _without_middle(tensor: torch.Tensor) -> torch.Tensor:
    """A convolution of each channel alone, [channels, 1, width], as [channels, width]."""
    return tensor.squeeze(1)


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


# --- Rotary positions ------------------------------------------------------------------------------------------------


def _add_rope_scaling(
    config: Any, kind: str, folder: Path, metadata: dict[str, Value], constants: dict[str, NDArray[np.float32]]
) -> None:
    """Add what stretches the positions beyond those of pretraining; a UserError if llama.cpp cannot here."""
    rope = _rope_of(config)
    scaling = rope.get("rope_type", "default")
    unlike = _unlike_llama_cpp(rope) if scaling == "yarn" else []
    if scaling in ("linear", "yarn") and not unlike:
        metadata |= {f"{kind}.rope.scaling.type": scaling, f"{kind}.rope.scaling.factor": float(rope["factor"])}
        if scaling == "yarn":
            original = int(rope["original_max_position_embeddings"])
            metadata[f"{kind}.rope.scaling.original_context_length"] = original
    elif scaling == "llama3" and kind == "llama":
        constants["rope_freqs.weight"] = _llama3_factors(config)
    elif scaling != "default":
        detail = f" with {', '.join(unlike)}" if unlike else ""
        raise UserError(
            f"llama.cpp's {kind} cannot represent this model: its rope_type {scaling}{detail}",
            where=str(folder / "config.json"),
            fix="default, linear, yarn and, for llama, llama3 can be exported.",
        )


def _unlike_llama_cpp(rope: Mapping[str, Any]) -> Sequence[str]:
    """Settings of YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071) that are not llama.cpp's fixed ones."""
    factor = float(rope["factor"])
    usual = {
        "attention_factor": 0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
        "mscale": None,
        "mscale_all_dim": None,
    }
    return [
        f"{name} {rope[name]}"
        for name, value in usual.items()
        if rope.get(name) is not None and (value is None or not math.isclose(rope[name], value, rel_tol=1e-6))
    ]


def _llama3_factors(config: Any) -> NDArray[np.float32]:
    """By what llama.cpp divides each of a head's frequencies, fp32 [head_dim / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = head_dim_of(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled.double()).float().numpy()
