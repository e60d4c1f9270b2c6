"""A decoder as its description has it (architecture.py), two blocks a layer, forward and backward written out.

The modules of the model only hold the weights; nothing of theirs is called but the rotary table. What the blocks
(blocks.py) keep, 28 KB a token and layer at 0.5B parameters, lies in buffers that every pass uses again.
The head sees only rows that predict a trained token, and in the last layer only those rows are computed beyond keys
and values.

Shapes: T tokens of the layout, N trained ones, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qingtune.data.batch import Batch
from qingtune.kernels import architecture, flash_attention
from qingtune.kernels.architecture import ALL, Attention, DeltaNet, Experts, Layer
from qingtune.kernels.attention_block import AttentionBlock
from qingtune.kernels.blocks import Mixer, Parts, Pass, RotaryTable, TokenBlock
from qingtune.kernels.buffers import Arithmetic, ModelSizes, buffer_bytes
from qingtune.kernels.delta.block import DeltaNetBlock
from qingtune.kernels.dropout import new_seed
from qingtune.kernels.elementwise import Norm
from qingtune.kernels.experts.block import ExpertsBlock
from qingtune.kernels.footprint import PassTokens
from qingtune.kernels.layout import Layout, fill_up, lay_out
from qingtune.kernels.linear import Int8Linear, QuantizedLinear
from qingtune.kernels.loss import head_loss_and_gradients
from qingtune.kernels.mlp_block import MLPBlock
from qingtune.kernels.native import int8_products
from qingtune.kernels.native.attention import in_c
from qingtune.kernels.native.low_rank import native_low_rank
from qingtune.kernels.native.products import reads_as_stored
from qingtune.kernels.projection import Member, Projection, gradient
from qingtune.kernels.units import EMBEDDING, Units, Whole
from qingtune.kernels.workspace import Workspace


def why_not(model: Any) -> str | None:
    """The reason why a model cannot be computed here; None if it can."""
    if reason := architecture.why_not(model.config):
        return reason
    return "the head has a bias" if model.get_output_embeddings().bias is not None else None


class TrainingDecoder:
    """A model's summed loss and its gradient, a micro-batch at a time.

    Args:
        model: one for which `why_not` gives None.
        dtype: in which activations are held and products computed; the weights may be wider.
        member: a linear layer of the model -> what a projection needs of it, its adapter included.
        dropout: of the adapters' inputs.
        int8_units: whether int8 weights are multiplied as such.
        recompute: of how many layers, counted from the first, nothing but the input is kept.
        most_tokens: in a pass, as far as known; buffers are made for that many at once.
        units: whose weights are there. What is held here of the model are modules, and vectors that are never sharded.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        member: Callable[[nn.Module], Member],
        *,
        dropout: float = 0.0,
        int8_units: bool = False,
        recompute: int = 0,
        most_tokens: int = 0,
        units: Units | None = None,
    ) -> None:
        self.units = units or Whole()
        self.dtype, self.dropout, self.int8_units = dtype, dropout, int8_units
        self.recompute, self.most_tokens = recompute, most_tokens
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self.workspace = workspace = Workspace(self.embedding.device)

        self.members: list[Member] = []

        def projections(*groups: Sequence[nn.Module]) -> list[Projection]:
            members = [[member(layer) for layer in group] for group in groups]
            self.members += [each for group in members for each in group]
            return [Projection(group, dropout, workspace, int8_units=int8_units) for group in members]

        self.this = this = architecture.describe(model.config)
        parts = Parts(dtype, workspace, self._norm, projections, int8_units)
        layers = list(zip(model.model.layers, this.layers, strict=True))
        device, count = self.embedding.device, len(layers)
        self.mixers: list[Mixer] = []
        self.mlps: list[TokenBlock] = []
        for number, (layer, kind) in enumerate(layers):
            norms = self._norms(layer, kind)
            if isinstance(kind.mixer, DeltaNet):
                self.mixers.append(DeltaNetBlock(layer, number, kind.mixer, parts))
            else:
                flash = (
                    number < count - 1
                    and kind.mixer.cap is None
                    and flash_attention.fits(device, dtype, kind.mixer.size)
                )
                self.mixers.append(
                    AttentionBlock(layer, number, kind.mixer, parts, norm=norms[0], out_norm=norms[1], flash=flash)
                )
            if isinstance(kind.mlp, Experts):
                self.mlps.append(ExpertsBlock(layer, number, kind.mlp, parts, norm=norms[2]))
            else:
                self.mlps.append(MLPBlock(layer, number, kind.mlp, parts, norm=norms[2], out_norm=norms[3]))
        self.norm = self._norm(model.model.norm)
        self.rotary = model.model.rotary_emb
        # Transformers rounds it to the embedding's dtype.
        self.embedding_scale = float(torch.tensor(this.embedding_scale).to(self.embedding.dtype))
        trains = [any(p.requires_grad for p in layer.parameters()) for layer, _ in layers]
        self.lowest_trained = trains.index(True) if any(trains) else count

    @property
    def embedding(self) -> torch.Tensor:
        """Its weight, [V, D]."""
        return self._embedding.weight

    @property
    def head(self) -> torch.Tensor:
        """Its weight, [V, D]."""
        return self._head.weight

    def _norm(self, module: Any) -> Norm:
        return Norm(module.weight, self.this.epsilon, self.workspace, self.this.norm_offset)

    def _norms(self, layer: Any, kind: Layer) -> tuple[Norm, Norm | None, Norm, Norm | None]:
        """Before and after a layer's mixer, before and after its MLP."""
        first, second = self._norm(layer.input_layernorm), self._norm(layer.post_attention_layernorm)
        if not kind.normed_outputs:
            return first, None, second, None
        return first, second, self._norm(layer.pre_feedforward_layernorm), self._norm(layer.post_feedforward_layernorm)

    @cached_property
    def sizes(self) -> ModelSizes:
        """What its memory depends on."""
        blocks = zip(self.mixers, self.mlps, strict=True)
        layers = tuple((mixer.sizes, mlp.sizes) for mixer, mlp in blocks)
        return ModelSizes(layers, self.embedding.shape[1], self.head.shape[0], capped=self.this.logit_cap is not None)

    @property
    def arithmetic(self) -> Arithmetic:
        """What the sizes of its buffers depend on in addition to `sizes`."""
        members = self.members
        quantized = any(isinstance(m.base, QuantizedLinear) for m in members)
        in_int8 = self.int8_units and any(isinstance(m.base, Int8Linear) for m in members)
        return Arithmetic(
            itemsize=self.dtype.itemsize,
            weight_itemsize=None if quantized else self.embedding.dtype.itemsize,
            head_itemsize=self.head.dtype.itemsize,
            trains_weights=not quantized and any(m.base.weight.requires_grad for m in members),
            trains_head=self.head.requires_grad,
            reads_stored=reads_as_stored(self.dtype, self.embedding.device),
            low_rank_in_c=native_low_rank(self.dtype, self.embedding.device) is not None,
            attention_in_c=in_c(self.dtype, self.embedding.device),
            int8_units=in_int8,
            int8_room=int8_products.room_bytes if in_int8 and int8_products.in_c() else None,
            dora=any(m.magnitude is not None for m in members),
            dropout=self.dropout > 0,
            recompute=self.recompute,
            gradient_below=self.embedding.requires_grad or self.mixers[0].norm.weight.requires_grad,
            on_cpu=self.embedding.device.type == "cpu",
        )

    def pass_bytes(self, tokens: int, longest: int, recompute: int | None = None, evaluated: int = 0) -> int:
        """Bytes of all buffers of a training pass, at most: as if each of its tokens were trained.

        Args:
            tokens: of the pass.
            longest: tokens of its longest sample.
            recompute: layers of which nothing but the input is kept; None for as many as there are now.
            evaluated: tokens of a pass without gradients, the buffers of which are kept as well; 0 without evaluation.
        """
        how = self.arithmetic if recompute is None else replace(self.arithmetic, recompute=recompute)
        work, evaluation = (PassTokens(n, n, min(longest, n)) for n in (tokens, evaluated))
        return sum(buffer_bytes(self.sizes, how, work, evaluation if evaluated else None))

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """The sum of the trained tokens' losses, fp32 scalar; no dropout, nothing kept."""
        return self._forward(batch, None, None)

    @torch.no_grad()
    def add_gradients(self, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """Add scale times the gradient of the summed loss to the trained parameters'; returns the summed loss.

        Dropout follows PyTorch's global generator.
        """
        if not len(batch.targets):
            return torch.zeros((), device=self.embedding.device)
        return self._forward(batch, new_seed() if self.dropout else None, scale)

    def _forward(self, batch: Batch, seed: int | None, scale: torch.Tensor | None) -> torch.Tensor:
        """The loss, and with a scale its gradient."""
        layout = self._lay_out(batch, share_prefix=seed is None)
        self.workspace.headroom = max(1.0, self.most_tokens / len(layout.token_ids))
        keep = scale is not None
        x = self._input(0, len(layout.token_ids), keep=keep)
        with self.units.held(EMBEDDING, then=0):
            x.copy_(F.embedding(layout.token_ids, self.embedding))
        if self.embedding_scale != 1:
            x.mul_(self.embedding_scale)
        now = Pass(layout, self._rotary_tables(x, layout), seed)
        for number in range(len(self.mlps)):
            slot, rows, middle = self._layer(number, x, now, keep=keep)
            out = self._input(number + 1, len(middle), keep=keep)
            with self.units.held(number, then=number + 1):
                self.mixers[number].forward(x, now, middle, slot, rows)
                self.mlps[number].forward(middle, now, out, slot)
            x = out
        grad = None if scale is None else self.workspace.take("grad_hidden", x.shape, self.dtype)
        trains_head = keep and self.head.requires_grad
        below = len(self.mlps) - 1 if keep else None
        with self.units.held(len(self.mlps), then=below, trains=trains_head):
            loss = head_loss_and_gradients(
                self.norm.forward(x),
                self.head,
                layout.targets,
                self.workspace,
                scale=scale,
                cap=self.this.logit_cap,
                grad_hidden=grad,
                grad_weight=gradient(self.head) if trains_head else None,
            )
        if grad is not None:
            self._backward(grad, x, now)
        return loss

    def _backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass) -> None:
        """From the gradient of the normed final rows to those of all trained parameters; x: those rows, [N, D]."""
        grad.copy_(self.norm.backward(grad, x))
        trains_embedding = self.embedding.requires_grad
        lowest = 0 if trains_embedding else self.lowest_trained
        for number in range(len(self.mlps) - 1, lowest - 1, -1):
            x = self._input(number, len(now.layout.token_ids), keep=True)
            below = number - 1 if number > lowest else EMBEDDING if trains_embedding else None
            with self.units.held(number, then=below, trains=True):
                grad_x = self._layer_backward(number, grad, x, now, trains_embedding=trains_embedding)
            if grad_x is None:
                return
            grad = grad_x
        if not trains_embedding:
            return
        with self.units.held(EMBEDDING, trains=True):
            of_tokens = gradient(self.embedding)
            of_tokens.index_add_(0, now.layout.token_ids, grad.to(of_tokens.dtype), alpha=self.embedding_scale)

    def _layer_backward(
        self, number: int, grad: torch.Tensor, x: torch.Tensor, now: Pass, *, trains_embedding: bool
    ) -> torch.Tensor | None:
        """From the gradient of a layer's output to that of its input x; None where nobody wants it."""
        slot, rows, middle = self._layer(number, x, now, keep=True)
        if number < self.recompute:
            self.mixers[number].forward(x, now, middle, slot, rows)
            self.mlps[number].forward_again(middle, now, slot)
        grad = self.mlps[number].backward(grad, middle, now, slot)
        # A norm that is trained gets its gradient on the way to that of the layer's input.
        trains_norm = self.mixers[number].norm.weight.requires_grad
        wanted = number > self.lowest_trained or trains_embedding or trains_norm
        return self.mixers[number].backward(grad, x, now, slot, rows, wanted=wanted)

    def _layer(
        self, number: int, x: torch.Tensor, now: Pass, *, keep: bool
    ) -> tuple[str, torch.Tensor | None, torch.Tensor]:
        """A layer's slot, the rows that go on to its MLP, None for all, and the buffer between its two blocks.

        Layers of which nothing is kept share a slot; in the last layer the rows that predict go on.
        """
        slot = f"layer{number}" if keep and number >= self.recompute else "layer"
        rows = now.layout.predicting if number == len(self.mlps) - 1 else None
        shape = (len(x if rows is None else rows), x.shape[1])
        return slot, rows, self.workspace.take(slot + ".middle", shape, self.dtype)

    def _input(self, number: int, rows: int, *, keep: bool) -> torch.Tensor:
        """A layer's input, [rows, D]; where nothing is kept, two buffers take turns."""
        name = f"layer{number}.input" if keep else f"input{number % 2}"
        return self.workspace.take(name, (rows, self.embedding.shape[1]), self.dtype)

    def shares(self, longest: int) -> bool:
        """Whether samples of up to `longest` tokens may share their beginning: not if some take long rotary factors."""
        return self.this.short_context is None or longest <= self.this.short_context

    def _lay_out(self, batch: Batch, *, share_prefix: bool) -> Layout:
        """The batch's layout; samples with long and with short rotary factors share nothing."""
        if share_prefix and (limit := self.this.short_context) is not None:
            longer = batch.starts.diff() > limit
            share_prefix = bool(longer.all()) or not longer.any()
        return fill_up(lay_out(batch, share_prefix=share_prefix))

    def _rotary_tables(self, x: torch.Tensor, layout: Layout) -> dict[str, RotaryTable]:
        """The model's own tables."""
        mixers = [layer.mixer for layer in self.this.layers]
        names = {mixer.rotary for mixer in mixers if isinstance(mixer, Attention)}
        return {name: self._rotary_table(x, layout, () if name == ALL else (name,)) for name in sorted(names)}

    def _rotary_table(self, x: torch.Tensor, layout: Layout, name: tuple[str, ...]) -> RotaryTable:
        """A table of the model's, which repeats cos and sin for the second half of what is turned."""
        positions = layout.positions
        if (limit := self.this.short_context) is None:
            cos, sin = self.rotary(x[None], positions[None], *name)
        else:  # the module takes long or short factors for all positions of a call
            longer = layout.by_length(limit)
            parts = [self.rotary(x[None], positions[None, rows], *name) for rows in longer if len(rows)]
            order = torch.cat(longer).argsort()
            cos, sin = (torch.cat(part, 1)[:, order] for part in zip(*parts, strict=True))
        half = cos.shape[-1] // 2
        cos, sin = (part[0, :, None, :half].to(self.dtype).contiguous() for part in (cos, sin))
        if self.this.query_scaling is None:
            return RotaryTable((cos, sin), (cos, sin))
        beta, period = self.this.query_scaling
        scale = (1 + beta * (1 + positions // period).log())[:, None, None].to(self.dtype)
        return RotaryTable((cos, sin), (cos * scale, sin * scale))
