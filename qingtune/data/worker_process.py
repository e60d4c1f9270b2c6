"""The process in which strangers' templates and tokenizers work: it runs no code, ends in time and keeps to its memory.

Run as a script by data/worker.py, with nothing of this package; its arguments are its work, `templates` or `tokenizer`,
and the most seconds that a few texts may take. Prints `ready`; then replies to each line, a JSON object, with another.

- templates: `template`, `variables` and `conversations`, each of these with its `messages` and `texts`, pairs of how
  many messages to render and whether the prompt of an answer follows. The reply is a list with an object for each
  conversation: its `texts`, each as the number of characters that it shares with the text before it and the rest, and
  an `error` where a text failed, after which no more are rendered.
- tokenizer: `tokenizer`, what a tokenizer.json holds, to which the reply is `{}`; then `texts` and
  `add_special_tokens`. The reply is `encoded`, pairs of ids and of which of them were put around the text; or `error`.

What takes too long ends the process; what takes too much memory is an error. The environment of templates offers what
Transformers offers them, so that both render the same.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from itertools import accumulate
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

BYTES = {"templates": 1 << 30, "tokenizer": 4 << 30}
MOST_LETTERS = 1 << 20  # that a template may write in addition to the messages, of which it may write each letter ...
MOST_COPIES = 8  # ... this many times
TIMED = 16  # texts of a conversation that are timed together, as starting the clock takes as long as rendering one


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks answers, renders what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call that returns its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no names with an underscore in front, through which Python's insides could be reached."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute."""
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"{name} cannot be set")
        super().__setitem__(name, value)


def _namespace(**attributes: Any) -> _Namespace:
    space = _Namespace()
    for name, value in attributes.items():
        space[name] = value
    return space


class _Dict:
    """`dict`, without the ways that lead from a class into Python's insides."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        """A dict."""
        return dict(*pairs, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """A dict with one value for all keys."""
        return dict.fromkeys(*arguments)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions = {
        "raise_exception": _fail,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _namespace,
        "dict": _Dict(),
    }
    environment.globals.update(functions)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return environment.from_string(template)


def _shared(before: str, text: str) -> int:
    """Characters that two texts begin with in common."""
    if text.startswith(before):
        return len(before)
    least, most = 0, min(len(before), len(text))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if before[least:middle] == text[least:middle] else (least, middle - 1)
    return least


def _render(request: dict[str, Any], messages: list[dict[str, str]], said: int, prompt: bool) -> str:
    text = _compile(request["template"]).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **request["variables"]
    )
    if len(text) > MOST_LETTERS + MOST_COPIES * said:
        raise jinja2.TemplateError(f"it writes {len(text):,} characters for a conversation of {said:,}")
    return text


def _clock(times: int = 1) -> None:
    """End the process if what follows takes longer than allowed; starting again stops the clock before."""
    faulthandler.dump_traceback_later(times * float(sys.argv[2]), exit=True)


def _texts(request: dict[str, Any], conversation: dict[str, Any]) -> dict[str, Any]:
    """The texts of a conversation, up to the first that fails."""
    texts: list[tuple[int, str]] = []
    before = ""
    messages = conversation["messages"]
    said = [0, *accumulate(sum(map(len, message.values())) for message in messages)]
    try:
        for number, (count, prompt) in enumerate(conversation["texts"]):
            if number % TIMED == 0:
                _clock()
            text = _render(request, messages[:count], said[count], prompt)
            shared = _shared(before, text)
            texts.append((shared, text[shared:]))
            before = text
    except MemoryError:
        return {"texts": texts, "error": f"it takes more than {BYTES['templates'] / 1e9:.0f} GB of memory"}
    except Exception as error:  # whatever a template does wrong is reported to the user as such
        return {"texts": texts, "error": str(error)[:1000] or type(error).__name__}
    return {"texts": texts}


def _render_all(request: dict[str, Any]) -> list[dict[str, Any]]:
    return [_texts(request, conversation) for conversation in request["conversations"]]


def _tokenizer() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What answers for a tokenizer, which its first request brings."""
    from tokenizers import Tokenizer

    tokenizer: Any = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal tokenizer
        try:
            if "tokenizer" in request:
                _clock(6)
                tokenizer = Tokenizer.from_str(request["tokenizer"])
                tokenizer.no_truncation()
                tokenizer.no_padding()
                return {}
            encoded: list[tuple[list[int], list[int]]] = []
            for text in request["texts"]:
                _clock()
                whole = tokenizer.encode(text, add_special_tokens=request["add_special_tokens"])
                encoded.append((whole.ids, whole.special_tokens_mask))
            return {"encoded": encoded}
        except BaseException as error:  # a panic of the library's, which is no Exception
            return {"error": str(error)[:500] or type(error).__name__}

    return answer


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)  # a lower limit cannot be raised, and need not be
        limit = BYTES[sys.argv[1]] if most == resource.RLIM_INFINITY else min(BYTES[sys.argv[1]], most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answer = _render_all if sys.argv[1] == "templates" else _tokenizer()
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        reply = answer(json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
