"""Compare exports with a real llama.cpp: the same tokens, how far logits are apart, and whether answers end.

    python tools/check_export.py --model models/A.gguf models/B.gguf [--lora_model FOLDER] [--quantize q8_0] [--tiny]

llama.cpp comes with the package llama-cpp-python, compiled in an environment of its own (ten minutes or more, once):
`--llama_env`, by default `llama-env` in qingtune's cache. Each model is exported into a temporary folder and compared
with the same weights in fp32 here: with `--tiny` also random models of every architecture and of every way to stretch
positions that can be exported. Prints a table in Markdown; the exit code is 1 if texts are cut into other tokens, or if
an fp32 or 16-bit file answers in other tokens where our two best tokens are not a tie.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qingtune.adapters.base_of import find_base  # noqa: E402
from qingtune.adapters.peft_files import load_adapter  # noqa: E402
from qingtune.answering.generate import Decoding, generate  # noqa: E402
from qingtune.answering.load import ModulesDecoder  # noqa: E402
from qingtune.commands.export import export  # noqa: E402
from qingtune.config.commands import ExportConfig, ModelSettings  # noqa: E402
from qingtune.data.format import Message  # noqa: E402
from qingtune.data.tokenize import Template, make_template, prompt_ids  # noqa: E402
from qingtune.files.paths import default_cache  # noqa: E402
from qingtune.models.load import load_model, load_tokenizer, stop_ids  # noqa: E402

PACKAGE = "llama-cpp-python==0.3.36"
NEW_TOKENS = 48
EXACT = ("f32", "f16", "bf16")
TIE = 0.05  # logits: two tokens this near to each other may change places by rounding
PROMPTS = (
    "Write one sentence about a bakery.",
    "What is 17 + 25? Answer with the number only.",
    "Name three colours, separated by commas.",
    "def fibonacci(n):  # complete this function",
    "用一句话介绍一家面包店。",
    "1加1等于几？只写数字。",
    "把“早上好”翻译成英文。",
    "写一条关于草莓蛋糕的小红书笔记，店名：蓝门🍓，地址：磨坊巷4号。",
)
CHATS = ("你好！请只回答一个词：天空是什么颜色？", "用中文说一句话，介绍北京。")
TEXTS = (
    *PROMPTS,
    "店名：蓝门\n品类：面包房\n地址：磨坊巷4号（近地铁10号线）",
    "It's 3.14159, isn't it? I'LL SAY: they've WE'RE 'tis",
    "  two spaces,   three\t\ttabs \n\n\n three lines  \r\n windows ",
    "🍓🥖👨‍👩‍👧‍👦🇨🇳 emoji; ñ é ü ß; Ελληνικά; русский; עברית; 한국어; 日本語のテスト",
    'for (int i = 0; i < 10; ++i) { printf("%d\\n", a[i] >> 2); }  // 注释',
    "1234567890 12,345.67 ²³ ½ Ⅷ ٣",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|not a token|>",
    "a\u00a0b\u3000c\u200bd\ufeffe",
)
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {"short_factor": [1.0] * 4 + [1.5] * 4, "long_factor": [1.0] * 4 + [4.0] * 4}
_MINISTRAL3 = {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_DELTA = {
    "head_dim": 64, "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


# Class of the configuration and its settings, by title.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen2 yarn": ("Qwen2Config", _rope("yarn", **_YARN)),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 32, **_EXPERTS}),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 64}),
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("LlamaConfig", {"head_dim": 32}),
    "llama linear": ("LlamaConfig", _rope("linear", factor=2.0)),
    "llama llama3": ("LlamaConfig", _rope("llama3", **_LLAMA3)),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "ministral": ("MinistralConfig", {"head_dim": 32, "sliding_window": 512}),
    "ministral3": ("Ministral3Config", {"head_dim": 32, **_rope("yarn", **_MINISTRAL3)}),
    "phi3": ("Phi3Config", {"pad_token_id": None}),
    "phi3 longrope": (
        "Phi3Config", {"pad_token_id": None, "original_max_position_embeddings": 512, "max_position_embeddings": 2048,
                       **_rope("longrope", **_LONGROPE)},
    ),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 4,
         "tie_word_embeddings": True, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 6},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Ours:
    """What the weights in fp32 say here: prompts, logits [T, V] of each, greedy answers, whether they ended."""

    template: Template
    prompts: list[list[int]]
    logits: list[np.ndarray[Any, Any]]
    answers: list[list[int]]
    ended: list[bool]
    model: Any


def main() -> int:
    """Compare what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="model folders, .gguf files or hub names")
    parser.add_argument("--lora_model", help="an adapter of the first model's, merged in")
    parser.add_argument("--quantize", default="f32,f16,bf16,q8_0,q4_0")
    parser.add_argument("--tiny", action="store_true", help="random models too, with the first model's tokenizer")
    parser.add_argument("--llama_env", type=Path, default=default_cache() / "llama-env")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    python = _llama_python(options.llama_env)
    torch.set_num_threads(options.threads)

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        return _ask(python, {**request, "threads": options.threads})

    kinds = options.quantize.split(",")
    lines, faults = [*_head()], 0
    for name in options.model:
        lora = options.lora_model if name == options.model[0] else None
        faults += _compare(Path(name).stem + " + adapter" * (lora is not None), name, lora, kinds, ask, lines)
    for name, (kind, settings) in TINY.items() if options.tiny else ():
        with _tiny(kind, settings, options.model[0]) as folder:
            faults += _compare(f"random {name}", str(folder), None, [k for k in kinds if k in EXACT], ask, lines)
    print("\n".join(lines))
    return 1 if faults else 0


