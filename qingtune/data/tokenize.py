"""Conversation -> token ids and trained mask, with the model's own chat template.

The prompt of a turn is rendered and tokenised by `prompt_ids`, which inference uses too. A sample is that prompt's ids
followed by the answer's: training sees, token for token, what inference will give the model. Nothing is searched for in
text; where a template does not keep to this shape, the row is refused or the conversation is split.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from qingtune.data.control_tokens import find_control_tokens
from qingtune.data.encoder import Encoder, PartedTexts, PartIds, unveil
from qingtune.data.format import Conversation, Message
from qingtune.data.read import Fault
from qingtune.data.templates import Rendered, Request, TemplateError, Turn, render_texts
from qingtune.data.tokenizer_calls import encode
from qingtune.errors import UserError, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# For models that bring no chat template: turns as headed paragraphs, an answer closed by the end-of-text token.
# What the tokenizer puts before every text comes first.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}### Assistant:\n{{ message.content }}{{ eos_token }}\n\n"
    "{% else %}### {{ message.role | capitalize }}:\n{{ message.content }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
ROWS_AT_ONCE, LETTERS_AT_ONCE = 256, 1 << 19  # rendered and encoded together
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids (int32, [T]) and which of them are trained (bool, [T]): True where the loss predicts that token."""

    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    origin: str

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss; the first token is never predicted."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class Template:
    """A tokenizer with its chat template, and what closes an assistant's turn.

    Attributes:
        tokenizer: with its chat template.
        encoder: makes ids of text; no control token comes of what users and rows say.
        end_of_turn: id of the token that ends an answer; always trained.
        appended: whether the template does not write that token itself, so that it is put after the answer.
        stop_ids: ids at which generation stops.
        notices: what the user should know about the template.
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    end_of_turn: int
    appended: bool
    stop_ids: frozenset[int]
    notices: tuple[str, ...] = ()


def make_template(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], rows: int | None = None) -> Template:
    """Find out how the tokenizer's chat template ends an assistant's turn.

    Args:
        tokenizer: gets PLAIN_TEMPLATE if it has no chat template.
        stop_ids: the ids at which the model's own configuration stops generating.
        rows: of the model's embedding; None where no model is asked.

    Raises:
        UserError: the template cannot be used, or there is no token to end a turn with.
    """
    notices: list[str] = []
    opening, closing = _put_around_texts(tokenizer)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _written(tokenizer, opening) + PLAIN_TEMPLATE
        notices.append("The model has no chat template; a plain one is used and saved with the result.")
    named: Any = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        names = ", ".join(sorted(map(str, named)))
        raise UserError(
            f"the model's chat templates are for {shorten(names)}, and none of them is the default",
            fix="Name the one for chats default in its tokenizer_config.json.",
        )
    eos = cast("int | None", tokenizer.eos_token_id)
    last = closing[-1] if eos is None and closing else eos
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        prompt, whole = _render(tokenizer, probe[:1], True), _render(tokenizer, probe, False)
        other = _render(tokenizer, [{"role": "user", "content": "c"}], True)
    except TemplateError as error:
        raise UserError(
            f"the model's chat template fails: {error}", fix="Use a model with a working template."
        ) from None
    if prompt == other:
        raise UserError(
            "the model's chat template does not write the user's text", fix="Use a model with a working template."
        )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {*special, *tokenizer.all_special_ids, *stop_ids}
    special.discard(cast("int", tokenizer.unk_token_id))  # any character may be that
    after = [token for token in encode(tokenizer, whole.removeprefix(prompt)) if token in special]
    if not after and last is None:
        raise UserError("the model's tokenizer has no token that can end an answer")
    end = after[-1] if after else cast("int", last)
    name = cast("str", tokenizer.convert_ids_to_tokens(end))
    if not after:
        notices.append(f"The chat template does not end the assistant's turn; {name} is added after each answer.")
    elif stop_ids and end not in stop_ids:
        notices.append(
            f"The template ends a turn with {name}, but this model does not stop there: it looks like a base model, "
            "which never learned that token. LoRA leaves embeddings as they are and may not teach it to stop; "
            "prefer the Instruct model or full training."
        )
    stops: frozenset[int] = frozenset({*stop_ids, end, *([] if eos is None else [eos])})
    control = find_control_tokens(tokenizer, lambda turns, ask: _render(tokenizer, turns, ask), stops)
    encoder = Encoder(tokenizer, control, closing, rows)
    encoder.known([end])
    return Template(tokenizer, encoder, end, not after, stops, tuple(notices))


def _put_around_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text by itself."""
    inner, whole = encode(tokenizer, "a"), encode(tokenizer, "a", add_special_tokens=True)
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    raise UserError("the model's tokenizer splits a text differently when it adds its own tokens")


