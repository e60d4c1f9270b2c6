"""RMSNorm, SwiGLU and rotary positions, forward and backward, written into buffers that the caller gives.

Backward functions take what forward took and compute it again where that is cheaper than keeping it.
"""

from __future__ import annotations

import torch

from qingtune.kernels.workspace import Workspace

aten = torch.ops.aten


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, workspace: Workspace, name: str) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (Zhang & Sennrich 2019), [..., D] -> [..., D].

    Computed in fp32 (fp64 for fp64); the result stays in the workspace under the name.
    """
    if x.device.type != "cpu":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), epsilon)
    normalised, _ = _normalised(x, epsilon, workspace)
    return workspace.take(name, x.shape, x.dtype).copy_(normalised.mul_(weight))


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float, workspace: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient with respect to x, and the normalised x, [..., D] both, in fp32 (fp64 for fp64), in the workspace.

    The weight's own gradient is the sum of grad * normalised x over all but the last dimension.
    """
    normalised, rate = _normalised(x, epsilon, workspace)
    scaled = workspace.take("norm.scaled", x.shape, normalised.dtype).copy_(grad).mul_(weight)
    product = torch.mul(scaled, normalised, out=workspace.take("norm.product", x.shape, normalised.dtype))
    shared = product.mean(-1, keepdim=True)
    return scaled.addcmul_(normalised, shared, value=-1).mul_(rate), normalised


def _normalised(x: torch.Tensor, epsilon: float, workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + epsilon), [..., D], and the factor, [..., 1]; every copy is into a buffer that stays."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normalised = workspace.take("norm.wide", x.shape, wide).copy_(x)
    length = torch.linalg.vector_norm(normalised, dim=-1, keepdim=True)
    rate = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return normalised.mul_(rate), rate


def swiglu(gate: torch.Tensor, up: torch.Tensor, activated: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020) into out, silu(gate) into activated; [T, I] all four, the last two may be one."""
    aten.silu.out(gate, out=activated)
    return torch.mul(activated, up, out=out)


def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activated: torch.Tensor) -> None:
    """Put the gradient of gate in gate's place and that of up in activated's; grad is overwritten; [T, I] all four."""
    torch.mul(grad, activated, out=activated)
    aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=gate)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) with the two halves of a head as coordinates; the backward is rotate by -sin.

    Args:
        x: [T, heads, d].
        cos: [T, 1, d / 2], likewise sin, in x's dtype.
        out: like x, and not x itself.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out
