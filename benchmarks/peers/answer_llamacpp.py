"""llama.cpp's side of benchmarks/inference.py: python answer_llamacpp.py FILE.gguf BF16|Q8_0|Q4_K_M THREADS"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from statistics import median

PROMPT, NEW, RUNS = 512, 128, 3


def main() -> None:
    import llama_cpp

    path = _quantised(llama_cpp, Path(sys.argv[1]), sys.argv[2])
    threads = int(sys.argv[3])
    began = time.perf_counter()
    model = llama_cpp.Llama(
        str(path), n_ctx=1024, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    load_s = time.perf_counter() - began
    prefill, decode = [], []
    for run in range(RUNS + 1):  # the first one warms up
        prompt = [1000 + (7 * place + 131 * run) % 2000 for place in range(PROMPT)]
        model.reset()
        began = time.perf_counter()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        read = time.perf_counter()
        for _ in range(NEW):
            model.eval([token])
            token = model.sample(temp=0.0)
        prefill.append(PROMPT / (read - began))
        decode.append(NEW / (time.perf_counter() - read))
    result = {"prefill": median(prefill[1:]), "decode": median(decode[1:]), "load_s": load_s, "peak_bytes": _peak()}
    print(json.dumps({**result, "held_bytes": path.stat().st_size}))


def _quantised(llama_cpp, source: Path, kind: str) -> Path:
    """The file in another format, made by llama.cpp itself and kept beside it."""
    if kind == "BF16":
        return source
    target = source.with_name(f"{source.stem}-{kind}.gguf")
    if not target.exists():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        settings.nthread = os.cpu_count()
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
            sys.exit(f"llama.cpp could not quantise {source}")
    return target


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
