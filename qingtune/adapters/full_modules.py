"""Modules trained and saved in full with the adapters: PEFT's modules_to_save."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from qingtune.adapters.lora import LoRALinear
from qingtune.adapters.names import ends_with, is_within
from qingtune.errors import UserError
from qingtune.kernels.experts.modules import ExpertAdapter
from qingtune.kernels.linear import QuantizedLinear

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def find_modules(model: Any, names: Sequence[str] | None) -> list[str]:
    """The full names of the modules to train in full, none of them within another.

    Args:
        names: last parts (lm_head, norm) or longer ends (layers.0.input_layernorm) of modules' names; None for none.

    Raises:
        UserError: a name matches no module, or one that cannot be trained in full.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    for name in names or ():
        matches = [full for full in modules if full and ends_with(full, name)]
        if not matches:
            existing = sorted({full.rsplit(".", 1)[-1] for full in modules if full})
            near = difflib.get_close_matches(name, existing, n=1)
            fix = f'Did you mean "{near[0]}"?' if near else "For example lm_head, embed_tokens or norm."
            raise UserError(f'"{name}" matches no module of this model', where="modules_to_save", fix=fix)
        found += matches
    for name in found:
        if any(isinstance(part, QuantizedLinear) for part in modules[name].modules()):
            raise UserError(
                f"{name} is quantised, and quantised weights cannot be trained",
                where="modules_to_save",
                fix="Use use_lora instead of use_qlora, or remove it from modules_to_save.",
            )
        if isinstance(modules[name], _CONTAINERS) or not list(modules[name].parameters()):
            raise UserError(f"{name} is not a module with weights", where="modules_to_save")
    once = list(dict.fromkeys(found))
    return [name for name in once if not any(name != other and is_within(name, other) for other in once)]


def train_in_full(model: Any, modules: Sequence[str]) -> list[str]:
    """Let modules be trained, in fp32, as small steps would be lost in 16 bits; returns what the user should know.

    Where one of head and embedding is trained that were one matrix, each gets its own, as in PEFT; modules: full names.
    """
    notices: list[str] = []
    if is_tied(model) and (own := tied_modules(model, modules)):
        untie(model)
        other = "" if len(own) == 2 else ", and the other is unchanged"
        notices.append(
            f"The head and the embedding of this model share one matrix. They are separated now, as in PEFT: "
            f"{' and '.join(own)} is trained{other}. A merged model holds both."
        )
    for name in modules:
        for parameter in model.get_submodule(name).parameters():
            parameter.data = parameter.detach().to(torch.float32, copy=True)
            parameter.requires_grad_(True)
    return notices


def trained_in_full(model: Any) -> dict[str, torch.Tensor]:
    """Parameters trained in addition to the adapters, by full name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), LoRALinear | ExpertAdapter)
    }


def modules_of(parameters: Iterable[str]) -> list[str]:
    """The modules that hold parameters of these names."""
    return sorted({name.rpartition(".")[0] for name in parameters})


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one matrix."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def tied_modules(model: Any, modules: Iterable[str]) -> list[str]:
    """Those of the modules in which the model's head or embedding lies."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in ends]
    return [module for module in modules if any(is_within(name, module) for name in names)]


def untie(model: Any) -> None:
    """Give the head its own matrix, equal to the embedding's."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
