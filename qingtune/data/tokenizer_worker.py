"""The process in which tokenizers work that might never end on a text: it ends in time and keeps to its memory.

Run as a script by data/confined_tokenizer.py, with nothing of this package; its argument is the most seconds that a
text may take. Prints `ready`; reads a line `{"tokenizer": ...}` with what a tokenizer.json holds, then a JSON object a
line (`texts`, `add_special_tokens`); replies to each with a line `{"encoded": [[ids, added], ...]}`, where `added` says
of each id whether it was put around the text, or with `{"error": ...}`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
from typing import Any

BYTES = 4 << 30


def _answer(tokenizer: Any, request: dict[str, Any], nowhere: Any) -> tuple[Any, dict[str, Any]]:
    from tokenizers import Tokenizer

    try:
        if "tokenizer" in request:
            faulthandler.dump_traceback_later(6 * float(sys.argv[1]), exit=True, file=nowhere)
            tokenizer = Tokenizer.from_str(request["tokenizer"])
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer, {}
        encoded: list[tuple[list[int], list[int]]] = []
        for text in request["texts"]:
            faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True, file=nowhere)
            whole = tokenizer.encode(text, add_special_tokens=request["add_special_tokens"])
            encoded.append((whole.ids, whole.special_tokens_mask))
        return tokenizer, {"encoded": encoded}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's, which is no Exception
        return tokenizer, {"error": str(error)[:500] or type(error).__name__}
    finally:
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)  # a lower limit cannot be raised, and need not be
        limit = BYTES if most == resource.RLIM_INFINITY else min(BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    tokenizer: Any = None
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin.buffer:
            tokenizer, answer = _answer(tokenizer, json.loads(line), nowhere)
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
