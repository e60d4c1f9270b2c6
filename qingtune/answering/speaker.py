"""A model to answer: base, adapter, prompts as in training, and the settings of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qingtune.adapters.base_of import find_base
from qingtune.adapters.peft_files import WEIGHTS as ADAPTER_WEIGHTS
from qingtune.adapters.peft_files import read_adapter_config
from qingtune.answering.generate import Answer, Decoder, Decoding, generate
from qingtune.answering.load import load_decoder
from qingtune.config.commands import EvaluateConfig, InferConfig
from qingtune.data.format import Message
from qingtune.data.tokenize import Template, prompt_ids
from qingtune.errors import UserError
from qingtune.files.digests import sha256_of
from qingtune.files.weights_file import read_header
from qingtune.kernels.device import choose_hardware
from qingtune.models.config_file import read_generation_config
from qingtune.models.find import context_length, fingerprint
from qingtune.models.load import load_template
from qingtune.output.console import say

DEFAULT_CONTEXT = 2048  # tokens, where a model's configuration does not say


@dataclass(frozen=True)
class Speaker:
    """A model that answers; its weights are read when they are first needed.

    Attributes:
        load: reads base and adapter.
        template: makes prompts as in training.
        decoding: the settings.
        system_prompt: put before prompts that have none; None for none.
        plain: whether training was on plain text, so that prompts are.
        context_length: tokens that prompt and answer may take together.
        identity: what decides the answers, as JSON values.
        base: the base model's folder.
    """

    load: Callable[[], Decoder]
    template: Template
    decoding: Decoding
    system_prompt: str | None
    plain: bool
    context_length: int
    identity: dict[str, Any]
    base: Path

    @cached_property
    def decoder(self) -> Decoder:
        """Base and adapter."""
        return self.load()

    def ids(self, prompt: Sequence[Message] | str) -> list[int]:
        """A prompt as it was in training."""
        messages = prompt
        if not isinstance(prompt, str) and self.plain:
            messages = prompt[-1].content
        elif not isinstance(prompt, str) and self.system_prompt is not None and prompt[0].role != "system":
            messages = (Message("system", self.system_prompt), *prompt)
        return prompt_ids(self.template, messages)

    def answer(self, prompt: Sequence[Message] | str) -> Answer:
        """Start an answer; iterate it for the text."""
        return self.continue_from(self.ids(prompt), self.decoding)

    def continue_from(self, ids: Sequence[int], decoding: Decoding) -> Answer:
        """Start an answer to a prompt given as ids.

        Raises:
            UserError: the prompt leaves no room in the model's context.
        """
        decoding = self.within_context(ids, decoding)
        return Answer(self.template, generate(self.decoder, ids, decoding, self.template.stop_ids))

    def within_context(self, ids: Sequence[int], decoding: Decoding) -> Decoding:
        """The settings for an answer that ends where the model's context does.

        Raises:
            UserError: the prompt leaves no room for one, or is empty.
        """
        if not ids:
            raise UserError("the prompt has no tokens", fix="Write a prompt.")
        room = self.context_length - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, but the model's context is {self.context_length:,}",
                fix="Shorten it.",
            )
        return replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))


def check_bits(config: InferConfig | EvaluateConfig) -> None:
    """Refuse to hold a model in 4 and in 8 bits."""
    if config.load_in_4bit and config.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit are both given", fix="Choose one.")


def prepare_speaker(config: InferConfig, slots: int = 1) -> Speaker:
    """Find and check all but the weights of what the settings name.

    Raises:
        UserError: something is missing, broken, or does not fit.
    """
    adapter = Path(config.lora_model) if config.lora_model else None
    if adapter:
        read_adapter_config(adapter)
        read_header(adapter / ADAPTER_WEIGHTS)
    base, record = find_base(config, adapter)
    hardware = choose_hardware()
    say(f"Device: {hardware.reason}.")
    bits = 4 if config.load_in_4bit else 8 if config.load_in_8bit else None
    template = load_template(base, adapter, record.stop_ids if record else None)
    system = config.system_prompt if config.system_prompt is not None else record.system_prompt if record else None
    decoding = choose_decoding(config, base)
    return Speaker(
        load=lambda: load_decoder(base, adapter, bits, hardware, config.cache_dir, slots),
        template=template,
        decoding=decoding,
        system_prompt=system,
        plain=record is not None and record.prompt_style == "plain",
        context_length=context_length(base) or DEFAULT_CONTEXT,
        identity={
            "base model": fingerprint(base),
            "adapter": adapter and sha256_of(adapter / ADAPTER_WEIGHTS),
            "bits": bits,
            "system_prompt": system,
            "decoding": asdict(decoding),
        },
        base=base,
    )


def choose_decoding(config: InferConfig, folder: Path) -> Decoding:
    """The decoding settings: the flags, else the model's own generation_config.json, else the defaults."""
    chosen: dict[str, Any] = {}
    for given in (read_generation_config(folder), config.model_dump()):
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        chosen |= {name: given[name] for name in names if given.get(name) is not None}
    return Decoding(max_new_tokens=config.max_new_tokens, seed=config.seed, **chosen)
