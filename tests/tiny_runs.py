"""Tiny models whose every part matters, and runs of the recipe on them: in fp32, on the CPU, a logged line a step."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file

from qingtune.adapters.lora import DoRALinear, lora_layers
from qingtune.commands import train as train_command
from qingtune.config.load import load_train_config
from qingtune.data.tokenize import Sample

LORA = {"use_lora": True, "lora_r": 4, "lora_alpha": 8}
QLORA4 = {**LORA, "use_qlora": True, "quantization_bit": 4}
QLORA8 = {**LORA, "use_qlora": True, "quantization_bit": 8}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA, "qlora4": QLORA4, "qlora8": QLORA8}
# Length and trained places. Among them single tokens, samples that train nothing, and first tokens marked as trained,
# which nothing before them can predict: neither their own sample nor the one that lies in front of it.
SHAPES = ((9, range(4, 9)), (1, [0]), (17, range(17)), (6, []), (1, []), (12, [0, 5, 11]), (2, [1]), (1, [0]))
BOUND = 1e-5  # of the logits' largest value, in fp32
MEASURED = ("seconds", "peak_bytes", "eval_seconds")  # what no two runs have in common


def lively(model: Any, seed: int = 1) -> Any:
    """Weights so large that attention, positions, biases and norms show in the loss, as a fresh model's hardly do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.25 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model.eval()


def other_model(kind: str) -> Any:
    """A tiny model of an architecture that is not checked for samples laid end to end."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "sliding_window": 4,
        "eos_token_id": 2,
    }
    config = {"mistral": "MistralConfig", "vaultgemma": "VaultGemmaConfig", "olmo2": "Olmo2Config"}[kind]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))


def lively_model(kind: str, **changes: Any) -> Any:
    """A lively model of any of the architectures used here."""
    return lively(other_model(kind) if kind in ("mistral", "vaultgemma", "olmo2") else make_model(kind, **changes))


@functools.cache
def _files_of(kind: str) -> dict[str, bytes]:
    """What a lively model and its tokenizer are stored as; made once."""
    with tempfile.TemporaryDirectory() as folder:
        lively_model(kind).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def save_model(folder: Path, kind: str = "qwen2", **changes: Any) -> Path:
    """The folder of a lively model with its tokenizer; `changes` go into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files_of(kind).items():
        (folder / name).write_bytes(content)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def make_samples() -> list[Sample]:
    """One sample for each of SHAPES."""
    draw = np.random.default_rng(3)
    samples: list[Sample] = []
    for length, places in SHAPES:
        trained = np.zeros(length, dtype=np.bool_)
        trained[list(places)] = True
        samples.append(Sample(draw.integers(3, 320, length).astype(np.int32), trained, f"row {len(samples)}"))
    return samples


def move_adapters(model: Any) -> None:
    """Give the adapters weights of their own: at their start, half of the gradients are zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in lora_layers(model).values():
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) * 0.1)
            if isinstance(adapter, DoRALinear):
                magnitude = adapter.lora_magnitude_vector
                magnitude.mul_(1 + 0.3 * torch.randn(magnitude.shape, generator=generator))


def logits_of(model: Any) -> torch.Tensor:
    """What a model says of a fixed prompt."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60)[None], use_cache=False).logits


def train(output: Path, model: Path, data: Path, **settings: Any) -> bool:
    """Run the recipe from a configuration file; returns whether it came to its end.

    Its picture is empty: drawing takes as long as a tiny model's training, and has tests of its own.
    """
    values = {
        "model_name_or_path": str(model),
        "data_path": str(data),
        "output_dir": str(output),
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "learning_rate": 0.01,
        **settings,
    }
    file = output.with_name(f"{output.name}.config.json")
    file.write_text(json.dumps(values))
    with without_gpu(), mock.patch.object(train_command, "plot_losses", lambda _, picture, *__: picture.touch()):
        return train_command.train(load_train_config(str(file), {}).config)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Have torch find no GPU."""
    no_gpu = [mock.patch(f"torch.{kind}.is_available", return_value=False) for kind in ("cuda", "backends.mps")]
    with no_gpu[0], no_gpu[1]:
        yield


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what was measured by clock and memory."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def losses(output: Path) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in metrics(output) if "loss" in line]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """What was trained, as the result holds it."""
    adapter = output / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else output / "model.safetensors")


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], share: float) -> None:
    """Each tensor differs from its twin by no more than a share of its largest value."""
    assert one.keys() == two.keys()
    for name in one:
        apart, size = float((one[name] - two[name]).abs().max()), float(two[name].abs().max())
        assert apart <= share * size, f"{name}: {apart} apart, {size} large"


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Each tensor equals its twin bit for bit."""
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"{len(different)} of {len(one)} differ: {different[:3]}"


def assert_same_logits(one: torch.Tensor, two: torch.Tensor, bound: float = BOUND) -> None:
    """They differ by no more than a share of the largest."""
    apart, size = float((one - two).abs().max()), float(two.abs().max())
    assert apart < bound * size, f"{apart / size:.1e} of {size:.1f}"
