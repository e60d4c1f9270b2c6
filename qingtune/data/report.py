"""The report on training and evaluation data: what became of the rows, how long samples are, what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qingtune.data.read import Places
from qingtune.data.tokenize import Sample, Tokenized
from qingtune.data.tokenizer_calls import decode
from qingtune.output.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 24  # of the histogram of lengths
SHOWN = 5  # places named of each kind


@dataclass(frozen=True)
class Summary:
    """Samples in numbers: what is trained and what is not.

    Attributes:
        rows: that were tokenised.
        faults: rows that the template cannot express.
        lengths: percentiles of the samples' lengths, in tokens: p50, p90, p99, longest.
        histogram: how many samples are of which length, as (longest length, samples) of each bin.
        first_too_long: where the first rows stand that were dropped for their length.
    """

    rows: int
    faults: int
    samples: int
    tokens: int
    trained_tokens: int
    too_long: int
    untrained: int
    truncated: int
    split_conversations: int
    lengths: dict[str, int]
    histogram: list[tuple[int, int]]
    first_too_long: list[str]


@dataclass(frozen=True)
class SetReport:
    """The report on training or evaluation data.

    Attributes:
        formats: what rows each file holds; nothing for rows held out of the training data.
        ignored_columns: of each file the fields that are not used, and how many rows hold something in them.
        rows_read: in the files.
        rows: what became of these rows, or of those held out for evaluation: the numbers of those used, refused, ...,
            which add up to all.
        faults: rows that were refused; of reasons how many for each, of first_faults where the first stand and why.
        placeholders: rows with placeholders of a template that were left unfilled.
    """

    summary: Summary
    formats: dict[str, str]
    ignored_columns: dict[str, dict[str, int]]
    rows_read: int
    rows: dict[str, int]
    faults: int
    reasons: dict[str, int]
    first_faults: list[str]
    placeholders: Places


@dataclass(frozen=True)
class DataReport:
    """Report on the data: each set, how many evaluation samples are trained on, and an example."""

    training: SetReport
    evaluation: SetReport | None
    evaluated_and_trained: int
    example: str


def summarize(rows: int, tokenized: Tokenized) -> Summary:
    """Count what `rows` conversations became; there is at least one sample."""
    lengths = np.array([len(sample.token_ids) for sample in tokenized.samples])
    half, most, nearly_all, longest = (int(np.percentile(lengths, share)) for share in (50, 90, 99, 100))
    counts, edges = np.histogram(lengths, bins=min(BINS, longest), range=(0, longest))
    return Summary(
        rows=rows,
        faults=len(tokenized.faults),
        samples=len(tokenized.samples),
        tokens=int(lengths.sum()),
        trained_tokens=sum(sample.trained_tokens for sample in tokenized.samples),
        too_long=len(tokenized.too_long),
        untrained=len(tokenized.untrained),
        truncated=tokenized.truncated,
        split_conversations=tokenized.split_conversations,
        lengths={"p50": half, "p90": most, "p99": nearly_all, "longest": longest},
        histogram=[(round(edge), count) for edge, count in zip(edges[1:].tolist(), counts.tolist(), strict=True)],
        first_too_long=tokenized.too_long[:SHOWN],
    )


def describe(name: str, summary: Summary) -> list[str]:
    """A summary as a few lines."""
    lengths = ", ".join(f"{place} {length:,}" for place, length in summary.lengths.items())
    lines = [
        f"{name}: {counted(summary.samples, 'sample')} of {summary.tokens:,} tokens, "
        f"{summary.trained_tokens:,} of them trained ({summary.trained_tokens / summary.tokens:.0%}); length {lengths}",
    ]
    if summary.truncated:
        cut = counted(summary.truncated, "sample")
        lines.append(f"{name}: {cut} cut at the end, which does not teach the model to stop")
    if summary.split_conversations:
        lines.append(
            f"{name}: {summary.split_conversations:,} conversations trained turn by turn, "
            "as the template writes earlier turns otherwise once later ones follow"
        )
    if summary.too_long:
        more = " ..." * (summary.too_long > len(summary.first_too_long))
        lines.append(f"{name}: too long: {', '.join(summary.first_too_long)}{more}")
    return lines


def show_example(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """A sample as text, its trained parts between >>> and <<<."""
    parts: list[str] = []
    edges = np.flatnonzero(np.diff(sample.trained.astype(np.int8))) + 1
    for ids, trained in zip(np.split(sample.token_ids, edges), np.split(sample.trained, edges), strict=True):
        text = decode(tokenizer, ids.tolist())
        parts.append(f">>>{text}<<<" if trained[0] else text)
    return "".join(parts)
