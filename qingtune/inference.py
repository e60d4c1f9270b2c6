"""The recipe of inference: load base and adapter, then answer a prompt, a file of prompts, bundled samples, or chat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qingtune.adapters.files import WEIGHTS as ADAPTER_WEIGHTS
from qingtune.adapters.files import read_adapter_config
from qingtune.answer_file import AnswerFile, Question, answer_file, answer_questions, refuse_finished, with_seed
from qingtune.answering import load_decoder
from qingtune.chat import chat
from qingtune.chat_session import ChatSession
from qingtune.command_config import InferConfig, ModelSettings
from qingtune.config import DEFAULT_MODEL
from qingtune.data.format import Message
from qingtune.data.prompts import rows_with_prompts
from qingtune.data.rules import rules_of
from qingtune.data.tokenize import Template, prompt_ids
from qingtune.data.tokenizer_calls import encode
from qingtune.errors import UserError
from qingtune.files import refuse_same_file, sha256_of
from qingtune.generation import Answer, Decoder, Decoding, generate
from qingtune.hardware import choose_hardware, free_bytes
from qingtune.kernels.cached_decoder import CachedDecoder
from qingtune.models.config_file import read_generation_config
from qingtune.models.load import load_template, local_folder
from qingtune.models.source import context_length, find_model, fingerprint
from qingtune.output import give, say
from qingtune.quiet import quieten
from qingtune.record import Record, read_record
from qingtune.weights_file import read_header

BUNDLED_SHOWN = 3
DEFAULT_CONTEXT = 2048  # tokens, where a model's configuration does not say
SLOTS = 16  # prompts of a file answered at a time
CACHE_OF_FREE = 0.8  # share of the free memory that keys and values may take; products need the rest for a moment
# A tokenizer that needs more tokens than this for a Chinese character was hardly trained on Chinese.
TOKENS_PER_CHINESE_CHARACTER = 1.3


@dataclass(frozen=True)
class Speaker:
    """A model to answer, whose weights are read when they are first needed.

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
            raise UserError(
                "the prompt has no tokens, and an answer needs at least one before it", fix="Write a prompt."
            )
        room = self.context_length - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, the model reads {self.context_length:,}", fix="Shorten it."
            )
        return replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))


def infer(config: InferConfig) -> None:
    """Answer what the settings ask for; text goes to stdout, everything else to stderr.

    Raises:
        UserError: anything that the user can mend.
    """
    quieten()
    check_bits(config)
    _check_question(config)
    if config.prompt_file and not Path(config.prompt_file).is_file():
        raise UserError("there is no such file", where=config.prompt_file, fix="Check --prompt_file.")
    if config.output_file:
        models = [Path(name) for name in (config.base_model, config.lora_model) if name and Path(name).is_dir()]
        inputs = {"the prompt file": [Path(config.prompt_file)] if config.prompt_file else []}
        inputs["a file of the model"] = [path for folder in models for path in folder.iterdir()]
        refuse_same_file(Path(config.output_file), "output_file", inputs)
    if config.output_file and not config.overwrite_output_file:
        refuse_finished(Path(config.output_file))  # before seconds go into loading
    questions = list(rows_with_prompts(config.prompt_file, rules_of(config))) if config.prompt_file else []
    speaker = load_speaker(config, slots=min(SLOTS, max(1, len(questions))))
    if config.chat:
        session = ChatSession(speaker.template, speaker.context_length, speaker.system_prompt)
        chat(speaker.continue_from, session, speaker.decoding)
    elif config.prompt is not None:
        _stream(speaker.answer((Message("user", config.prompt),)), speaker.decoding.max_new_tokens)
    elif config.prompt_file:
        _answer_file(speaker, questions, config)
    else:
        _answer_bundled(speaker)


