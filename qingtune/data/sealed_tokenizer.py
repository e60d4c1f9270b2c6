"""A copy of a tokenizer that knows its control tokens by names that no text can hold, and by these alone."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from qingtune.data.tokenizer_calls import ConfinedTokenizer, encode, panics_as_errors
from qingtune.data.tokenizer_limits import has_foreign_patterns
from qingtune.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SECRET = str(secrets.randbits(64))  # that nobody can guess; digits, which templates that change case leave alone
NAME = re.compile(f"\U00100000{SECRET}:([0-9]+)\U00100001")
_PROBES = ("a", " x ", "Is it 12,345?  Yes!\n\n\tdéjà 你好 🥖")


def name_of(number: int) -> str:
    """By which a copy knows a control token."""
    return f"\U00100000{SECRET}:{number}\U00100001"


class SealedTokenizer:
    """The copy.

    Args:
        copy: with names in place of the control tokens' texts.
        confined: the same in a process with limits, where the tokenizer needs one.
        control_ids: of the control tokens, as the tokenizer knows them.
        unknown: the id of the token for unknown text, which any text may give.
    """

    def __init__(
        self, copy: Tokenizer, confined: ConfinedTokenizer | None, control_ids: set[int], unknown: int | None
    ) -> None:
        self._copy, self._confined = copy, confined
        self._real = {copy.token_to_id(name_of(number)): number for number in control_ids}
        self._counted = control_ids - {unknown}

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; with `add_special_tokens` between what the tokenizer puts around a text by itself.

        Raises:
            UserError: other control tokens would come of it than it names.
        """
        if self._confined:
            ((found, around),) = self._confined.encode([text], add_special_tokens=add_special_tokens)
        else:
            with panics_as_errors():
                whole = self._copy.encode(text, add_special_tokens=add_special_tokens)
            found, around = whole.ids, whole.special_tokens_mask
        ids = [self._real.get(number, number) for number in found]
        inner = [number for number, added in zip(ids, around, strict=True) if not added]
        named = [int(number) for number in NAME.findall(text)]
        if [n for n in inner if n in self._counted] != [n for n in named if n in self._counted]:
            raise UserError("it does not produce the control tokens that its chat template writes")
        return ids


def sealed_copy(tokenizer: PreTrainedTokenizerBase, control_ids: Mapping[str, int]) -> SealedTokenizer | None:
    """A copy of a tokenizer, by the ids of its control tokens; None where it would read other text otherwise.

    There is none of a tokenizer that is written in Python.
    """
    if not tokenizer.is_fast:
        return None
    from tokenizers import Tokenizer

    content = json.loads(cast("Any", tokenizer).backend_tokenizer.to_str())
    _rename(content, {text: name_of(number) for text, number in control_ids.items()})
    text = json.dumps(content)
    try:
        copy = Tokenizer.from_str(text)
    except Exception:  # the library's own class is Exception itself; a merge needs a control token's text, for one
        return None
    named = [name_of(number) for number in control_ids.values()]
    if any(copy.token_to_id(name) is None for name in named):
        return None
    confined = ConfinedTokenizer(text) if has_foreign_patterns(content) else None
    sealed = SealedTokenizer(copy, confined, set(control_ids.values()), cast("int | None", tokenizer.unk_token_id))
    written = tuple("".join(f"{text}a {text}\n" for text in texts) for texts in (control_ids, named))
    alike = all(
        encode(tokenizer, theirs, add_special_tokens=around) == sealed.ids(ours, add_special_tokens=around)
        for theirs, ours in (*zip(_PROBES, _PROBES, strict=True), written)
        for around in (False, True)
    )
    return sealed if alike else None


def _rename(content: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give control tokens other texts in what tokenizer.json holds."""
    content["truncation"] = content["padding"] = None
    for token in content["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's, of pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        for text in names.keys() & vocabulary.keys():
            vocabulary[names[text]] = vocabulary.pop(text)
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
