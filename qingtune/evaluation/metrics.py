"""Metrics of answers, each as sums over rows, so that a resampled data set's value takes no text.

Corpus metrics (loss, BLEU, chrF, length ratio) are ratios of sums over the rows and not means of the rows' own values.
Metrics of text see an answer without its thinking (`<think>...</think>` at its start), and without white space around.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

if TYPE_CHECKING:
    from numpy.typing import NDArray

# From this share of Chinese characters on, BLEU's usual tokenizer would leave whole sentences as one token.
CHINESE_FROM = 0.1

_HAN = regex.compile(r"\p{Han}")
_TOKEN = regex.compile(r"\p{Han}|[[\p{Letter}\p{Number}]--\p{Han}]+", regex.V1)


@dataclass(frozen=True)
class Outcome:
    """What a model made of a row.

    Attributes:
        loss: summed over the row's trained tokens, in nats.
        trained_tokens: how many those are; 0 where the row has no reference.
        answer: the text; None where none was generated.
        ended: whether the model ended it by itself.
        reference: the text to compare with; None where the row has none.
        form: each rule that the row gives, and whether the answer keeps it.
    """

    loss: float = 0.0
    trained_tokens: int = 0
    answer: str | None = None
    ended: bool = False
    reference: str | None = None
    form: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A metric of a data set.

    Attributes:
        name: as shown.
        rows: fp64 [R, K], what each row adds.
        value: sums over rows [K] -> the metric.
        digits: after the point, where it is shown.
        additive: whether the value of other rows follows from their sums; if not, no interval can be given.
    """

    name: str
    rows: NDArray[np.float64]
    value: Callable[[NDArray[np.float64]], float]
    digits: int = 2
    additive: bool = True

    @property
    def total(self) -> float:
        """The value over all rows."""
        return self.value(self.rows.sum(0))


def metrics_of(outcomes: Sequence[Outcome]) -> list[Metric]:
    """All metrics for which there are rows, in the order in which they are shown."""
    scored = [one for one in outcomes if one.trained_tokens]
    answered = [one for one in outcomes if one.answer is not None]
    pairs = [(one.answer, one.reference) for one in answered if one.answer is not None and one.reference is not None]
    found: list[Metric] = []
    if scored:
        sums = np.array([[one.loss, one.trained_tokens] for one in scored], dtype=np.float64)
        found += [
            Metric("loss", sums, _ratio, digits=4),
            Metric("perplexity", sums, lambda sums: math.exp(min(_ratio(sums), 700.0)), digits=3),
        ]
    if pairs:
        found += _against_references(pairs)
    if answered:
        texts = [one.answer or "" for one in answered]
        found += [_distinct(texts, 1), _distinct(texts, 2), _share("ended by itself %", [a.ended for a in answered])]
        found += _forms([one.form for one in answered if one.form])
    return found


def signatures(references: Sequence[str]) -> dict[str, str]:
    """How sacrebleu computes BLEU and chrF on these references, in its own words."""
    metrics = _sacrebleu(is_chinese(references))
    for metric in metrics.values():
        metric.corpus_score(["x"], [["x"]])  # its signature names the number of references
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def is_chinese(texts: Iterable[str]) -> bool:
    """Whether enough characters are Chinese for BLEU to take them one by one."""
    characters = "".join("".join(text.split()) for text in texts)
    return len(_HAN.findall(characters)) >= CHINESE_FROM * max(1, len(characters))


def _against_references(pairs: Sequence[tuple[str, str]]) -> list[Metric]:
    answers, references = [answer for answer, _ in pairs], [reference for _, reference in pairs]
    found = [_share("exact match %", [answer == reference for answer, reference in pairs])]
    for name, metric in _sacrebleu(is_chinese(references)).items():
        rows = np.array(metric._extract_corpus_statistics(answers, [references]), dtype=np.float64)
        found.append(Metric(name, rows, _score_of(metric)))
    scores = np.array([rouge(answer, reference) for answer, reference in pairs])
    found += [_mean(name, 100 * scores[:, place]) for place, name in enumerate(("ROUGE-1", "ROUGE-2", "ROUGE-L"))]
    lengths = np.array([[len(answer), len(reference)] for answer, reference in pairs], dtype=np.float64)
    return [*found, Metric("length ratio", lengths, _ratio, digits=3)]