def _check_question(config: InferConfig) -> None:
    """Refuse two kinds of questions, of which one would be ignored, and a file for answers that go to stdout."""
    given = {"chat": config.chat, "prompt": config.prompt is not None, "prompt_file": bool(config.prompt_file)}
    if len(asked := [name for name, is_given in given.items() if is_given]) > 1:
        raise UserError(f"{' and '.join(asked)} are both given", fix="Choose one.")
    if config.output_file and not config.prompt_file:
        raise UserError(
            "output_file is for the answers to a prompt_file", fix="Pass --prompt_file, or redirect stdout: > FILE"
        )


def check_bits(config: InferConfig) -> None:
    """Refuse to hold a model in 4 and in 8 bits."""
    if config.load_in_4bit and config.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit are both given", fix="Choose one.")


# --- Loading ---------------------------------------------------------------------------------------------------------


def find_base(config: ModelSettings, adapter: Path | None) -> tuple[Path, Record | None]:
    """The base model's folder and the record of the adapter, or of the base if it came out of full training.

    Raises:
        UserError: not found, or the adapter was trained on other weights.
    """
    record = read_record(adapter) if adapter else None
    name = config.base_model
    if name is None and adapter:
        name = record.base_model if record else read_adapter_config(adapter).get("base_model_name_or_path")
    try:
        source = find_model(name or DEFAULT_MODEL, config.cache_dir, config.hub)
    except UserError as error:
        if adapter is None or config.base_model is not None:
            raise
        what = f"its base model is not to be found: {error.where or name}: {error.what}"
        raise UserError(what, where=str(adapter), fix="Name it as --base_model.") from error
    folder = local_folder(source, config.cache_dir, say)
    if adapter is None:
        return folder, read_record(folder)
    if record is None:
        say("The adapter brings no record of its base (it was not written by qingtune); only shapes are checked.")
    elif record.base_fingerprint != fingerprint(folder):
        problem = UserError(
            f"the adapter was trained on other weights than this base ({record.base_model})",
            where=str(adapter),
            fix="Name that model as --base_model, or pass --allow_other_base.",
        )
        if not config.allow_other_base:
            raise problem
        say(f"Warning: {problem.what}.")
    return folder, record


def load_speaker(config: InferConfig, slots: int = 1) -> Speaker:
    """Load what the settings name, to answer so many prompts at a time.

    Raises:
        UserError: something is missing, broken, or does not fit.
    """
    speaker = prepare_speaker(config, slots)
    _ = speaker.decoder
    return speaker


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
        load=lambda: load_decoder(base, adapter, bits, hardware, config.cache_dir, slots, say),
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
    own, default = read_generation_config(folder), Decoding()
    chosen: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        flag, of_model = getattr(config, name), own.get(name)
        chosen[name] = flag if flag is not None else of_model if of_model is not None else getattr(default, name)
    return Decoding(max_new_tokens=config.max_new_tokens, seed=config.seed, **chosen)


# --- Answering -------------------------------------------------------------------------------------------------------


def _stream(answer: Answer, max_new_tokens: int) -> None:
    """Print an answer as it is made, then its speed, and what cut it off."""
    began = time.perf_counter()
    for piece in answer:
        give(piece, end="")
    give("")
    seconds = time.perf_counter() - began
    limit = "max_new_tokens" if len(answer.tokens) >= max_new_tokens else "the end of the model's context"
    cut = "" if answer.ended else f", cut at {limit}"
    say(f"[{len(answer.tokens)} tokens, {len(answer.tokens) / seconds:.1f} tok/s{cut}]")


def _answer_file(speaker: Speaker, rows: list[tuple[dict[str, Any], Any]], config: InferConfig) -> None:
    """Answer every row of a file; rows get draws of their own."""
    assert config.prompt_file
    questions: list[Question] = []
    for number, (values, prompt) in enumerate(rows):
        ids = speaker.ids(prompt)
        try:
            decoding = speaker.within_context(ids, with_seed(speaker.decoding, number))
        except UserError as error:
            raise UserError(error.what, where=f"{config.prompt_file}, prompt {number + 1}", fix=error.fix) from None
        questions.append(Question(values, ids, decoding))
    _fit_slots(speaker.decoder, questions, config.prompt_file)
    identity = {**speaker.identity, "prompt_file": sha256_of(Path(config.prompt_file))}
    output = Path(config.output_file) if config.output_file else None
    file = AnswerFile(output, identity, overwrite=config.overwrite_output_file)
    answer_file(
        file,
        len(questions),
        lambda done: answer_questions(speaker.decoder, speaker.template, questions[done:]),
        say,
    )
    file.finish()


