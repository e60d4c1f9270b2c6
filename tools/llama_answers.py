"""What a real llama.cpp makes of a GGUF file. Run by check_export.py with another Python, in which llama-cpp-python is.

Reads a JSON object from stdin: `gguf`, `prompts` (lists of ids), `texts`, `chats` (lists of messages), `new_tokens`,
`threads` and `folder`, into which each prompt's logits go as `N.npy`, fp32 [T, V]. Writes a JSON object to stdout:
`answers` (ids, greedy), `ended` (whether each stopped by itself), `ids` of the texts, and for each chat `replies`, text
and reason of its end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

F32 = 0  # ggml's number for it: the cache is to add no rounding of its own


def main() -> None:
    """Answer one request."""
    request: dict[str, Any] = json.load(sys.stdin)
    longest = max(len(ids) for ids in request["prompts"]) + request["new_tokens"] + 1
    model: Any = llama_cpp.Llama(
        request["gguf"], n_ctx=max(512, longest), n_threads=request["threads"], logits_all=True, verbose=False,
        type_k=F32, type_v=F32,
    )  # fmt: skip
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    answers: list[list[int]] = []
    ended: list[bool] = []
    for number, ids in enumerate(request["prompts"]):
        model.reset()
        model.eval(ids)
        np.save(Path(request["folder"]) / f"{number}.npy", model.scores[: len(ids)])
        answer: list[int] = []
        while len(answer) < request["new_tokens"]:
            answer.append(int(model.scores[len(ids) + len(answer) - 1].argmax()))
            if llama_cpp.llama_vocab_is_eog(vocab, answer[-1]):
                break
            model.eval(answer[-1:])
        answers.append(answer)
        ended.append(bool(llama_cpp.llama_vocab_is_eog(vocab, answer[-1])))
    ids_of_texts = [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]
    replies: list[tuple[str, str]] = []
    for messages in request["chats"]:
        (choice,) = model.create_chat_completion(messages, temperature=0, repeat_penalty=1, max_tokens=200)["choices"]
        replies.append((choice["message"]["content"], choice["finish_reason"]))
    print(json.dumps({"answers": answers, "ended": ended, "ids": ids_of_texts, "replies": replies}))


if __name__ == "__main__":
    main()