def _llama_python(environment: Path) -> str:
    """The Python of the environment with llama.cpp, which is made if need be."""
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"Compiling {PACKAGE} in {environment}: ten minutes or more, once ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    return str(python)


def _ask(python: str, request: dict[str, Any]) -> dict[str, Any]:
    command = [python, str(ROOT / "tools" / "llama_answers.py")]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: llama.cpp failed on {request['gguf']}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def _tiny(kind: str, settings: dict[str, Any], tokenizer_of: str) -> Generator[Path]:
    """The folder of a random model with another's tokenizer; its weights are large enough to have opinions.

    kind: the class of its configuration.
    """
    import transformers

    base, _ = find_base(ModelSettings(base_model=tokenizer_of), None)
    tokenizer = load_tokenizer(base)
    sizes = {
        "vocab_size": len(tokenizer) + 5, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(sizes | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.2))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield Path(folder)


def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits of every place of a prompt, fp32 [T, V] on the CPU."""
    with torch.inference_mode():
        device = next(model.parameters()).device
        return model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()


def _ours(name: str, lora: str | None) -> Ours:
    """Answers of base and adapter in fp32, without the rounding of a file."""
    adapter = Path(lora) if lora else None
    base, record = find_base(ModelSettings(base_model=name), adapter)
    model: Any = load_model(base, torch.float32)
    if adapter:
        load_adapter(model, adapter)
    model.eval()
    template = make_template(load_tokenizer(adapter or base), record.stop_ids if record else stop_ids(base))
    prompts = [prompt_ids(template, [Message("user", text)]) for text in PROMPTS]
    decoding = Decoding(max_new_tokens=NEW_TOKENS, temperature=0)
    answers = [list(generate(ModulesDecoder(model), ids, decoding, template.stop_ids)) for ids in prompts]
    logits = [logits_of(model, ids).numpy() for ids in prompts]
    return Ours(template, prompts, logits, answers, [a[-1] in template.stop_ids for a in answers], model)


def _compare(
    title: str,
    name: str,
    lora: str | None,
    kinds: Sequence[str],
    ask: Callable[[dict[str, Any]], dict[str, Any]],
    lines: list[str],
) -> int:
    """Export a model in each form and add a line on each; returns how many are not what they should be."""
    ours, faults = _ours(name, lora), 0
    tokenizer: Any = ours.template.tokenizer
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "export"
        export(ExportConfig(base_model=name, lora_model=lora, output_dir=str(output), quantize=list(kinds)))  # pyright: ignore[reportArgumentType]
        for kind in kinds:
            chats = [[{"role": "user", "content": text}] for text in CHATS] if "random" not in title else []
            request = {
                "gguf": str(output / f"export-{kind}.gguf"), "prompts": ours.prompts, "texts": TEXTS, "chats": chats,
                "new_tokens": NEW_TOKENS, "folder": temporary,
            }  # fmt: skip
            theirs = ask(request)
            logits = [np.load(Path(temporary) / f"{number}.npy") for number in range(len(PROMPTS))]
            same, gaps = _answers(ours, theirs["answers"])
            alike = [ids == tokenizer(text, add_special_tokens=False)["input_ids"]
                     for ids, text in zip(theirs["ids"], TEXTS, strict=True)]  # fmt: skip
            lines.append(_line(title, kind, ours, theirs, logits, same, gaps, alike))
            faults += not all(alike) or (kind in EXACT and any(gap > TIE for gap in gaps))
            for text, identical in zip(TEXTS, alike, strict=True):
                if not identical:
                    print(f"{title} {kind}: other tokens for {text!r}", file=sys.stderr)
            for text, (reply, reason) in zip(CHATS, theirs["replies"], strict=False):
                print(f"{title} {kind} [{reason}]: {text} -> {reply}", file=sys.stderr, flush=True)
    return faults


def _answers(ours: Ours, theirs: Sequence[Sequence[int]]) -> tuple[int, list[float]]:
    """How many answers are the same; and for each other one, how far apart our logits of the two tokens are there."""
    same, gaps = 0, list[float]()
    for prompt, mine, other in zip(ours.prompts, ours.answers, theirs, strict=True):
        place = next((n for n, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        if place is None:
            same += len(mine) == len(other)
            gaps += [] if len(mine) == len(other) else [float("inf")]  # only one of the two stopped
            continue
        logits = logits_of(ours.model, [*prompt, *mine[:place]])[-1]
        gaps.append(float(logits[mine[place]] - logits[other[place]]))
    return same, gaps


def _head() -> tuple[str, str]:
    columns = (
        "model", "file", "same answers", "gap where they part", "largest difference", "mean", "mean / spread",
        "likeliest token agrees", "KL, nats", "ended, ours/theirs", "texts cut alike",
    )  # fmt: skip
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def _line(
    title: str,
    kind: str,
    ours: Ours,
    theirs: dict[str, Any],
    logits: Sequence[np.ndarray[Any, Any]],
    same: int,
    gaps: Sequence[float],
    alike: Sequence[bool],
) -> str:
    mine, other = np.concatenate(ours.logits), np.concatenate(logits)
    apart = np.abs(mine - other)
    log_p, log_q = (torch.from_numpy(values).log_softmax(1) for values in (mine, other))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    cells = (
        title, kind, f"{same}/{len(PROMPTS)}", ", ".join(f"{gap:.3f}" for gap in gaps) or "-", f"{apart.max():.4f}",
        f"{apart.mean():.5f}", f"{apart.mean() / mine.std():.2%}", f"{(mine.argmax(1) == other.argmax(1)).mean():.1%}",
        f"{divergence:.2e}", f"{sum(ours.ended)}/{sum(theirs['ended'])}", f"{sum(alike)}/{len(alike)}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