def _fit_slots(decoder: Decoder, questions: Sequence[Question], prompt_file: str) -> None:
    """Have as many slots as there is memory for, each with room for the longest prompt and answer; tells if fewer.

    Raises:
        UserError: there is none for a single one.
    """
    free = free_bytes(decoder.device) if isinstance(decoder, CachedDecoder) else None
    if not isinstance(decoder, CachedDecoder) or free is None or not questions:
        return  # the model's own modules hold one sequence, as it grows
    lengths = [len(question.ids) + question.decoding.max_new_tokens for question in questions]
    longest = max(range(len(questions)), key=lengths.__getitem__)
    needed, room = decoder.slot_bytes(lengths[longest]), int(CACHE_OF_FREE * free)
    slots = min(decoder.slots, room // needed)
    if not slots:
        prompt = len(questions[longest].ids)
        fitting = lengths[longest] * room // needed
        short = f"--max_new_tokens {fitting - prompt} or less"
        shorter = short if fitting > prompt else f"prompts of less than {fitting:,} tokens"
        raise UserError(
            f"keys and values of the prompt's {prompt:,} tokens and of up to {lengths[longest] - prompt:,} of its "
            f"answer take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free",
            where=f"{prompt_file}, prompt {longest + 1}",
            fix=f"Use {shorter}, or --load_in_8bit or --load_in_4bit, with which the model takes less.",
        )
    if slots < decoder.slots:
        say(
            f"Memory: {slots} instead of {decoder.slots} prompts at a time, as keys and values of {lengths[longest]:,} "
            f"tokens take {needed / 1e9:.2f} GB each and {free / 1e9:.2f} GB are free."
        )
    decoder.make_slots(slots, lengths[longest])


def _answer_bundled(speaker: Speaker) -> None:
    """Answer a few held-out samples, in Chinese if the model's tokenizer was made for it."""
    text = "店铺信息：草莓蛋糕，营业时间"
    ids = encode(speaker.template.tokenizer, text)
    chinese = len(ids) / len(text) < TOKENS_PER_CHINESE_CHARACTER
    say(f"No prompt given: answering {BUNDLED_SHOWN} bundled samples ({'Chinese' if chinese else 'English'}).")
    for _, prompt in bundled_prompts(chinese=chinese):
        give(f"\n{prompt[-1].content}\n---")
        _stream(speaker.answer(prompt), speaker.decoding.max_new_tokens)


def bundled_prompts(*, chinese: bool) -> Iterable[tuple[dict[str, Any], Sequence[Message]]]:
    """The first bundled held-out rows, with their prompts."""
    path = str(bundled_heldout(chinese=chinese))
    for _, (values, prompt) in zip(range(BUNDLED_SHOWN), rows_with_prompts(path), strict=False):
        assert not isinstance(prompt, str)
        yield values, prompt


def bundled_heldout(*, chinese: bool) -> Path:
    """The bundled samples that no bundled configuration trains on."""
    return bundled_data() / ("store_xhs_heldout.jsonl" if chinese else "store_posts_en_heldout.jsonl")


def bundled_data() -> Path:
    """The folder of bundled samples: data/ of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent
    checkout = package.parent / "data"
    return checkout if (checkout / "store_xhs_heldout.jsonl").exists() else package / "bundled"


def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits of every place of a prompt, fp32 [T, V] on the CPU."""
    with torch.inference_mode():
        device = next(model.parameters()).device
        return model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()
