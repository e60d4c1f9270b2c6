"""The gated delta net block of a decoder layer (Qwen3.5, Qwen3-Next), forward and backward written out.

    out = x + out_proj(norm(read) * silu(z)),    read: what the gated delta rule (rule.py) gives each token

Kept from forward to backward: what the projections give, what tokens read, and the state at the start of each chunk.
Samples of a pass go one after the other, a chunk of tokens at a time, so that what is wide stays in the caches; samples
that share a beginning start from the state after it.

Shapes: T tokens of the layout, N trained ones, D hidden size, H value heads; others as in rule.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.blocks import Parts, Pass
from qingtune.kernels.delta.heads import DeltaHeads
from qingtune.kernels.delta.rule import DeltaRule
from qingtune.kernels.delta.sizes import CHUNK, DeltaNetSizes
from qingtune.kernels.layout import Layout, Segment
from qingtune.kernels.native.delta import delta_kernels
from qingtune.kernels.projection import gradient
from qingtune.kernels.workspace import Workspace

aten = torch.ops.aten


class DeltaNetBlock:
    """x -> x + out(gated norm(delta rule(convolution(qkv(norm(x)))))).

    In the last layer only rows that predict go beyond the recurrence.
    """

    def __init__(self, layer: Any, number: int, this: DeltaNet, parts: Parts) -> None:
        net = layer.linear_attn
        self.number, self.this, self.dtype, self.workspace = number, this, parts.dtype, parts.workspace
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.norm = parts.norm(layer.input_layernorm)
        qkv, z, b, a = (getattr(net, "in_proj_" + name) for name in ("qkv", "z", "b", "a"))
        self.mixed, self.z, self.all, self.out = parts.projections([qkv, b, a], [z], [qkv, z, b, a], [net.out_proj])
        self.heads = DeltaHeads(this, net.conv1d.weight, self.workspace, self.dtype)
        self.gates = Gates(net.A_log, net.dt_bias, this)
        # Each number of rows has oneDNN make 16-bit kernels of its own: short chunks are computed in fp32.
        self.rule, self.short_rule = (DeltaRule(self.workspace, self.wide, products) for products in (self.dtype, None))
        self.gated_norm = GatedNorm(net.norm.weight, float(net.norm.variance_epsilon), self.workspace, self.wide)

    @property
    def sizes(self) -> DeltaNetSizes:
        """What it takes memory for."""
        return DeltaNetSizes(self.this, self.gated_norm.weight.requires_grad, self.all.sizes, self.out.sizes)

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str, rows: torch.Tensor | None) -> None:
        """x: [T, D] -> out: [T, D], or [N, D] where rows says which."""
        qkv, z, b, a = self._projected(slot, len(x), len(out))
        normed, seed = self.norm.forward(x), now.dropout_seed(self.number, 0)
        if rows is None:
            self.all.forward(slot + ".all", normed, [qkv, z, b, a], seed)
        else:
            self.mixed.forward(slot + ".mixed", normed, [qkv, b, a], seed)
            self.z.forward(slot + ".z", normed[rows], [z], now.dropout_seed(self.number, 4))
        read = self._take(slot + ".read", len(out), z.shape[1])
        if rows is None:
            self._read(now.layout, slot, qkv, b, a, read)
        else:
            everywhere = self._take("delta.read", len(x), z.shape[1])
            self._read(now.layout, slot, qkv, b, a, everywhere)
            torch.index_select(everywhere, 0, rows, out=read)
        gated = self.gated_norm.forward(read, z, self._take("delta.gated", *z.shape))
        out.copy_(x if rows is None else x[rows])
        self.out.forward(slot + ".out", gated, [out], now.dropout_seed(self.number, 1), add=True)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str, rows: torch.Tensor | None, *, wanted: bool
    ) -> torch.Tensor | None:
        """grad: gradient of out -> gradient of x, [T, D], None if it is not wanted; grad may be overwritten."""
        qkv, z, b, a = self._projected(slot, len(x), len(grad))
        read = self._take(slot + ".read", *z.shape)
        gated = self.gated_norm.forward(read, z, self._take("delta.gated", *z.shape))
        grad_z = self._take("delta.grad_z", *z.shape)
        self.out.backward(slot + ".out", gated, [grad], grad_z, now.dropout_seed(self.number, 1))
        grad_read = self.gated_norm.backward(grad_z, read, z, gated)
        if rows is not None:
            everywhere = self._take("delta.read", len(x), z.shape[1])
            grad_read = everywhere.zero_().index_copy_(0, rows, grad_read)
        grads = self._read_backward(now.layout, slot, qkv, b, a, grad_read)
        return self._project_backward(grad, x, now, slot, rows, (grads[0], grad_z, *grads[1:]), wanted=wanted)

    # --- The recurrence ----------------------------------------------------------------------------------------------

    def _read(
        self, layout: Layout, slot: str, qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor
    ) -> None:
        """What each token reads, [T, H e]; the states at the starts of chunks are kept under the slot."""
        decay, beta = self.gates.forward(b, a, self.wide)
        states, taps = self._states(slot, len(qkv)), self.heads.taps()
        state, after_shared = self._state("state"), self._state("shared")
        for chunk in _chunks(layout):
            if chunk.first > chunk.segment.start:
                states[chunk.state].copy_(state)
            else:
                _start(state, after_shared if chunk.segment.shared else None)
            kq, v = self.heads.forward(self._window(qkv, chunk), taps)
            here = slice(chunk.first, chunk.last)
            read = self._rule(chunk).forward(kq, v, decay[..., here].cumsum(-1), beta[..., here], state)
            out[here].view(-1, *state.shape[:1], *state.shape[2:]).copy_(read.transpose(0, 1))
            if chunk.last == layout.segments[0].end:
                states[0].copy_(after_shared.copy_(state))

    def _read_backward(
        self, layout: Layout, slot: str, qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of qkv, b and a; grad: [T, H e]."""
        decay, beta = self.gates.forward(b, a, self.wide)
        grad_decay, grad_beta = torch.empty_like(decay), torch.empty_like(beta)
        grad_qkv = self._take("delta.grad_qkv", *qkv.shape)
        states, state, taps = self._states(slot, len(qkv)), self._state("state"), self.heads.taps()
        # Gradients of what a chunk leaves to the next one: its state, and its last rows for the convolution.
        left = _Left(self._state("left_state"), self._rows("left_rows"))
        left_by_shared = _Left(self._state("shared_left_state"), self._rows("shared_left_rows")).zero_()
        trained = self.heads.weight.requires_grad
        grad_taps = torch.zeros_like(taps) if trained else None
        for chunk in reversed(list(_chunks(layout))):
            if chunk.last == chunk.segment.end:
                left.start(left_by_shared if chunk.segment.start == 0 else None)
            here, window = slice(chunk.first, chunk.last), self._window(qkv, chunk)
            kq, v = self.heads.forward(window, taps)
            grad_out = grad[here].view(-1, *state.shape[:1], *state.shape[2:]).transpose(0, 1)
            _start(state, None if chunk.state is None else states[chunk.state])
            sums = decay[..., here].cumsum(-1)
            found = self._rule(chunk).backward(grad_out, kq, v, sums, beta[..., here], state, left.state)
            grad_decay[..., here], grad_beta[..., here] = found[2:]
            grad_window = self.heads.backward(*found[:2], window, kq, taps, grad_taps)
            grad_window[len(grad_window) - self.heads.history :].add_(left.rows)
            grad_qkv[here].copy_(grad_window[self.heads.history :])
            left.rows.copy_(grad_window[: self.heads.history])
            if chunk.first == chunk.segment.start and chunk.segment.shared:
                left_by_shared.add_(left)
        if grad_taps is not None:
            self.heads.add_weight_gradient(grad_taps)
        return grad_qkv, *self.gates.backward(grad_decay, grad_beta, b, a)

    def _rule(self, chunk: _Chunk) -> DeltaRule:
        return self.rule if chunk.last - chunk.first == CHUNK else self.short_rule

    def _window(self, qkv: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        """A chunk's rows after those before them, [w - 1 + n, M]; where a sample starts, those of its shared part."""
        history, segment = self.heads.history, chunk.segment
        window = self.heads.window(chunk.last - chunk.first)
        end = segment.shared if chunk.first == segment.start else chunk.first
        there = min(history, end)
        window[: history - there].zero_()
        window[history - there : history].copy_(qkv[end - there : end])
        window[history:].copy_(qkv[chunk.first : chunk.last])
        return window

    # --- Projections and buffers -------------------------------------------------------------------------------------

    def _project_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        now: Pass,
        slot: str,
        rows: torch.Tensor | None,
        grads: tuple[torch.Tensor, ...],
        *,
        wanted: bool,
    ) -> torch.Tensor | None:
        """As backward; grads: of what the projections give, qkv, z, b and a."""
        normed, seed = self.norm.forward(x), now.dropout_seed(self.number, 0)
        grad_normed = self._take("delta.grad_normed", *x.shape) if wanted else None
        if rows is None:
            self.all.backward(slot + ".all", normed, grads, grad_normed, seed)
            return None if grad_normed is None else self.norm.add_backward(grad, grad_normed, x)
        self.mixed.backward(slot + ".mixed", normed, [grads[0], *grads[2:]], grad_normed, seed)
        grad_rows = self._take("delta.grad_rows", len(rows), x.shape[1]) if wanted else None
        self.z.backward(slot + ".z", normed[rows], grads[1:2], grad_rows, now.dropout_seed(self.number, 4))
        if grad_normed is None or grad_rows is None:
            return None
        grad_x = self.norm.backward(grad_normed.index_add_(0, rows, grad_rows), x)
        return self._take("delta.grad_x", *x.shape).copy_(grad_x.index_add_(0, rows, grad.to(grad_x.dtype)))

    def _projected(self, slot: str, tokens: int, rows: int) -> tuple[torch.Tensor, ...]:
        """Where qkv [T, M], z [T or N, H e], b and a [T, H] are kept."""
        widths = [member.shape[0] for member in self.all.members]
        counts, names = (tokens, rows, tokens, tokens), ("qkv", "z", "b", "a")
        return tuple(
            self._take(f"{slot}.{name}", n, width) for name, n, width in zip(names, counts, widths, strict=True)
        )

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take(name, shape, self.dtype)

    def _states(self, slot: str, tokens: int) -> torch.Tensor:
        """The state after a shared beginning, then those at the starts of chunks within samples, [..., K, d, R, e]."""
        return self._take(slot + ".states", 1 + tokens // CHUNK, *self._state_shape)

    def _state(self, name: str) -> torch.Tensor:
        return self.workspace.take("delta." + name, self._state_shape, self.wide)

    def _rows(self, name: str) -> torch.Tensor:
        return self.workspace.take("delta." + name, (self.heads.history, len(self.heads.weight)), self.wide)

    @property
    def _state_shape(self) -> tuple[int, int, int, int]:
        this = self.this
        return this.key_heads, this.key_size, this.value_heads // this.key_heads, this.value_size


@dataclass(frozen=True)
class _Chunk:
    """Tokens first..last of the layout, all of one segment; which of the kept states it starts from, None for zero."""

    segment: Segment
    first: int
    last: int
    state: int | None


def _chunks(layout: Layout) -> Iterator[_Chunk]:
    kept = 0
    for segment in layout.segments:
        yield _Chunk(segment, segment.start, min(segment.start + CHUNK, segment.end), 0 if segment.shared else None)
        for first in range(segment.start + CHUNK, segment.end, CHUNK):
            kept += 1
            yield _Chunk(segment, first, min(first + CHUNK, segment.end), kept)


def _start(tensor: torch.Tensor, value: torch.Tensor | None) -> None:
    """Write what a sequence starts from, zero for None."""
    if value is None:
        tensor.zero_()
    else:
        tensor.copy_(value)


@dataclass(frozen=True)
class _Left:
    """Gradients of what a chunk leaves to the next: its state [K, d, R, e] and its last rows [w - 1, M]."""

    state: torch.Tensor
    rows: torch.Tensor

    def start(self, other: _Left | None) -> None:
        _start(self.state, other and other.state)
        _start(self.rows, other and other.rows)

    def zero_(self) -> _Left:
        self.start(None)
        return self

    def add_(self, other: _Left) -> None:
        self.state.add_(other.state)
        self.rows.add_(other.rows)


@dataclass(frozen=True)
class Gates:
    """g = -exp(A_log) softplus(a + dt_bias), the decay of the state in log space, and beta = sigmoid(b)."""

    a_log: torch.Tensor
    dt_bias: torch.Tensor
    sizes: DeltaNet

    def forward(self, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """b and a [T, H] -> g and beta, both [K, R, T] in a dtype."""
        pace = F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        return self._by_head(pace.mul_(-self.a_log.to(dtype).exp())), self._by_head(b.to(dtype).sigmoid())

    def backward(
        self, grad: torch.Tensor, grad_beta: torch.Tensor, b: torch.Tensor, a: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of b and a in their dtype, for those of g and of log beta; parameters' are added to them."""
        grad, grad_beta = (x.flatten(0, 1).t() for x in (grad, grad_beta))
        grad_b = torch.sigmoid(-b.to(grad.dtype)).mul_(grad_beta)
        shifted = a.to(grad.dtype) + self.dt_bias.to(grad.dtype)
        scaled = grad * -self.a_log.to(grad.dtype).exp()
        if self.a_log.requires_grad:
            gradient(self.a_log).add_((scaled * F.softplus(shifted)).sum(0))
        grad_a = scaled.mul_(shifted.sigmoid_())
        if self.dt_bias.requires_grad:
            gradient(self.dt_bias).add_(grad_a.sum(0))
        return grad_b.to(b.dtype), grad_a.to(a.dtype)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.t().contiguous().unflatten(0, (self.sizes.key_heads, -1))


@dataclass(frozen=True)
class GatedNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight * silu(z), over the last dimension of each head.

    In fp32 (fp64 for fp64), CHUNK rows at a time, so that what is wide stays in the caches.
    """

    weight: torch.Tensor
    epsilon: float
    workspace: Workspace
    dtype: torch.dtype

    def forward(self, x: torch.Tensor, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x and z: [N, H e] -> out, likewise."""
        if kernels := delta_kernels(len(self.weight), x, z, out):
            kernels.gated_norm(x, z, self.weight.float(), out, self.epsilon)
            return out
        for part, gate, place in zip(x.split(CHUNK), z.split(CHUNK), out.split(CHUNK), strict=True):
            normalised, _ = self._normalised(part)
            gate = self._wide("gate", gate)
            aten.silu.out(gate, out=gate)
            place.view(gate.shape).copy_(normalised.mul_(self.weight).mul_(gate))
        return out

    def backward(self, grad: torch.Tensor, x: torch.Tensor, z: torch.Tensor, grad_x: torch.Tensor) -> torch.Tensor:
        """Gradients of x into grad_x, which is returned, and of z in grad's place; the weight's is added to it."""
        kernels = None if self.weight.requires_grad else delta_kernels(len(self.weight), grad, x, z, grad_x)
        if kernels:
            kernels.gated_norm_backward(grad, x, z, self.weight.float(), grad_x, self.epsilon)
            return grad_x
        parts = zip(*(tensor.split(CHUNK) for tensor in (grad, x, z, grad_x)), strict=True)
        for grad_part, part, gate, place in parts:
            normalised, rate = self._normalised(part)
            wide, gate = self._wide("norm_grad", grad_part), self._wide("gate", gate)
            active = aten.silu.out(gate, out=self._take("norm_active", *gate.shape))
            # Of the gate: grad normalised weight silu'(z).
            product = torch.mul(wide, normalised, out=self._take("norm_product", *gate.shape))
            if self.weight.requires_grad:
                summed = torch.mul(product, active, out=self._take("norm_summed", *gate.shape))
                gradient(self.weight).add_(summed.sum((0, 1)))
            aten.silu_backward.grad_input(product.mul_(self.weight), gate, grad_input=product)
            grad_part.view(gate.shape).copy_(product)
            wide.mul_(active).mul_(self.weight)
            shared = torch.mul(wide, normalised, out=product).mean(-1, keepdim=True)
            place.view(gate.shape).copy_(wide.addcmul_(normalised, shared, value=-1).mul_(rate))
        return grad_x

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take("delta." + name, shape, self.dtype)

    def _wide(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """[n, H e] -> [n, H, e] in the workspace."""
        apart = rows.view(len(rows), rows.shape[1] // len(self.weight), len(self.weight))
        return self._take(name, *apart.shape).copy_(apart)

    def _normalised(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normalised = self._wide("normalised", rows)
        rate = torch.linalg.vector_norm(normalised, dim=-1, keepdim=True)
        rate.square_().div_(len(self.weight)).add_(self.epsilon).rsqrt_()
        return normalised.mul_(rate), rate
