"""Answers to the first evaluation rows, written at each evaluation of a run, so that one can read what it learns.

An observer: nothing is drawn at random, and weights, their gradients and the mode of the model stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qingtune.answering.generate import Decoding, decode_answer, generate
from qingtune.answering.load import ModulesDecoder
from qingtune.data.tokenize import Sample, Template
from qingtune.data.tokenizer_calls import decode
from qingtune.training.events import Evaluated, Event, LinesFile

MOST_TOKENS = 256  # of an answer
REPETITION_PENALTY = 1.1  # without one, the likeliest tokens of a small model soon repeat a line to the end


@dataclass(frozen=True)
class SampleAnswers:
    """Writes answers at each evaluation.

    Attributes:
        file: of the lines.
        model: as it is trained, with its adapters.
        template: of the run.
        samples: their last answer is generated again; samples without a prompt, such as plain text, are skipped.
        longest: tokens that prompt and answer may take together; None where the model does not say.
        mixed: the dtype to compute in, for weights that are trained in fp32; None for the weights' own.
    """

    file: LinesFile
    model: Any
    template: Template
    samples: Sequence[Sample]
    longest: int | None
    mixed: torch.dtype | None

    def __call__(self, event: Event) -> None:
        """Answer, if this is an evaluation."""
        if not isinstance(event, Evaluated):
            return
        training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        try:
            with torch.autocast(device.type, self.mixed, enabled=self.mixed not in (None, torch.float32)):
                for prompt, reference in filter(None, map(split_last_answer, self.samples)):
                    self.file.add({"step": event.step, **self._answered(prompt, reference)})
        finally:
            self.model.train(training)

    def _answered(self, prompt: list[int], reference: list[int]) -> dict[str, Any]:
        """A line; the prompt with the template's own tokens, as the model sees it."""
        room = MOST_TOKENS if self.longest is None else min(MOST_TOKENS, self.longest - len(prompt))
        # The reference came after the prompt, so there is room for at least one token.
        decoding = Decoding(max_new_tokens=room, temperature=0, repetition_penalty=REPETITION_PENALTY)
        # A new decoder: one continues from a prompt that begins alike, and the weights have changed since.
        tokens = list(generate(ModulesDecoder(self.model), prompt, decoding, self.template.stop_ids))
        return {
            "prompt": decode(self.template.tokenizer, prompt),
            "reference": decode_answer(self.template, reference),
            "answer": decode_answer(self.template, tokens),
        }


def split_last_answer(sample: Sample) -> tuple[list[int], list[int]] | None:
    """Ids before the last trained part of a sample, and those of that part; None if nothing comes before it."""
    trained = np.flatnonzero(sample.trained)
    if not len(trained):
        return None
    end = int(trained[-1]) + 1
    start = int(np.flatnonzero(~sample.trained[:end])[-1]) + 1 if not sample.trained[:end].all() else 0
    ids: list[int] = sample.token_ids.tolist()
    return (ids[:start], ids[start:end]) if start else None