def _written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as a chat template writes them."""
    texts = cast("list[str]", tokenizer.convert_ids_to_tokens(list(ids)))
    bos = tokenizer.bos_token
    return "".join("{{ bos_token }}" if text == bos else "{{ " + json.dumps(text) + " }}" for text in texts)


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    (rendered,) = _render_texts(tokenizer, [(turns, [(len(turns), add_generation_prompt)])])
    return rendered.only_text()


def _render_texts(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> list[Rendered]:
    """Texts of veiled conversations; what a template says of one is shown to users, so without marks."""
    found = render_texts(tokenizer.get_chat_template(), tokenizer.special_tokens_map, requests)
    return [replace(one, error=one.error and shorten(unveil(one.error), 300)) for one in found]


def prompt_ids(template: Template, messages: Sequence[Message] | str) -> list[int]:
    """The ids that stand before an answer, in training and at inference alike.

    Args:
        messages: the turns so far, the last one not the assistant's; or plain text, for models trained on plain text.

    Raises:
        TemplateError: the chat template refuses the messages.
        UserError: a content holds a control token's text, and this tokenizer cannot read that as text.
    """
    if isinstance(messages, str):
        return template.encoder.plain_ids(messages)
    return template.encoder.ids(prompt_text(template, messages))


def prompt_text(template: Template, messages: Sequence[Message]) -> str:
    """What `prompt_ids` makes ids of, by the template's encoder."""
    return _render(template.tokenizer, template.encoder.veil(messages), True)


class _TemplateFault(Exception):
    """A row that the template cannot express."""


@dataclass
class Tokenized:
    """Samples of a data set, and what became of the rows.

    Attributes:
        too_long, untrained: where samples were dropped; a row may have several.
        rows_used: rows with a sample that is kept.
        rows_too_long, rows_untrained: rows without one, as the samples are too long or have no trained token.
    """

    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    truncated: int = 0
    split_conversations: int = 0
    rows_used: int = 0
    rows_too_long: int = 0
    rows_untrained: int = 0


def tokenize(template: Template, conversations: Sequence[Conversation], max_seq_length: int, on_long: str) -> Tokenized:
    """Turn conversations into samples.

    Args:
        max_seq_length: the longest sample, in tokens.
        on_long: "drop", "truncate" or "raise".

    Raises:
        UserError: on_long is "raise" and a sample is longer.
    """
    result = Tokenized()
    for samples in _samples_of_rows(template, conversations):
        if isinstance(samples, Fault):
            result.faults.append(samples)
            continue
        result.split_conversations += len(samples) > 1
        kept, dropped = len(result.samples), len(result.too_long)
        for sample in samples:
            _keep(sample, max_seq_length, on_long, result)
        if len(result.samples) > kept:
            result.rows_used += 1
        elif len(result.too_long) > dropped:
            result.rows_too_long += 1
        else:
            result.rows_untrained += 1
    return result


def _keep(sample: Sample, max_seq_length: int, on_long: str, result: Tokenized) -> None:
    if len(sample.token_ids) > max_seq_length:
        if on_long == "raise":
            raise UserError(
                f"{len(sample.token_ids):,} tokens, over max_seq_length {max_seq_length:,}",
                where=sample.origin,
                fix="Raise max_seq_length, or pass --on_long drop or --on_long truncate.",
            )
        if on_long == "drop":
            result.too_long.append(sample.origin)
            return
        result.truncated += 1
        sample = Sample(sample.token_ids[:max_seq_length], sample.trained[:max_seq_length], sample.origin)
    if sample.trained_tokens:
        result.samples.append(sample)
    else:
        result.untrained.append(sample.origin)


# --- Conversations, many at a time -----------------------------------------------------------------------------------


