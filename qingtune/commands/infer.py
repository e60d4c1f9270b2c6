"""The recipe of inference: load base and adapter, then answer a prompt, a file of prompts, bundled samples, or chat."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qingtune.answering.answer_file import (
    SLOTS,
    AnswerFile,
    Question,
    answer_file,
    answer_questions,
    refuse_finished,
    with_seed,
)
from qingtune.answering.chat.session import ChatSession
from qingtune.answering.chat.talk import chat
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.generate import Answer, Decoder
from qingtune.answering.speaker import Speaker, check_bits, prepare_speaker
from qingtune.config.commands import InferConfig
from qingtune.data.format import Message, prompt_of
from qingtune.data.prompts import BUNDLED_SHOWN, bundled_rows, rows_with_prompts
from qingtune.data.rules import rules_of
from qingtune.data.tokenizer_calls import encode
from qingtune.errors import UserError
from qingtune.files.digests import sha256_of
from qingtune.files.paths import refuse_same_file
from qingtune.kernels.device import free_bytes
from qingtune.output.console import give, say
from qingtune.output.quiet import quieten

CACHE_OF_FREE = 0.8  # share of the free memory that keys and values may take; products need the rest for a moment
# A tokenizer that needs more tokens than this for a Chinese character was hardly trained on Chinese.
TOKENS_PER_CHINESE_CHARACTER = 1.3


def infer(config: InferConfig) -> None:
    """Answer what the settings ask for; text goes to stdout, everything else to stderr.

    Raises:
        UserError: any error that the user can fix.
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
    speaker = prepare_speaker(config, slots=min(SLOTS, max(1, len(questions))))
    _ = speaker.decoder  # read the weights before anything is asked
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
        raise UserError("output_file needs prompt_file", fix="Pass --prompt_file, or redirect stdout: > FILE")


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
    )
    file.finish()


def _fit_slots(decoder: Decoder, questions: Sequence[Question], prompt_file: str) -> None:
    """Make as many slots as memory allows, each with room for the longest prompt and answer; reports if fewer."""
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
    for row in bundled_rows(chinese=chinese):
        prompt = prompt_of(row)
        give(f"\n{prompt[-1].content}\n---")
        _stream(speaker.answer(prompt), speaker.decoding.max_new_tokens)
