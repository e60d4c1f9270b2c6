"""Answering speed and memory, ours beside Transformers' and llama.cpp's, in one run.

python benchmarks/inference.py [--model FOLDER] [--systems NAME ...] [--repeats 3] [--output FILE.json]
    [--without avx512_bf16,amx_bf16] [--threads N]

Each system reads a prompt of 512 tokens and makes 128 new ones by the likeliest token, batch 1, in a process of its
own that has done the same once before; systems take turns. The bound of a new token is the bytes of the weights over
the bandwidth at which this machine's threads read memory, the bound of a prompt the rate of products over its work;
both are measured beside the runs. llama.cpp gets the same weights: exported by `qingtune export`, and quantised by
itself. A CPU with fewer units is stood in for by --without, which names their flags: ours, PyTorch and oneDNN leave
them unused, and llama.cpp is compiled for the others, in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lesser_cpu import environment_without
from peers.environments import make_environment
from roofline import work_of
from workload import DATA, cache_folder, model_folder

HERE = Path(__file__).parent
ROOT = HERE.parent
PROMPT, NEW = 512, 128
RUNS = 3  # timed ones in a process
BATCH_ROWS, BATCH_SLOTS = 48, 16
OURS: dict[str, tuple[int | None, int]] = {  # name -> bits, prompts at a time
    "bf16": (None, 1),
    "8-bit": (8, 1),
    "4-bit": (4, 1),
    "bf16, prompts of a file": (None, BATCH_SLOTS),
    "4-bit, prompts of a file": (4, BATCH_SLOTS),
}
TRANSFORMERS: dict[str, int | None] = {"Transformers bf16": None, "Transformers 8-bit": 8, "Transformers NF4": 4}
LLAMA_CPP = {"llama.cpp bf16": "BF16", "llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_K_M": "Q4_K_M"}
GGML_OPTIONS = {
    "AVX": "avx",
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_TILE": "amx_tile",
    "AMX_INT8": "amx_int8",
    "AMX_BF16": "amx_bf16",
}  # llama.cpp's name of each unit, and Linux's
ALL = [*OURS, *TRANSFORMERS, *LLAMA_CPP]


def main() -> None:
    arguments = _arguments()
    os.environ |= {**environment_without(arguments.without), "OMP_NUM_THREADS": str(arguments.threads)}
    if arguments.one:
        print(json.dumps(measure(arguments.one, Path(arguments.model))))
        return
    with tempfile.TemporaryDirectory(prefix="qingtune-bench-") as scratch:
        compare(arguments, Path(scratch))


def compare(arguments: argparse.Namespace, scratch: Path) -> None:
    """Run all systems in turn and print the table."""
    model = model_folder(arguments.model)
    python: Path | str = "not asked for"
    if any(system in LLAMA_CPP for system in arguments.systems):
        python = make_environment("llama.cpp", cache_folder() / "bench-envs", _cmake() if arguments.without else "")
        if isinstance(python, str):
            _say(f"llama.cpp: skipped, {python}")
    gguf = _exported(model, scratch) if isinstance(python, Path) else None
    runs: dict[str, list[dict[str, Any]]] = {}
    threads = ["--threads", str(arguments.threads)]
    for repeat in range(arguments.repeats):
        for system in arguments.systems:
            if system in LLAMA_CPP and gguf is None:
                continue
            command = (
                [str(python), str(HERE / "peers" / "answer_llamacpp.py"), str(gguf), LLAMA_CPP[system], *threads[1:]]
                if system in LLAMA_CPP
                else [sys.executable, __file__, "--one", system, "--model", str(model), *threads]
            )
            limits = _run([sys.executable, __file__, "--one", "limits", "--model", str(model), *threads])
            seen = _run(command)
            if seen is None or limits is None:
                continue
            runs.setdefault(system, []).append({**limits, **seen})
            _say(f"{repeat + 1}/{arguments.repeats} {system}: {_line(seen)}; reading {limits['read'] / 1e9:.0f} GB/s")
            if arguments.output:
                Path(arguments.output).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(table(runs, model))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Transformers folder; default: random weights of Qwen2.5-0.5B's shape")
    parser.add_argument("--systems", nargs="+", default=ALL, choices=ALL, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", default="", help="flags of /proc/cpuinfo, separated by commas, to leave unused")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", help="where all runs are written as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _cmake() -> str:
    """Options with which llama.cpp is compiled for what is left of this CPU."""
    from qingtune.machine.resources import cpu_flags

    flags = cpu_flags()
    if "avx512f" not in flags:
        flags -= {flag for flag in flags if flag.startswith("avx512")}
    chosen = (f"-DGGML_{option}={'ON' if flag in flags else 'OFF'}" for option, flag in GGML_OPTIONS.items())
    return " ".join(("-DGGML_NATIVE=OFF", *chosen))


def _run(command: list[str]) -> dict[str, Any] | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        _say(f"{' '.join(command[:4])}: failed\n{done.stderr[-2000:]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _exported(model: Path, scratch: Path) -> Path | None:
    """The weights as a GGUF file in bf16, from which llama.cpp makes its own."""
    command = [
        sys.executable, "-m", "qingtune", "export", "--base_model", str(model), "--format", "gguf",
        "--quantize", "bf16", "--output_dir", str(scratch / "gguf"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        _say(f"llama.cpp: skipped, no export:\n{done.stdout[-2000:]}")
        return None
    return next((scratch / "gguf").glob("*.gguf"))


# --- In a process of its own -----------------------------------------------------------------------------------------


def measure(system: str, model: Path) -> dict[str, Any]:
    """What one system does, or with "limits" what the machine allows."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(HERE))
    if system == "limits":
        from roofline import SECONDS

        from qingtune.kernels.device import choose_hardware
        from qingtune.planning.calibrate import product_rate

        dtype = choose_hardware().dtype
        rate = product_rate(torch.device("cpu"), dtype, SECONDS)
        return {"read": _read_rate(), "flops": rate, "dtype": str(dtype).removeprefix("torch.")}
    prompts = _prompts(model)
    if system in TRANSFORMERS:
        decoder, load_s = _transformers(model, TRANSFORMERS[system])
    else:
        from qingtune.answering.load import load_decoder
        from qingtune.kernels.device import choose_hardware

        bits, slots = OURS[system]
        began = time.perf_counter()
        decoder = load_decoder(model, None, bits, choose_hardware(), None, slots)
        load_s = time.perf_counter() - began
        if slots > 1:
            return {"load_s": load_s, **_many(decoder, model), "peak_bytes": _peak()}
    result: dict[str, Any] = {"load_s": load_s, "held_bytes": _held_bytes(decoder)}
    prefill: list[float] = []
    decode: list[float] = []
    for prompt in prompts:
        began = time.perf_counter()
        token = int(decoder.start(prompt).float().argmax())
        read = time.perf_counter()
        for _ in range(NEW):
            token = int(decoder.step([token])[0].float().argmax())
        prefill.append(PROMPT / (read - began))
        decode.append(NEW / (time.perf_counter() - read))
    return {**result, "prefill": median(prefill[1:]), "decode": median(decode[1:]), "peak_bytes": _peak()}


