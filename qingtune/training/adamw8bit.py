"""AdamW (Loshchilov & Hutter 2019) with both moments in 8 bits, for CPUs.

Moments are held in blocks of 256 with the block's largest value (Dettmers et al. 2022,
https://arxiv.org/abs/2110.02861). The first one is held as its signed square root, the second as its fourth root, so
that small values next to large ones keep their relative precision; both, and weights in bf16, are rounded up or down
at random with the right expectation, without which a change smaller than half a step would be lost every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from qingtune.kernels.native.elementwise import native

BLOCK = 256
CHUNK = 2**18  # elements updated at a time, so that their fp32 copies stay in a CPU's cache


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments: 2.03 bytes a weight instead of 8.

    Args:
        params: parameters or groups of them, in fp32 or bf16.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, in units of the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; the rounding is a function of the step and the parameter."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, number)
                number += 1

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            blocks = -(-parameter.numel() // BLOCK)
            for name, dtype in (("first", torch.int8), ("second", torch.uint8)):
                state[name] = torch.zeros(blocks, BLOCK, dtype=dtype, device=parameter.device)
                state[f"{name}_largest"] = torch.zeros(blocks, 1, device=parameter.device)
            state["step"] = 0
        state["step"] += 1
        noise = _Noise(
            parameter.device, seed=state["step"] * 1_000_003 + number, most=min(CHUNK, len(state["first"]) * BLOCK)
        )
        values, grads = parameter.view(-1), parameter.grad.reshape(-1)  # pyright: ignore[reportOptionalMemberAccess]
        for start in range(0, parameter.numel(), CHUNK):
            blocks = slice(start // BLOCK, (start + CHUNK) // BLOCK)
            moments = [state[name][blocks] for name in ("first", "first_largest", "second", "second_largest")]
            _update_chunk(values[start : start + CHUNK], grads[start : start + CHUNK], moments, group, state, noise)


class _Noise:
    """Numbers uniform in [0, 1): a stretch of one random vector, from another place each time."""

    def __init__(self, device: torch.device, seed: int, most: int) -> None:
        self._places = torch.Generator().manual_seed(seed)
        generator = torch.Generator(device).manual_seed(seed)
        self._numbers = torch.rand(most + 2**12, generator=generator, device=device)

    def take(self, count: int) -> torch.Tensor:
        """[count]."""
        place = int(torch.randint(2**12, (), generator=self._places))
        return self._numbers[place : place + count]


def _update_chunk(
    values: torch.Tensor,
    grads: torch.Tensor,
    moments: list[torch.Tensor],
    group: dict[str, Any],
    state: dict[str, Any],
    noise: _Noise,
) -> None:
    first_code, first_largest, second_code, second_largest = moments
    (beta1, beta2), step = group["betas"], state["step"]
    if c := native(values, grads):
        drawn = [noise.take(first_code.numel()) for _ in range(3 if values.dtype == torch.bfloat16 else 2)]
        decay, seen = 1 - group["lr"] * group["weight_decay"], (1 - beta1**step, 1 - beta2**step)
        numbers = (beta1, beta2, *seen, group["eps"], decay, group["lr"])
        c.adamw8bit(values, grads, moments, (*drawn, drawn[0])[:3], numbers)
        return
    first, second = decode_first(first_code, first_largest), decode_second(second_code, second_largest)
    grad = torch.zeros(first.shape, device=values.device)  # the last block may be longer than what is left
    grad.view(-1)[: grads.numel()].copy_(grads)
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    encode_first(first, first_code, first_largest, noise.take(first.numel()))
    encode_second(second, second_code, second_largest, noise.take(first.numel()))
    root = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    move = first.div_(root).view(-1)[: values.numel()]
    wide = values.float()
    wide = wide.clone() if wide is values else wide
    wide.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"] / (1 - beta1**step))
    if values.dtype == torch.bfloat16:
        wide = round_to_bf16(wide, noise.take(wide.numel()))
    values.copy_(wide)


def decode_first(code: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """int8 [n, 256] and fp32 [n, 1] -> fp32 [n, 256]."""
    root = code.float().div_(127)
    return root.mul_(root.abs()).mul_(largest)


def encode_first(moment: torch.Tensor, code: torch.Tensor, largest: torch.Tensor, noise: torch.Tensor) -> None:
    """The inverse of decode_first, rounded at random: noise is uniform in [0, 1)."""
    torch.amax(moment.abs(), 1, keepdim=True, out=largest)
    share = moment / largest.clamp_min(torch.finfo(torch.float32).tiny)
    square = share.abs().mul_(127**2)
    below = square.sqrt().floor_()
    up = noise.view_as(square) * (2 * below + 1) < square - below * below  # squares are 2 below + 1 apart
    code.copy_((below + up).clamp_(max=127).copysign_(share))


def decode_second(code: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 256] and fp32 [n, 1] -> fp32 [n, 256]."""
    return code.float().div_(255).square_().square_().mul_(largest)


def encode_second(moment: torch.Tensor, code: torch.Tensor, largest: torch.Tensor, noise: torch.Tensor) -> None:
    """The inverse of decode_second, rounded at random; what is not zero stays so, as it is divided by."""
    torch.amax(moment, 1, keepdim=True, out=largest)
    share = moment / largest.clamp_min(torch.finfo(torch.float32).tiny)
    root = share.sqrt().sqrt_().mul_(255)
    rounded = root.add(noise.view_as(root)).floor_().clamp_(0, 255)
    code.copy_(torch.where(root > 0, rounded.clamp_min(1), rounded))


def round_to_bf16(wide: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 values that bf16 holds exactly, the expectation of which is `wide`, [n]; noise is uniform in [0, 1)."""
    bits = wide.view(torch.int32) + noise.mul(2**16).to(torch.int32)
    return bits.bitwise_and_(-(2**16)).view(torch.float32)
