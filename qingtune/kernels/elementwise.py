"""RMSNorm, SwiGLU, GeGLU and rotary positions, forward and backward, in buffers that stay from pass to pass.

In C where that is there for the tensors (native/elementwise.py), in one pass over memory each; otherwise in PyTorch.
Backward functions take what forward took and compute it again where that is cheaper than keeping it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qingtune.kernels.architecture import Activation
from qingtune.kernels.native.elementwise import native
from qingtune.kernels.projection import gradient
from qingtune.kernels.workspace import Workspace

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + epsilon) * (offset + weight) over the last dimension (RMSNorm, Zhang & Sennrich 2019).

    Computed in fp32 (fp64 for fp64); results stay in the workspace.
    """

    weight: torch.Tensor
    epsilon: float
    workspace: Workspace
    offset: float = 0.0

    def factors(self, dtype: torch.dtype) -> torch.Tensor:
        """offset + weight, [D]; without an offset the weight as it is."""
        return self.weight.to(dtype) + self.offset if self.offset else self.weight

    def forward(self, x: torch.Tensor, name: str = "norm.out") -> torch.Tensor:
        """[..., D] -> [..., D], in the workspace under the name."""
        if x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], self.factors(torch.float32).to(x.dtype), self.epsilon)
        if c := native(heads=x):
            out = self.workspace.take(name, x.shape, x.dtype)
            c.norm(x, self.weight, self.epsilon, out, offset=self.offset)
            return out
        normalised, _ = self._normalised(x)
        return self.workspace.take(name, x.shape, x.dtype).copy_(normalised.mul_(self.factors(normalised.dtype)))

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of x in fp32 (fp64 for fp64); the weight's is added to it if it is trained."""
        if c := native(grad, heads=x):
            grad_x = self.workspace.take("norm.scaled", x.shape, torch.float32)
            trained = self.weight.requires_grad
            grad_weight = c.norm_backward(
                grad, x, self.weight, self.epsilon, grad_x, offset=self.offset, trained=trained
            )
            if grad_weight is not None:
                gradient(self.weight).add_(grad_weight)
            return grad_x
        normalised, rate = self._normalised(x)
        scaled = self.workspace.take("norm.scaled", x.shape, normalised.dtype)
        scaled.copy_(grad).mul_(self.factors(normalised.dtype))
        product = self.workspace.take("norm.product", x.shape, normalised.dtype)
        shared = torch.mul(scaled, normalised, out=product).mean(-1, keepdim=True)
        grad_x = scaled.addcmul_(normalised, shared, value=-1).mul_(rate)
        if self.weight.requires_grad:
            gradient(self.weight).add_(normalised.mul_(grad).flatten(0, -2).sum(0))
        return grad_x

    def add_backward(self, total: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the gradient of x to total, a tensor like x."""
        if not self.weight.requires_grad and (c := native(total, grad, x)):
            c.norm_add_backward(grad, x, self.weight, self.epsilon, total, offset=self.offset)
            return total
        grad_x = self.backward(grad, x)
        wide = self.workspace.take("norm.product", x.shape, grad_x.dtype).copy_(total)
        return total.copy_(grad_x.add_(wide))

    def _normalised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x / sqrt(mean(x^2) + epsilon), [..., D], and the factor, [..., 1]; every copy is into a buffer that stays."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normalised = self.workspace.take("norm.wide", x.shape, wide).copy_(x)
        length = torch.linalg.vector_norm(normalised, dim=-1, keepdim=True)
        rate = length.square_().div_(x.shape[-1]).add_(self.epsilon).rsqrt_()
        return normalised.mul_(rate), rate


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, activated: torch.Tensor, out: torch.Tensor, activation: Activation = "silu"
) -> torch.Tensor:
    """f(gate) * up (Shazeer 2020) into out; [T, I] all four, the last two may be one.

    Args:
        activated: holds what swiglu_backward is to find there.
        activation: f; with "gelu_tanh", the tanh approximation of GELU, this is GeGLU.
    """
    if c := native(gate, up, out):
        c.gated(gate, up, out, activation=activation)
        return out
    if activation == "silu":
        aten.silu.out(gate, out=activated)
    else:
        aten.gelu.out(gate, approximate="tanh", out=activated)
    return torch.mul(activated, up, out=out)


def swiglu_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activated: torch.Tensor,
    activation: Activation = "silu",
) -> torch.Tensor:
    """Put the gradient of gate in gate's place; returns that of up, in up's place or activated's. grad is overwritten.

    [T, I] all four. In C activated is not touched, so that a buffer of that name takes no memory.
    """
    if c := native(grad, gate, up, activated):
        c.gated_backward(grad, gate, up, up, activation=activation)
        return up
    torch.mul(grad, activated, out=activated)
    if activation == "silu":
        aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=gate)
    else:
        aten.gelu_backward.grad_input(grad.mul_(up), gate, approximate="tanh", grad_input=gate)
    return activated


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) with the two halves of a head as coordinates; the backward is rotate by -sin.

    Args:
        x: [T, heads, d].
        cos: [T, 1, h], likewise sin, in x's dtype; h is d / 2, or less where only the first 2 h numbers are turned.
        out: like x, and not x itself.
    """
    if c := native(cos, sin, out, heads=x):
        c.rotate(x, cos, sin, out)
        return out
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    return out


def cap_in_place(x: torch.Tensor, cap: float, slopes: torch.Tensor) -> torch.Tensor:
    """Put c tanh(x / c), as Gemma 2 caps scores and logits (https://arxiv.org/abs/2408.00118), in the place of x.

    Returns:
        slopes, which get the derivative 1 - tanh(x / c)^2.
    """
    torch.square(x.div_(cap).tanh_(), out=slopes)
    x.mul_(cap)
    return slopes.neg_().add_(1)