def _held_bytes(decoder: Any) -> int | None:
    """Bytes of all matrices of our decoder that a new token reads; None for another system's."""
    from qingtune.answering.decoder.cached import CachedDecoder

    if not isinstance(decoder, CachedDecoder):
        return None
    return round(sum(map(_read_bytes, (decoder.head, *decoder.layers))))


def _read_bytes(part: Any) -> float:
    """Of the matrices of a part of a decoder; of a mixture's experts, of as many as a token chooses."""
    import torch

    from qingtune.answering.decoder import layer, packed
    from qingtune.answering.decoder.native.matrices import NativeMatrix

    matrices = NativeMatrix, packed.DenseMatrix, packed.Int8Matrix, packed.Int4Matrix
    blocks = layer.AnswerLayer, layer.AttentionBlock, layer.DeltaBlock, layer.MLPBlock, layer.ExpertsBlock
    if isinstance(part, torch.Tensor):
        return part.numel() * part.dtype.itemsize
    if isinstance(part, torch.ScriptObject):  # int8, as FBGEMM has packed it
        return torch.ops.quantized.linear_unpack(part)[0].numel()
    if not isinstance(part, (*matrices, *blocks)):
        return 0
    held = sum(map(_read_bytes, vars(part).values()))
    if isinstance(part, layer.ExpertsBlock):
        held += part.experts.chosen / part.experts.count * sum(map(_read_bytes, part.mlps))
    return held


