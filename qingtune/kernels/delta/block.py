"""The gated delta net block of a decoder layer (Qwen3.5, Qwen3-Next), forward and backward written out.

    out = x + out_proj(norm(read) * silu(z)),    read: what the gated delta rule gives each token (recurrence.py)

Kept from forward to backward: what the projections give, what tokens read, and the state at the start of each chunk.

Shapes: T tokens of the layout, N trained ones, D hidden size, H value heads; others as in rule.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.blocks import Parts, Pass
from qingtune.kernels.delta.recurrence import Recurrence
from qingtune.kernels.delta.sizes import CHUNK, DeltaNetSizes
from qingtune.kernels.layout import Layout
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
        self.recurrence = Recurrence(this, net.conv1d.weight, self.workspace, self.dtype)
        self.gates = Gates(net.A_log, net.dt_bias, this)
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
        everywhere = read if rows is None else self._take("delta.read", len(x), z.shape[1])
        states = self.recurrence.states(slot, len(x), self.dtype)
        self.recurrence.forward(now.layout, qkv, *self.gates.forward(b, a, self.wide), states, everywhere)
        if rows is not None:
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

    def _read_backward(
        self, layout: Layout, slot: str, qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of qkv, b and a; grad: of what each token reads, [T, H e]."""
        decay, beta = self.gates.forward(b, a, self.wide)
        grad_qkv = self._take("delta.grad_qkv", *qkv.shape)
        states = self.recurrence.states(slot, len(qkv), self.dtype)
        grads = self.recurrence.backward(layout, qkv, decay, beta, states, grad, grad_qkv)
        return grad_qkv, *self.gates.backward(*grads, b, a)

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
