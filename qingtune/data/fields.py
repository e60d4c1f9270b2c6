"""What fields of rows mean for training: those whose meaning would be lost, by the kind of data they belong to.

A row that holds such a field is refused with the kind named, unless its value asks for nothing (an empty list of tools,
a weight of 1). Fields that are not listed here and not read by a format are reported as not used, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

PREFERENCE = "preference data (DPO, ORPO, reward models: better and worse answers)"
LABELLED = "preference data (KTO: answers labelled as good or bad)"
MULTIMODAL = "multimodal data (images, audio, video)"
TOOLS = "tool-calling data"
WEIGHTED = "data with weights or masks for rows or turns"
REASONING = "data with reasoning in a separate field"
PARTIAL = "data with partial answers (prefix, partial)"
PROMPT_PART = "data with a part of the prompt in a field that this format does not have"
CLASSIFICATION = "classification data (texts with labels)"
TOKENISED = "tokenised data (token ids instead of texts)"
TURNS = "data with one turn of a conversation in each row"
EMBEDDING = "embedding data (pairs of texts that match or do not)"
CHOICES = "multiple-choice data"
PROMPTS = "reinforcement-learning data (prompts without answers)"

# Kinds that tell of a whole file what it is, even where its rows are of no known form.
OF_WHOLE_FILES = frozenset(
    {PREFERENCE, LABELLED, MULTIMODAL, TOOLS, CLASSIFICATION, TURNS, EMBEDDING, CHOICES, PROMPTS}
)  # fmt: skip
# Kinds that concern what the model is asked; the others concern the answer that is trained.
OF_PROMPTS = frozenset({MULTIMODAL, TOOLS, PROMPT_PART, PARTIAL})


class RowError(Exception):
    """A row that does not hold what its format needs, or holds what cannot be trained on; says why."""

    kind = sign = ""


class Refusal(RowError):
    """A row of a kind of data that cannot be trained on, and the sign of that."""

    def __init__(self, kind: str, sign: str) -> None:
        super().__init__(f"{kind} is not supported ({sign})")
        self.kind, self.sign = kind, sign


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing, in the ways in which files write that; Parquet and CSV have their own."""
    if isinstance(value, int):
        return False
    waiting = [value]  # and no call of a call: lists may be nested as deep as Python reads them
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += cast("list[Any]", item)
        elif isinstance(item, str):
            if item.strip() not in _EMPTY_TEXTS:
                return False
        elif not (item is None or item == {} or item != item):  # not a number
            return False
    return True


def _is_one_or_true(value: Any) -> bool:
    return is_empty(value) or str(value).strip().lower() in ("true", "1", "1.0")


def _is_zero_or_false(value: Any) -> bool:
    return is_empty(value) or str(value).strip().lower() in ("false", "0", "0.0")


def _is_no_mark(value: Any) -> bool:
    """A label that is neither good nor bad, such as the name of a topic."""
    return str(value).strip().lower() not in ("true", "false", "0", "1", "0.0", "1.0", "-1")


def _is_no_role(value: Any) -> bool:
    """Whether a role is not one of a conversation, such as a profession."""
    return str(value).strip().lower() not in ("user", "human", "prompter", "assistant", "gpt", "bot", "model", "system")


