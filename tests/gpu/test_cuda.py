"""On an NVIDIA GPU: the same numbers as on the CPU, and every method runs in bf16. Left out where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.generate import Decoding, generate_many
from qingtune.answering.load import load_decoder
from qingtune.kernels import flash_attention
from qingtune.kernels.architecture import Attention
from qingtune.kernels.block_attention import BlockAttention
from qingtune.kernels.device import Hardware
from qingtune.kernels.flash_attention import FlashAttention
from qingtune.kernels.layout import Layout, Segment
from qingtune.kernels.workspace import Workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def losses(
    run: Callable[..., CompletedProcess[str]], model: Path, data: Path, output: Path, *flags: str, **env: str
) -> list[float]:
    """The losses of four steps."""
    common = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output)]
    common += ["--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-3", "--report_to", "none"]
    result = run("fine_tune_qwen.py", *common, *flags, **env)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("flags", [[], ["--use_lora"]], ids=["full", "lora"])
def test_fp32_losses_are_those_of_the_cpu(
    run: Callable[..., CompletedProcess[str]],
    tiny: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
    flags: list[str],
) -> None:
    exact = [*flags, "--bf16", "false", "--fp16", "false"]
    on_gpu = losses(run, tiny(), data_file, tmp_path / "gpu", *exact)
    on_cpu = losses(run, tiny(), data_file, tmp_path / "cpu", *exact, CUDA_VISIBLE_DEVICES="")
    assert on_gpu == pytest.approx(on_cpu, abs=2e-3)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_lora"],
        ["--use_lora", "--fp16"],
        ["--use_qlora"],
        ["--use_qlora", "--quantization_bit", "8"],
        ["--use_lora", "--gradient_checkpointing"],
        ["--use_lora", "--optim", "paged_adamw_8bit"],
    ],
    ids=lambda flags: " ".join(flags).replace("--", "") or "full",
)
def test_every_method_lowers_the_loss(
    run: Callable[..., CompletedProcess[str]],
    tiny: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
    flags: list[str],
) -> None:
    seen = losses(run, tiny(), data_file, tmp_path / "out", *flags)
    assert seen[-1] < seen[0]


def test_adapter_answers_in_four_bits(
    run: Callable[..., CompletedProcess[str]], tiny: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    losses(run, tiny(), data_file, tmp_path / "out", "--use_qlora")
    result = run("inference_lora.py", "--lora_model", tmp_path / "out", "--load_in_4bit", "--prompt", "hi")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flash_attention_is_block_attention(dtype: torch.dtype, shared: int, window: int | None) -> None:
    """Output and gradients of 14 query and 2 key heads of size 64, over segments of one token to several blocks."""
    device = torch.device("cuda")
    edges = [*accumulate([300, 1, 40, 700], initial=shared)]
    segments = [Segment(start, end, shared) for start, end in pairwise(edges)]
    segments = [Segment(0, shared, 0), *segments] if shared else segments
    places = torch.zeros(edges[-1], dtype=torch.int64, device=device)
    layout = Layout(places, places, tuple(segments), places, places)
    heads = Attention(14, 2, 64, 0.125, window=window)
    torch.manual_seed(0)
    q, grad = (torch.randn(edges[-1], 14, 64, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(edges[-1], 2, 64, device=device, dtype=dtype) for _ in range(2))
    found = []
    for kind, where in ((FlashAttention, layout.lengths), (BlockAttention, layout.blocks(window))):
        attention: Any = kind(heads, Workspace(device))
        out = torch.empty(edges[-1], 14 * 64, device=device, dtype=dtype)
        attention.forward("a", where, q, k, v, out)
        grads = attention.backward("a", where, out, grad.flatten(1), edges[-1])
        found.append([out, *(x.clone() for x in grads)])
    assert flash_attention.fits(device, dtype, 64)
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_answers_are_those_of_the_cpu(kind: str, tiny: Callable[..., Path]) -> None:
    prompts = [[5, 17, 200, 3, 42], [7, 11], [5, 17, 200, 9, 8, 7, 6]]
    greedy = [Decoding(max_new_tokens=12, temperature=0)] * len(prompts)
    found = []
    for device in ("cuda", "cpu"):
        hardware = Hardware(torch.device(device), torch.float32, "")
        decoder = load_decoder(tiny(kind), None, None, hardware, None, 2)
        assert isinstance(decoder, CachedDecoder)
        found.append(dict(generate_many(decoder, prompts, greedy, frozenset())))
    assert found[0] == found[1]