def _prompts(model: Path) -> list[list[int]]:
    """Prompts of 512 tokens of bundled text, no two beginning alike; the first one warms up."""
    from qingtune.models.load import load_tokenizer

    text = DATA.read_text(encoding="utf-8")
    ids: list[int] = load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    return [ids[start : start + PROMPT] for start in range(0, (RUNS + 1) * PROMPT, PROMPT)]


def _many(decoder: Any, model: Path) -> dict[str, float]:
    """New tokens a second over the prompts of a file, their reading included."""
    from qingtune.answering.generate import Decoding, generate_many
    from qingtune.data.prompts import rows_with_prompts
    from qingtune.data.tokenize import make_template, prompt_ids
    from qingtune.models.load import load_tokenizer

    template = make_template(load_tokenizer(model), [])
    prompts = [prompt_ids(template, prompt) for _, prompt in list(rows_with_prompts(str(DATA)))[:BATCH_ROWS]]
    greedy = [Decoding(max_new_tokens=NEW, temperature=0)] * len(prompts)
    began = time.perf_counter()
    made = sum(len(tokens) for _, tokens in generate_many(decoder, prompts, greedy, frozenset()))
    return {"decode": made / (time.perf_counter() - began)}


def _transformers(model: Path, bits: int | None) -> tuple[Any, float]:
    import transformers

    from qingtune.answering.load import ModulesDecoder
    from qingtune.kernels.device import choose_hardware

    dtype = choose_hardware().dtype
    transformers.logging.set_verbosity_error()
    quantization = {
        None: None,
        8: transformers.BitsAndBytesConfig(load_in_8bit=True),
        4: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }[bits]
    began = time.perf_counter()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, quantization_config=quantization, device_map="cpu" if bits else None
    ).eval()
    return ModulesDecoder(loaded), time.perf_counter() - began


def _read_rate() -> float:
    """Bytes a second at which all threads read memory that no cache holds, best of a few."""
    import torch

    numbers = torch.ones(2**27, dtype=torch.int64)  # 1 GiB
    times: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return numbers.numel() * 8 / min(times)


def _peak() -> int:
    import torch

    from qingtune.kernels.device import peak_bytes

    return peak_bytes(torch.device("cpu"))


# --- The table -------------------------------------------------------------------------------------------------------


def table(runs: dict[str, list[dict[str, Any]]], model: Path) -> str:
    """Medians as Markdown."""
    shape = work_of(model, 0)
    work = 2 * shape.body + shape.attention_layers * 4 * shape.attention_width * PROMPT / 2  # of a token of the prompt
    lines = [
        "| system | new tokens/s | of the bound | prompt tokens/s | of the bound | peak memory | loading |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, seen in runs.items():
        held = seen[0].get("held_bytes")
        bound = [run["decode"] * held / run["read"] for run in seen] if held else []
        prefill = [run["prefill"] for run in seen if "prefill" in run]
        shares = [run["prefill"] * work / run["flops"] for run in seen if "prefill" in run]
        cells = [
            f"qingtune {system}" if system in OURS else system,
            _spread([run["decode"] for run in seen], ".1f"),
            _spread(bound, ".2f"),
            _spread(prefill, ".0f"),
            _spread(shares, ".2f"),
            f"{max(run['peak_bytes'] for run in seen) / 1e9:.2f} GB",
            f"{median(run['load_s'] for run in seen):.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    limits = [run for seen in runs.values() for run in seen]
    read, flops = median(run["read"] for run in limits), median(run["flops"] for run in limits)
    products = f"{limits[0]['dtype']} products {flops / 1e9:.0f} GFLOP/s"
    return "\n".join([*lines, "", f"Reading memory {read / 1e9:.1f} GB/s, {products}."])


def _spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})" if values else ""


def _line(seen: dict[str, Any]) -> str:
    prefill = f", prompt {seen['prefill']:.0f}" if "prefill" in seen else ""
    return f"{seen['decode']:.1f} tokens/s{prefill}, {seen['peak_bytes'] / 1e9:.2f} GB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