_EMPTY_TEXTS = frozenset({"", "[]", "{}", "null", "None", "none", "nan", "NaN"})
_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        PREFERENCE,
        is_empty,
        "chosen rejected chosen_response rejected_response prompt_chosen prompt_rejected preferred_output "
        "non_preferred_output positive_messages rejected_messages negative_messages response_j response_k "
        "response_chosen response_rejected chosen_messages preference",
    ),
    (LABELLED, _is_no_mark, "label kto_tag kto_label"),
    (LABELLED, _is_one_or_true, "is_correct"),
    (
        MULTIMODAL,
        is_empty,
        "image images image_path image_paths image_url image_urls audio audios audio_path audio_paths audio_url "
        "video videos video_path video_paths video_url attachments",
    ),
    (TOOLS, is_empty, "tools functions tool_calls function_call available_tools"),
    (WEIGHTED, _is_one_or_true, "weight loss_weight sample_weight loss_scale loss train trainable"),
    (WEIGHTED, is_empty, "loss_mask mask train_detail training_detail"),
    (WEIGHTED, _is_zero_or_false, "masked"),
    (
        REASONING,
        is_empty,
        "reasoning reasoning_content thinking thought thoughts cot complex_cot chain_of_thought rationale",
    ),
    (PARTIAL, _is_zero_or_false, "prefix partial"),
    (PROMPT_PART, is_empty, "system system_prompt history context contexts document documents"),
)
FIELDS = {name: (kind, harmless) for kind, harmless, names in _KINDS for name in names.split()}
# A label next to a text, or without any known field, is the answer itself.
_LABELS: dict[str, tuple[str, Callable[[Any], bool]]] = dict.fromkeys(
    ("label", "labels", "label_text", "class"), (CLASSIFICATION, is_empty)
) | {"role": (TURNS, _is_no_role)}
# Columns that identify files with rows of no known form.
_SIGNS = {
    EMBEDDING: ("query pos", "query positive", "anchor positive", "sentence1 sentence2", "query passage"),
    CHOICES: ("question choices", "question options", "question A B"),
    PROMPTS: ("prompt ground_truth", "prompt reward_model", "prompt solution"),
}
_ORDER = tuple(dict.fromkeys([*(kind for kind, _, _ in _KINDS), CLASSIFICATION, TURNS]))
ANSWER_FIELDS = frozenset(name for name, (kind, _) in FIELDS.items() if kind not in OF_PROMPTS)
_MEDIA_PARTS = ("image", "audio", "video", "file")
_TOOL_ROLES = frozenset(["function", "function_call", "function_response", "tool_call", "tool_calls", "tool_response"])


def lost_meaning(values: Mapping[str, Any], read: Collection[str], *, labels_answer: bool = False) -> Refusal | None:
    """The first kind of data whose meaning would be lost if only the named fields of a row or turn were read.

    Args:
        read: the fields that are read.
        labels_answer: whether a label of any value is what the row would teach, as next to plain text.
    """
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        known = FIELDS.get(name.lower())
        if labels_answer and (not isinstance(value, bool) or "text" in values):
            known = _LABELS.get(name.lower(), known)
        if known is not None and name not in read and not known[1](value):
            found.setdefault(known[0], []).append(name)
    if not found:
        return None
    kind = min(found, key=_ORDER.index)
    return Refusal(kind, ", ".join(f'"{name}"' for name in found[kind]))


def kind_of_file(values: Mapping[str, Any]) -> Refusal | None:
    """What a row of no known form shows about its file; None if nothing is known."""
    if "input_ids" in values:
        return Refusal(TOKENISED, '"input_ids"')
    refusal = lost_meaning(values, (), labels_answer=True)
    if refusal is not None and refusal.kind in OF_WHOLE_FILES:
        return refusal
    for kind, columns in ((kind, sign.split()) for kind, signs in _SIGNS.items() for sign in signs):
        if values.keys() >= set(columns):
            return Refusal(kind, ", ".join(f'"{column}"' for column in columns))
    return Refusal(PROMPTS, 'only "prompt"') if list(values) == ["prompt"] else None


def lost_in_turn(turn: Mapping[str, Any], role: object, content: object) -> Refusal | None:
    """The same for the parts of a turn: its role, and content in parts that are not text."""
    if str(role) in _TOOL_ROLES:
        return Refusal(TOOLS, f'role "{role}"')
    for part in content if isinstance(content, list) else ():
        name = str(part.get("type")) if isinstance(part, dict) else ""
        if any(media in name for media in _MEDIA_PARTS):
            return Refusal(MULTIMODAL, f'a part of type "{name[:40]}"')
    return lost_meaning(turn, ()) if len(turn) > 2 else None  # more than a role and a content
