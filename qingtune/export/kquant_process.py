"""The process in which llama.cpp quantises a GGUF file: it can be ended at any time, and its crash is its own.

Run as a script by export/kquants.py, with nothing of this package. Arguments: the file, the file to be, the form as
llama.cpp names it (Q4_K_M), threads. Prints `DONE TOTAL` as tensors are done, and on failure the reason to stderr.
"""

from __future__ import annotations

import os
import re
import sys

import llama_cpp  # pyright: ignore[reportMissingImports]

_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\]")
_WARNING, _ERROR = 3, 4  # ggml's levels of messages
_faults: list[str] = []


def _take(level: int, text: bytes, _: object) -> None:
    """Report the tensors that llama.cpp names as it comes to them; keep its errors; leave out all else."""
    line = text.decode("utf-8", "replace").strip()
    if level in (_WARNING, _ERROR) and line:
        _faults.append(line)
    if found := _TENSOR.match(line):
        try:
            print(*found.groups(), flush=True)
        except OSError:  # the command that asked for this has ended
            os._exit(1)


def main() -> None:
    """Quantise a file."""
    source, target, form, threads = sys.argv[1:]
    callback = llama_cpp.llama_log_callback(_take)  # a reference that lives as long as llama.cpp's
    llama_cpp.llama_log_set(callback, None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    settings.nthread = int(threads)
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), settings):
        sys.exit(_faults[-1] if _faults else "it does not say why")


if __name__ == "__main__":
    main()
