"""Shared by all tests: no network, tiny models and tokenizers made on the fly, small data files."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fork_server import MODULES, ROOT, ForkServer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: an earlier answer is written without its thinking.
THINKING_TEMPLATE = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip('\\n') }}",
)
TEXTS = [
    "Write a social post for this shop.",
    "Name: Blue Door\nCategory: Bakery\nAddress: 4 Mill Lane",
    "Fresh bread at seven. #bakery #bread",
    "店名：蓝门\n品类：面包房\n地址：磨坊巷4号",
    "七点出炉，热的 🥖 #面包",
]


# Where tests are started in the background or by nohup, these are ignored, by them and by the processes they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine, except in tests marked `network`."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise OSError(f"tests do not use the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True, scope="session")
def _console_script() -> Iterator[None]:
    """Have messages name commands as the console script's, however the tests were called."""
    kept, sys.argv = sys.argv, ["qingtune"]
    yield
    sys.argv = kept


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's cache alone, here and in subprocesses, let no hub be asked, and buffer output as usual.

    The workers of a session share a cache, as what a user starts does: kernels are compiled once.
    """
    kept = {name: os.environ.pop(name, None) for name in ("QINGTUNE_CACHE", "HF_HUB_OFFLINE", "PYTHONUNBUFFERED")}
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    cache.mkdir(exist_ok=True)
    os.environ["QINGTUNE_CACHE"] = str(cache)
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True, scope="module")
def _loaded_libraries_are_no_garbage() -> None:
    """Keep collections short: a run of training begins with one, and looking through the libraries takes as long."""
    gc.collect()
    gc.freeze()


def make_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer with ChatML's special tokens, trained on a few lines; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model with two layers of an architecture by its name in Transformers; gpt2 without dropout."""
    import torch
    import transformers

    torch.manual_seed(seed)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        config: Any = transformers.GPT2Config(
            vocab_size=320, **sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=2, eos_token_id=2
        )
    else:
        settings: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "tie_word_embeddings": kind != "llama",
        }
        if kind == "qwen3":
            settings["head_dim"] = 8
        config = transformers.AutoConfig.for_model(kind, **(settings | changes))
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the folder of a tiny model by its kind; made once a session."""
    made: dict[tuple[str, int], Path] = {}

    def folder_of(kind: str = "qwen2", seed: int = 0) -> Path:
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{kind}-{seed}")
            make_model(kind, seed=seed).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            made[kind, seed] = folder
        return made[kind, seed]

    return folder_of


def instruction_rows(count: int) -> list[dict[str, str]]:
    """Rows of different lengths, no two alike."""
    return [
        {
            "instruction": TEXTS[0] if number % 2 else "写一条笔记。",
            "input": f"Name: Shop {number}" if number % 3 else "",
            "output": f"{TEXTS[2 if number % 2 else 4]} {number} " + "very fresh " * (number % 5),
        }
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load_tool(name: str) -> ModuleType:
    """A script of tools/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Lines(io.TextIOBase):
    """A stream that appends each whole line to a list."""

    def __init__(self, lines: list[str]) -> None:
        self._lines, self._begun = lines, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        self._lines += whole
        return len(text)


@contextlib.contextmanager
def reporting() -> Iterator[list[str]]:
    """The lines of progress that the block reports on stderr, as they come."""
    lines: list[str] = []
    with contextlib.redirect_stderr(_Lines(lines)):  # pyright: ignore[reportArgumentType]
        yield lines


@pytest.fixture
def reported(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """A function that returns the lines of progress that the test has reported on stderr so far."""
    lines: list[str] = []

    def so_far() -> list[str]:
        lines.extend(capsys.readouterr().err.splitlines())
        return lines

    return so_far


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Twenty instruction rows."""
    return write_jsonl(tmp_path / "train.jsonl", instruction_rows(20))


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs Python with arguments in the repository, without a terminal."""

    def run_python(*arguments: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": MODULES, **env},
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run_python


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts Python with libraries loaded, for tests of what a command does in a process, but not of its start."""
    server = ForkServer()
    yield server
    server.close()