def _forms(forms: Sequence[dict[str, bool]]) -> list[Metric]:
    """The share of answers that keep each rule, among the rows that give it, and the share that keep all of theirs."""
    rules = list(dict.fromkeys(rule for form in forms for rule in form))
    found = [_share(f"form: {rule} %", [form[rule] for form in forms if rule in form]) for rule in rules]
    return [*found, _share("form: all %", [all(form.values()) for form in forms])] if rules else []


# --- ROUGE and distinct-n --------------------------------------------------------------------------------------------


def tokens_of(text: str) -> list[str]:
    """A Chinese character each, else words of letters and digits, lower-cased; punctuation and emoji are left out."""
    return _TOKEN.findall(text.lower())


def rouge(answer: str, reference: str) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L between 0 and 1, as F1 (Lin 2004, https://aclanthology.org/W04-1013).

    Without stemming; a Chinese character is a token. ROUGE-L takes the text as one sequence. Where one side has no
    n-gram the score is 0.
    """
    a, b = tokens_of(answer), tokens_of(reference)
    one, two = (_f1(sum((_ngrams(a, n) & _ngrams(b, n)).values()), len(a) - n + 1, len(b) - n + 1) for n in (1, 2))
    return one, two, _f1(longest_common_subsequence(a, b), len(a), len(b))


def _f1(common: int, in_answer: int, in_reference: int) -> float:
    """2PR / (P + R) for P = common / in_answer and R = common / in_reference."""
    return 2 * common / (in_answer + in_reference) if common else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, by bits of whole numbers (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").

    Bit i of `free` is 0 where the prefix b[:i + 1] has a longer subsequence in common with a than b[:i].
    """
    places: dict[str, int] = {}
    for place, token in enumerate(b):
        places[token] = places.get(token, 0) | 1 << place
    everything = (1 << len(b)) - 1
    free = everything
    for token in a:
        met = free & places.get(token, 0)
        free = ((free + met) | (free - met)) & everything
    return len(b) - free.bit_count()


def _distinct(texts: Sequence[str], n: int) -> Metric:
    """distinct-n: different n-grams of all answers together / all of them (Li et al. 2016, arXiv:1510.03055).

    Resampling repeats rows, and a repeated row adds no different n-gram, so that an interval would lie too low.
    """
    ngrams = Counter[tuple[str, ...]]()
    for text in texts:
        ngrams.update(_ngrams(tokens_of(text), n))
    rows = np.array([[len(ngrams), sum(ngrams.values())]], dtype=np.float64)
    return Metric(f"distinct-{n}", rows, _ratio, digits=3, additive=False)


# --- sacrebleu -------------------------------------------------------------------------------------------------------


def _sacrebleu(chinese: bool) -> dict[str, Any]:
    """Its metrics. Rows' counts are taken as its own resampling takes them; it has no other door to them."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"BLEU": BLEU(tokenize="zh" if chinese else "13a", force=True), "chrF": CHRF()}


def _score_of(metric: Any) -> Callable[[NDArray[np.float64]], float]:
    return lambda sums: float(metric._compute_score_from_stats([round(count) for count in sums.tolist()]).score)


def _ratio(sums: NDArray[np.float64]) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _mean(name: str, values: Sequence[float] | NDArray[np.float64], digits: int = 2) -> Metric:
    values = np.asarray(values, dtype=np.float64)
    return Metric(name, np.stack([values, np.ones_like(values)], 1), _ratio, digits)


def _share(name: str, hits: Sequence[bool]) -> Metric:
    return _mean(name, [100.0 * hit for hit in hits], digits=1)
