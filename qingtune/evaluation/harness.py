"""Tasks of lm-evaluation-harness, an optional extra, on a model in the prompts of its training.

The harness makes the prompts and judges; texts are scored and continued by the same decoder that answers users. A
thinking model's thinking is taken out of its answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from qingtune.answering.generate import Decoding, decode_answer, generate_many
from qingtune.answering.score import score
from qingtune.answering.speaker import Speaker
from qingtune.answering.thinking import split_thinking
from qingtune.data.format import Message
from qingtune.data.tokenize import prompt_text
from qingtune.errors import UserError
from qingtune.output.console import say

Tasks = dict[str, dict[str, dict[str, float | None]]]
TELL_EVERY = 50  # requests


def find_tasks(names: Sequence[str]) -> list[str | dict[str, Any]]:
    """Tasks, groups and tags by their names, and .yaml files as what they say.

    Raises:
        UserError: names what there is not.
    """
    manager = TaskManager()
    found: list[str | dict[str, Any]] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise UserError("there is no such file", where=name, fix="Check --lm_eval.")
            found.append(load_yaml(name, resolve_func=True))
        elif matching := manager.match_tasks([name]):
            found += matching
        else:
            raise UserError(
                f'lm-evaluation-harness has no task "{name}"',
                fix="`lm_eval ls tasks` lists them; or name a .yaml file.",
            )
    return found


def run_tasks(speaker: Speaker, names: Sequence[str], limit: int | None) -> Tasks:
    """Have the harness judge a model.

    Args:
        names: tasks, as `find_tasks` takes them.
        limit: rows of each task; None for all.

    Returns:
        task -> metric -> {"value": ..., "error": standard error or None}.
    """
    report = simple_evaluate(
        model=HarnessModel(speaker),
        tasks=find_tasks(names),
        limit=limit,
        apply_chat_template=not speaker.plain,
        log_samples=False,
    )
    return {task: _metrics(values) for task, values in report["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's keys are `metric,filter` and `metric_stderr,filter`; a filter named none is none."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        found[name] = {"value": float(value), "error": float(error) if isinstance(error, int | float) else None}
    return found


class HarnessModel(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """A speaker as the harness knows models."""

    def __init__(self, speaker: Speaker) -> None:
        super().__init__()
        self.speaker = speaker
        self.template, self.max_length = speaker.template, speaker.context_length
        self.tokenizer = speaker.template.tokenizer

    @property
    def eot_token_id(self) -> int:
        """Ends an answer."""
        return self.template.end_of_turn

    @property
    def prefix_token_id(self) -> int:
        """Stands before texts without a beginning, as in the harness's own models."""
        beginning: Any = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else beginning

    @property
    def tokenizer_name(self) -> str:
        """What the harness distinguishes its cached prompts by."""
        text = f"{self.tokenizer.name_or_path} {self.tokenizer.chat_template} {self.speaker.system_prompt}"
        return f"qingtune-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as the text of a prompt, with the system message of training; or with an answer's beginning.

        The template's control tokens are sealed in it, so that a task's own text can hold none.
        """
        messages = [Message(_role(turn["role"]), turn["content"]) for turn in chat_history]
        if self.speaker.system_prompt is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self.speaker.system_prompt))
        if add_generation_prompt:
            return self.template.encoder.seal(prompt_text(self.template, messages))
        return self.template.encoder.seal(prompt_text(self.template, messages[:-1])) + messages[-1].content

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text; a chat template has written special tokens already."""
        encoder = self.template.encoder
        at_start = self.speaker.plain and add_special_tokens is not False
        return encoder.plain_ids(string) if at_start else encoder.sealed_ids(string)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log of each text's likelihood, in windows as long as the context."""
        found: list[float] = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)  # the first window begins with the prefix
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return found

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, the beginning of which is dropped if both are too long."""
        found: list[tuple[float, bool]] = []
        for number, (_, context, continuation) in enumerate(requests, 1):
            ids = [*context, *continuation][-self.max_length :]
            first = len(ids) - len(continuation)
            if first < 1:
                raise UserError(
                    f"a task's text has {len(continuation):,} tokens, but the model's context is {self.max_length:,}",
                    fix="Remove that task.",
                )
            of_it = score(self.speaker.decoder, ids, range(first - 1, len(ids) - 1))
            found.append((-of_it.loss, of_it.greedy))
            if number % TELL_EVERY == 0:
                say(f"{number} texts scored")
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop texts."""
        asked = [self._asked(*request.args) for request in requests]
        prompts, decodings = [ids for ids, _, _ in asked], [decoding for _, decoding, _ in asked]
        found = [""] * len(asked)
        stop_ids, decoder = self.template.stop_ids, self.speaker.decoder
        for done, (number, tokens) in enumerate(generate_many(decoder, prompts, decodings, stop_ids), 1):
            found[number] = _cut(decode_answer(self.template, tokens), asked[number][2])
            if done % TELL_EVERY == 0:
                say(f"{done} of {len(asked)} answers")
        return found

    def _asked(self, context: str, settings: dict[str, Any]) -> tuple[list[int], Decoding, list[str]]:
        """Ids of a prompt, how to answer, and the texts that end the answer."""
        wanted: dict[str, Any] = normalize_gen_kwargs(settings)
        most = min(int(wanted["max_gen_toks"]), self.max_length - 1)
        ids = self.tok_encode(context)[-(self.max_length - most) :]
        decoding = Decoding(
            max_new_tokens=most,
            temperature=float(wanted.get("temperature", 1)) if wanted["do_sample"] else 0,
            top_p=float(wanted.get("top_p", 1)),
            top_k=int(wanted.get("top_k", 0)),
        )
        return ids, decoding, [text for text in wanted["until"] if text]


def _role(name: str) -> Any:
    if name not in ("system", "user", "assistant"):
        raise UserError(f'a task has turns with the role "{name}", which the model was not trained on')
    return name


def _cut(text: str, stops: Sequence[str]) -> str:
    answer = split_thinking(text)[1]
    return min((answer.partition(stop)[0] for stop in stops), key=len, default=answer)
