"""A model's matrices sharded over the processes of a run, a decoder layer at a time, by torch's FSDP2.

Each process keeps some rows of every matrix, and of its gradient and optimizer states where it is trained in full; what
is quantised is sharded as it is packed. Vectors (norms, biases, scales of quantised weights) and adapters are small:
every process holds them whole. A pass has all rows of a unit only while it computes with it (kernels/units.py), while
those of the next one are on their way.

fully_shard (Zhao et al. 2023, https://arxiv.org/abs/2304.11277; by parameter since torch 2.4) keeps and gathers the
rows. Its hooks on forward and backward are never called, as the kernels call no module: `held` says when. Gradients are
summed here, since there is no autograd that would.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qingtune.kernels import architecture
from qingtune.kernels.architecture import Experts
from qingtune.kernels.linear import QuantizedLinear
from qingtune.kernels.projection import gradient
from qingtune.kernels.units import EMBEDDING
from qingtune.training.part_files import Rows


@dataclass(frozen=True)
class _Trained:
    """A sharded parameter that is trained: the module that has it, its name there, and the rows kept here.

    `part` shares its memory with what FSDP gathers from; optimizers, clipping and checkpoints know nothing but it.
    """

    module: nn.Module
    name: str
    part: nn.Parameter


class ShardedUnits:
    """The units of a model (kernels/units.py), sharded over all processes.

    Args:
        model: whole, in every process the same; sharded here.
        device: of the process.
        trains_weights: whether matrices are trained themselves, which shards them; otherwise what is trained stays.

    Attributes:
        parts: the rows kept here of each sharded parameter that is trained, by its full name.
        rows: which ones these are, likewise.
    """

    def __init__(self, model: Any, device: torch.device, *, trains_weights: bool) -> None:
        self._count, index = dist.get_world_size(), dist.get_rank()
        mesh = init_device_mesh(device.type, (self._count,))
        layers = list(model.model.layers)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight
        self._units: dict[int, list[nn.Module]] = {number: [layer] for number, layer in enumerate(layers)}
        self._units[EMBEDDING] = [embedding, head] if tied else [embedding]
        self._units[len(layers)] = self._units[EMBEDDING] if tied else [head]
        _packed_as_parameters(model)
        left = {p for p in model.parameters() if not _is_matrix(p) or (p.requires_grad and not trains_weights)}
        sharded = {p: name for name, p in model.named_parameters() if p not in left}
        places: dict[nn.Parameter, tuple[nn.Module, str]] = {}
        for module in model.modules():
            places |= {p: (module, name) for name, p in module.named_parameters(recurse=False) if p in sharded}
        lengths = {name: len(p) for p, name in sharded.items()}
        owners = [(sharded[p], *place) for p, place in places.items() if p.requires_grad]
        for number, modules in self._units.items():
            if not (tied and number == len(layers)):
                fully_shard(modules, mesh=mesh, reshard_after_forward=True, ignored_params=left)
        self.parts: dict[str, nn.Parameter] = {}
        self.rows: dict[str, Rows] = {}
        of_modules: dict[nn.Module, list[_Trained]] = {}
        for full, module, name in owners:
            part = nn.Parameter(cast("DTensor", getattr(module, name)).to_local().detach())
            each = -(-lengths[full] // self._count)
            start = min(index * each, lengths[full])
            self.parts[full], self.rows[full] = part, Rows(start, start + len(part), lengths[full])
            of_modules.setdefault(module, []).append(_Trained(module, name, part))
        self._trained = {
            number: [one for part in modules for module in part.modules() for one in of_modules.get(module, ())]
            for number, modules in self._units.items()
        }

    @contextmanager
    def held(self, unit: int, *, then: int | None = None, trains: bool = False) -> Generator[None]:
        """Have a unit's weights in its modules; see kernels/units.py. With `trains`, sum its gradients afterwards."""
        first = cast("FSDPModule", self._units[unit][0])
        first.unshard()
        if then is not None:
            cast("FSDPModule", self._units[then][0]).unshard(async_op=True)
        yield
        if trains:
            self._sum_gradients(self._trained[unit])
        first.reshard()

    def _sum_gradients(self, trained: Sequence[_Trained]) -> None:
        """Add to each part's gradient the sum over processes of its rows', one exchange for each dtype."""
        for dtype in dict.fromkeys(one.part.dtype for one in trained):
            some = [one for one in trained if one.part.dtype == dtype]
            whole = [getattr(one.module, one.name) for one in some]
            # Each process gets as many rows of a parameter as the first one, some of them beyond its end.
            sizes = [-(-len(parameter) // self._count) * parameter[0].numel() for parameter in whole]
            sent = torch.zeros(self._count, sum(sizes), dtype=dtype, device=some[0].part.device)
            for parameter, place in zip(whole, sent.split(sizes, 1), strict=True):
                flat = gradient(parameter).view(-1)
                for piece, row in zip(flat.split(place.shape[1]), place, strict=False):
                    row[: len(piece)].copy_(piece)
                parameter.grad = None
            received = sent.new_empty(sum(sizes))
            dist.reduce_scatter_single(received, sent.view(-1))
            for one, mine in zip(some, received.split(sizes), strict=True):
                gradient(one.part).view(-1).add_(mine[: one.part.numel()])

    def gather(self, *, keep: bool) -> None:
        """Make the model whole again, on the CPU, in the processes that keep it; nothing is computed with it after.

        All processes call this; units travel one at a time.
        """
        whole: dict[nn.Parameter, nn.Parameter] = {}
        for number, modules in self._units.items():
            if modules is self._units[EMBEDDING] and number != EMBEDDING:
                continue
            first = cast("FSDPModule", modules[0])
            first.unshard()
            found: list[tuple[nn.Module, str, nn.Parameter]] = []
            for module in (each for top in modules for each in top.modules()):
                for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                    if keep and parameter not in whole:
                        copy = parameter.detach().to("cpu", copy=True)
                        whole[parameter] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
                    found.append((module, name, parameter))
            first.reshard()
            for module, name, parameter in found if keep else ():
                setattr(module, name, whole[parameter])
            for module in modules if keep else ():
                module.__class__ = type(module).__mro__[2]  # what FSDP's class was made from, as its __new__ finds it


def why_not_sharded(model: Any) -> str | None:
    """The reason why a model that the fast kernels compute cannot be sharded; None if it can."""
    if any(kind.mlp.__class__ is Experts for kind in architecture.describe(model.config).layers):
        return "mixtures of experts are not sharded yet"
    return None


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _is_matrix(parameter: torch.Tensor) -> bool:
    """Whether there are rows to share; convolutions of a delta net are stacks of vectors, [M, 1, w]."""
    return parameter.ndim > 1 and parameter.shape[-2] > 1


def _packed_as_parameters(model: nn.Module) -> None:
    """FSDP shards parameters alone, and packed weights are buffers; the scales that go with them stay such."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            packed = module.packed
            del module.packed
            module.packed = nn.Parameter(packed, requires_grad=False)
