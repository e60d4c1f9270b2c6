"""How large the parts are: on a GPU, and where they are rehearsed on a CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qingtune.kernels.device import Hardware, choose_hardware

QWEN_05B = (
    "qwen2",
    {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
)  # fmt: skip
QWEN_7B = (
    "qwen2",
    {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
)  # fmt: skip
TINY = (
    "qwen2",
    {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
)  # fmt: skip
Shape = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What a part found.

    Attributes:
        rows: of its table.
        faults: what is outside its bounds; empty if all is well.
    """

    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    faults: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Scale:
    """Where the parts run and how large they are.

    Attributes:
        hardware: device and dtype that training would choose.
        scratch: a folder for files.
        small: the shape for speed and memory; large: the one that fills a card.
        passes: tokens of a pass of the small one; large_passes: of the large one.
        sample: tokens of each sample.
        answer: tokens of an answer.
        patience: the factor on the parts' time limits.
    """

    hardware: Hardware
    scratch: Path
    small: Shape
    large: Shape
    passes: tuple[int, ...]
    large_passes: tuple[int, ...]
    sample: int
    answer: int
    patience: int = 1

    @property
    def device(self) -> torch.device:
        """Where models are."""
        return self.hardware.device

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Let the device finish."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give back what parts no longer hold, and count the peak from here."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, work: Callable[[], object], times: int = 3) -> float:
        """Of the fastest of a few runs, after one that is not counted."""
        best = float("inf")
        for number in range(times + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            best = min(best, time.perf_counter() - began) if number else best
        return best


def on_gpu(scratch: Path) -> Scale | None:
    """The sizes for a GPU of 80 GB or more; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    return Scale(
        choose_hardware(), scratch, QWEN_05B, QWEN_7B, (2048, 8192, 32768), (8192, 32768), sample=512, answer=128
    )


def on_cpu(scratch: Path) -> Scale:
    """The rehearsal's."""
    hardware = Hardware(torch.device("cpu"), torch.bfloat16, "rehearsal on a CPU, bf16")
    return Scale(hardware, scratch, TINY, TINY, (64, 128), (128,), sample=32, answer=8, patience=5)
