"""Which code computes losses and gradients: our own kernels, or the model's modules where those do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qingtune.adapters.lora import member, why_general
from qingtune.config.training import TrainConfig
from qingtune.data.batch import Batch
from qingtune.errors import UserError
from qingtune.kernels.decoder import TrainingDecoder
from qingtune.kernels.device import Hardware, free_bytes
from qingtune.kernels.end_to_end import try_ways
from qingtune.kernels.footprint import (
    BUFFERS_OF_FREE,
    TOKENS_PER_PASS_ON_CPU,
    layers_to_recompute,
    optimizer_bytes,
)
from qingtune.kernels.int8 import multiplies_int8
from qingtune.kernels.loss import summed_loss
from qingtune.kernels.native.elementwise import elementwise_library
from qingtune.kernels.units import Units
from qingtune.models.layers import BALANCE, wants_balance
from qingtune.output.console import say
from qingtune.training.shards import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = 2**31
# Tokens of a pass through a model's own modules on a GPU, as masks of samples end to end grow with the square.
PACKED_ON_GPU = 4096


@dataclass
class Engine:
    """Losses and gradients of micro-batches.

    Attributes:
        loss: summed loss of a micro-batch, fp32 scalar without a graph.
        add_gradients: micro-batch, scale -> summed loss; adds scale times its gradient to the parameters'.
        most_tokens: to be computed at a time; longer micro-batches are to be split between samples.
        release: gives back what is held between passes, which will have no more than this many tokens from then on.
        recompute_all: keeps nothing but inputs for the backward pass; False if that was so already.
        shares: whether a pass with gradients computes once what its samples begin with.
        loss_shares: whether one without gradients does.
        in_step: whether all processes make each pass together, so that none can repeat one in smaller parts.
    """

    loss: Callable[[Batch], torch.Tensor]
    add_gradients: Callable[[Batch, torch.Tensor], torch.Tensor]
    most_tokens: int
    release: Callable[[int], None]
    recompute_all: Callable[[], bool]
    shares: bool = False
    loss_shares: bool = False
    in_step: bool = False

    def shrink(self, batch: Batch) -> str:
        """Make do with less after a pass ran out of memory: half of it at a time, then more computed again.

        Args:
            batch: the largest one tried.

        Returns:
            a line for the user.

        Raises:
            UserError: a single sample does not fit, or other processes are in the same pass.
        """
        tokens, samples = batch.computed, len(batch.starts) - 1
        if self.in_step:
            raise UserError(
                f"out of memory in a pass of {tokens:,} tokens, which sharded processes make together (shard)",
                where=batch.origins[0],
                fix="Set per_device_train_batch_size lower (with samples_per_step, the result is the same), set "
                "gradient_checkpointing true, or run more processes.",
            )
        self.release(tokens // 2 if samples > 1 else tokens)
        if samples > 1:
            self.most_tokens = tokens // 2
            how = f"from now on, passes have at most {self.most_tokens:,} tokens, with more passes per step"
        elif self.recompute_all():
            how = "from now on, all layers are recomputed in the backward pass"
        else:
            raise UserError(
                f"out of memory with a single sample of {tokens:,} tokens",
                where=batch.origins[0],
                fix=f"Set max_seq_length to {tokens // 2:,} or less, or {LEANER}",
            )
        same = "Gradients are summed, so training is the same (except for dropout masks)."
        return f"Out of memory in a pass of {tokens:,} tokens: {how}. {same}"


LEANER = "use less memory: LoRA or QLoRA, a smaller lora_r, optim adamw_8bit, a smaller model."


def make_engine(
    config: TrainConfig,
    model: PreTrainedModel,
    hardware: Hardware,
    longest: int,
    *,
    evaluates: bool = False,
    units: Units | None = None,
) -> Engine:
    """The fastest engine that is right for the model.

    Args:
        longest: tokens of the longest sample.
        evaluates: whether passes over evaluation data come between those of training.
        units: of a sharded model.
    """
    on_cpu = hardware.device.type == "cpu"
    most_tokens = TOKENS_PER_PASS_ON_CPU if on_cpu else ALL
    if wants_balance(model.config):
        say(BALANCE)
    if reason := why_general(model, hardware.device.type):
        say(f"Using general kernels (slower, more memory): {reason}.")
        return _general_engine(config, model, hardware, most_tokens)
    if on_cpu:
        elementwise_library()  # compiled before the first step, not within it
    decoder = TrainingDecoder(
        model,
        hardware.dtype,
        member,
        dropout=0.0 if config.method == "full" else config.lora_dropout,
        int8_units=config.quantization_bit == 8 and multiplies_int8(hardware.device),
        units=units,
    )
    sizes = config.per_device_train_batch_size, config.per_device_eval_batch_size
    tokens, evaluated = (max(longest, most_tokens) if on_cpu else longest * size for size in sizes)
    most, free = (tokens, longest), free_bytes(hardware.device)
    decoder.recompute = _layers_to_recompute(config, model, decoder, most, evaluated * evaluates, free)
    if on_cpu:
        tokens = _tokens_that_fit(config, model, decoder, longest, tokens)
        most_tokens, decoder.most_tokens = min(most_tokens, tokens), tokens

    def release(tokens: int) -> None:
        decoder.workspace.clear()
        decoder.most_tokens = min(decoder.most_tokens, tokens)

    def recompute_all() -> bool:
        before, decoder.recompute = decoder.recompute, len(decoder.mlps)
        return before < decoder.recompute

    return Engine(
        loss=decoder.loss,
        add_gradients=decoder.add_gradients,
        most_tokens=most_tokens,
        release=release,
        recompute_all=recompute_all,
        shares=decoder.shares(longest) and not decoder.dropout,
        loss_shares=decoder.shares(longest),
        in_step=units is not None,
    )


def _tokens_that_fit(
    config: TrainConfig, model: PreTrainedModel, decoder: TrainingDecoder, longest: int, tokens: int
) -> int:
    """Tokens of a pass for which there is memory on a CPU, where asking too late means to be killed; a UserError where
    the longest sample does not fit."""
    free = free_bytes(decoder.embedding.device, swap=True)
    training = sum(trained_bytes(config, model.parameters()))
    needed = decoder.pass_bytes(tokens, longest)
    if free is None or needed <= free - training:
        return tokens
    fitting = int(tokens * max(0, free - training) / needed)
    if fitting < longest:
        raise UserError(
            f"training needs more memory than the {free / 1e9:.2f} GB that are free: gradients and optimizer states "
            f"{training / 1e9:.2f} GB, a pass of the longest sample ({longest:,} tokens) about "
            f"{decoder.pass_bytes(longest, longest) / 1e9:.2f} GB",
            fix=f"Set max_seq_length to {fitting:,} or less, or {LEANER}"
            if fitting
            else f"{LEANER[0].upper()}{LEANER[1:]}",
        )
    say(f"Memory: {free / 1e9:.2f} GB are free, so passes have at most {fitting:,} tokens instead of {tokens:,}.")
    return fitting


def trained_bytes(config: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Bytes of what is trained, which are those of its gradients too, and of the optimizer's states."""
    trained = [local(parameter) for parameter in parameters if parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return size, optimizer_bytes(config.optim, sum(parameter.numel() for parameter in trained))


def _layers_to_recompute(
    config: TrainConfig,
    model: PreTrainedModel,
    decoder: TrainingDecoder,
    most: tuple[int, int],
    evaluated: int,
    free: int | None,
) -> int:
    """All, none, or as many as the free memory requires next to gradients and optimizer states yet to be made; reports
    why, where the settings leave that open.

    Args:
        most: tokens of a pass, and of the longest sample.
        evaluated: tokens of a pass over evaluation data; 0 without.
        free: bytes; None where the device does not say.
    """

    def held(recompute: int) -> int:
        return decoder.pass_bytes(*most, recompute, evaluated)

    room = None if free is None else BUFFERS_OF_FREE * (free - sum(trained_bytes(config, model.parameters())))
    count = layers_to_recompute(config.gradient_checkpointing, len(decoder.mlps), held, room)
    if free is not None and count and config.gradient_checkpointing is not True:
        say(
            f"Memory: {free / 1e9:.1f} GB are free; {count} of {len(decoder.mlps)} layers are recomputed in the "
            f"backward pass, as keeping all of a pass of {most[0]:,} tokens would take {held(0) / 1e9:.1f} GB."
        )
    return count


def _general_engine(config: TrainConfig, model: PreTrainedModel, hardware: Hardware, most_tokens: int) -> Engine:
    """The model's own modules and autograd; fp32 weights that are trained in full multiply in the hardware's dtype."""
    mixed = (config.method == "full" or bool(config.modules_to_save)) and hardware.dtype != torch.float32
    with torch.autocast(hardware.device.type, hardware.dtype, enabled=mixed):
        ways = try_ways(model, tolerance=1e-3 if hardware.dtype == torch.float32 else 0.1)
    if ways.one_by_one:
        say(f"Samples are processed one by one: {ways.one_by_one}.")
    elif hardware.device.type != "cpu":
        most_tokens = PACKED_ON_GPU
    if config.gradient_checkpointing is True:
        model.activation_checkpointing_enable({"use_reentrant": False})

    def parts(batch: Batch) -> Iterable[Batch]:
        return batch.trained_samples() if ways.one_by_one else [batch]

    def part_loss(part: Batch) -> torch.Tensor:
        with torch.autocast(hardware.device.type, hardware.dtype, enabled=mixed):
            return summed_loss(model, part, plain_head=ways.plain_head)

    @torch.no_grad()
    def loss(batch: Batch) -> torch.Tensor:
        return sum(map(part_loss, parts(batch)), torch.zeros((), device=batch.token_ids.device))

    def add_gradients(batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=batch.token_ids.device)
        for part in parts(batch):  # one graph at a time
            value = part_loss(part)
            (value * scale).backward()
            total += value.detach()
        return total

    def recompute_all() -> bool:
        if model.is_activation_checkpointing or not model.supports_gradient_checkpointing:
            return False
        model.activation_checkpointing_enable({"use_reentrant": False})
        return True

    return Engine(loss, add_gradients, most_tokens, lambda _: None, recompute_all)