def _samples_of_rows(template: Template, conversations: Sequence[Conversation]) -> Iterator[list[Sample] | Fault]:
    """Yield the samples of each row, or its fault; the next rows are rendered while these are encoded."""
    encoder = template.encoder
    for batch in _one_ahead(lambda rows: _prepare(template, rows), _batches(conversations)):
        encoded = PartIds(encoder, (part for _, row in batch if isinstance(row, PartedTexts) for part in row.parts()))
        plain_ids = iter(encoder.plain_encoded([row for _, row in batch if isinstance(row, str)]))
        for origin, row in batch:
            if isinstance(row, PartedTexts):
                yield _samples(template, origin, row, encoded)
            elif isinstance(row, str):
                ids = array("i", [*next(plain_ids), template.end_of_turn])
                yield [_sample(ids, [(0, len(ids))], origin)]
            else:
                yield row


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Conversations in order, as many at a time as are encoded together."""
    batch: list[Conversation] = []
    letters = 0
    for row in conversations:
        batch.append(row)
        letters += sum(map(len, row.texts))
        if len(batch) == ROWS_AT_ONCE or letters > LETTERS_AT_ONCE:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _one_ahead(work: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """Yield what `work` makes of each item, while a thread makes that of the next one."""
    with ThreadPoolExecutor(1) as thread:
        made = (thread.submit(work, item) for item in items)
        for one, _ in pairwise(chain(made, [None])):
            assert one is not None
            yield one.result()


def _prepare(template: Template, rows: Sequence[Conversation]) -> list[tuple[str, PartedTexts | str | Fault]]:
    """The origins of rows, each with its rendered texts, its plain text, or its fault."""
    encoder = template.encoder
    checked = [_control_token_in(encoder, row) or row for row in rows]
    chats = [row.messages for row in checked if isinstance(row, Conversation) and row.text is None]
    rendered = _render_texts(template.tokenizer, [(encoder.veil(turns), _asked(turns)) for turns in chats])
    texts = (PartedTexts(encoder, one) for one in rendered)
    return [
        (row.origin, row if isinstance(row, Fault) else next(texts) if row.text is None else row.text)
        for row in checked
    ]


def _control_token_in(encoder: Encoder, row: Conversation) -> Fault | None:
    """The fault of a row whose trained text holds a control token: a turn within a turn, nearly always by mistake."""
    if row.text is not None:
        found = encoder.control_token_in(row.text)
    else:
        answers = (message.content for message in row.messages if message.role == "assistant")
        found = next(filter(None, (encoder.control_token_in(answer, answer=True) for answer in answers)), None)
    return Fault(row.origin, f"holds {found}, which is a control token of this model") if found else None


def _asked(messages: Sequence[Message]) -> list[tuple[int, bool]]:
    """The texts to render: of each answer its prompt, and both together."""
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    return [(place + more, not more) for place in answers for more in (0, 1)]


# --- A conversation --------------------------------------------------------------------------------------------------


def _samples(template: Template, origin: str, texts: PartedTexts, encoded: PartIds) -> list[Sample] | Fault:
    """The samples of a row, or its fault."""
    try:
        whole = _one_sample(template, origin, texts, encoded)
        return [whole] if whole else _sample_per_turn(template, origin, texts, encoded)
    except _TemplateFault as fault:
        return Fault(origin, str(fault))
    except TemplateError as error:
        return Fault(origin, f"the chat template refuses it: {error}")
    except UserError as error:
        return Fault(origin, error.what)


def _one_sample(template: Template, origin: str, texts: PartedTexts, encoded: PartIds) -> Sample | None:
    """All turns in one sample; None if the template writes earlier turns otherwise once later ones follow."""
    ids = array("i")
    spans: list[tuple[int, int]] = []
    for before, answer, trained in _answers(template, texts, encoded):
        if before[: len(ids)] != ids:
            return None
        spans.append((len(before), len(before) + trained))
        ids = before + answer
    return _sample(ids[: spans[-1][1]], spans, origin)


def _sample_per_turn(template: Template, origin: str, texts: PartedTexts, encoded: PartIds) -> list[Sample]:
    """A sample for each answer, each with the prompt that inference would show for it."""
    return [
        _sample(before + answer[:trained], [(len(before), len(before) + trained)], origin)
        for before, answer, trained in _answers(template, texts, encoded)
    ]


def _answers(template: Template, texts: PartedTexts, encoded: PartIds) -> Iterator[tuple[array[int], array[int], int]]:
    """Of each assistant's turn the ids of its prompt, as `prompt_ids` gives them, its own, and how many are trained."""
    written = texts.ids(encoded)
    for (_, before), (added, ids) in zip(written, written, strict=True):
        yield before, *_answer_ids(template, before, added, ids)


def _answer_ids(template: Template, before: array[int], added: str | None, ids: array[int]) -> tuple[array[int], int]:
    """Ids of an assistant's turn after its prompt, and how many of them, up to the end of turn, are trained.

    They are those of the text in one go, unless the two melt into one token at the seam: alone, an answer would get a
    additional space from a SentencePiece tokenizer.
    """
    if added is None:
        raise _TemplateFault("the chat template does not write the answer directly after its prompt")
    continues = ids[: len(before)] == before
    answer = ids[len(before) :] if continues else array("i", template.encoder.ids(added))
    if template.appended:
        answer.append(template.end_of_turn)
        return answer, len(answer)
    if template.end_of_turn not in answer:
        raise _TemplateFault("the chat template does not end the assistant's turn")
    return answer, len(answer) - answer[::-1].index(template.end_of_turn)


def _sample(ids: array[int], spans: Sequence[tuple[int, int]], origin: str) -> Sample:
    trained = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        trained[start:end] = True
    return Sample(np.array(ids, dtype=np.int32), trained, origin)
