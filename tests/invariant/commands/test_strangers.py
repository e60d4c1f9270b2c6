"""Models and adapters come from strangers: whatever their files hold ends in one message, and chooses no code."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import instruction_rows, write_jsonl
from safetensors.torch import load_file, save_file

from qingtune.cli import main

Edit = Callable[[Path], object]
Folders = tuple[Path, Path]
COMMANDS = {
    "infer": "infer --base_model base --prompt hi --max_new_tokens 2 --temperature 0",
    "adapter": "infer --base_model base --lora_model adapter --prompt hi --max_new_tokens 2 --allow_other_base",
    "merge": "merge --base_model base --lora_model adapter --output_dir out --allow_other_base",
    "export": "export --base_model base --lora_model adapter --output_dir out --allow_other_base",
    "train": "train --model_name_or_path base --data_path rows.jsonl --use_lora true --max_steps 1 --output_dir out",
    "plan": "plan --model_name_or_path base --data_path rows.jsonl",
}
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A model, and an adapter for it that PEFT wrote."""
    import transformers
    from peft import LoraConfig, get_peft_model

    base, folder = tiny("qwen2"), tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    return base, folder


@pytest.fixture
def folders(made: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """Copies of both, in the current folder, with a few rows beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QINGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(made[0], "base")
    shutil.copytree(made[1], "adapter")
    write_jsonl(Path("rows.jsonl"), instruction_rows(4))
    return Path("base"), Path("adapter")


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends; nothing is left of what it began to write."""
    code = main(COMMANDS[command].split())
    shown = capsys.readouterr().err
    assert code == 2, shown
    assert "Traceback" not in shown
    assert not Path("out").exists() or not any(Path("out").iterdir())
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    return line


def changed(name: str, **fields: Any) -> Edit:
    """Set fields of a JSON file."""

    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(content | fields), encoding="utf-8")

    return edit


def raw(name: str, content: bytes) -> Edit:
    """Replace a file."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return edit


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Change the tensors of a file."""

    def edit(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, {"format": "pt"})

    return edit


def header(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change what a safetensors file says of its tensors, and leave their bytes."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        size = int.from_bytes(content[:8], "little")
        said = json.loads(content[8 : 8 + size])
        change(said)
        text = json.dumps(said).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return edit


def in_shards(places: dict[str, Any] | None = None, **files: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Store a model as two files with an index; `places` are changed in it."""

    def edit(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(found)
        weight_map: dict[str, Any] = {}
        for file, part in (("one", names[::2]), ("two", names[1::2])):
            save_file({name: found[name] for name in part}, folder / f"{file}.safetensors", {"format": "pt"})
            weight_map |= dict.fromkeys(part, f"{file}.safetensors")
        index = {"metadata": {}, "weight_map": weight_map | (places or {})}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return edit


def without(name: str) -> Edit:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Edit:
    """Take the last ten bytes of a file."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 10)


def both(*edits: Edit) -> Edit:
    """One after the other."""
    return lambda folder: [edit(folder) for edit in edits]


def as_folder(name: str) -> Edit:
    """A folder in the place of a file."""
    return both(lambda folder: (folder / name).unlink(missing_ok=True), lambda folder: (folder / name).mkdir())


def as_pipe(name: str) -> Edit:
    """A pipe in the place of a file, which would wait for ever."""
    return both(lambda folder: (folder / name).unlink(missing_ok=True), lambda folder: os.mkfifo(folder / name))


def first(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """Change the entry of a header's first tensor."""
    return lambda said: change(said[next(name for name in said if name != "__metadata__")])


DEEP = b"[" * 100_000
MANY_TENSORS = {f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(150_000)}
CONFIG, GENERATION = "config.json", "generation_config.json"
BASES: dict[str, tuple[Edit, str, str]] = {
    # what is done to the base; the command; what the message says
    "deep": (raw(CONFIG, DEEP), "infer", "config.json: not valid JSON: nested more than 64 deep"),
    "deep objects": (raw(CONFIG, b'{"a":' * 100_000), "plan", "nested more than 64 deep"),
    "no text": (raw(CONFIG, b"\xff\xfe{}"), "infer", "not UTF-8 text"),
    "a list": (raw(CONFIG, b"[]"), "train", "a JSON object is expected"),
    "two values": (raw(CONFIG, b'{"model_type": "a", "model_type": "b"}'), "infer", "is given twice"),
    "NaN": (raw(CONFIG, b'{"model_type": "qwen2", "rms_norm_eps": NaN}'), "infer", "NaN instead"),
    "digits": (raw(CONFIG, b'{"vocab_size": ' + b"1" * 5000 + b"}"), "infer", "a number of 5,000 digits"),
    "half a pair": (raw(CONFIG, rb'{"model_type": "\ud800"}'), "infer", "half of a surrogate pair"),
    "large": (raw(CONFIG, b" " * (3 << 20)), "infer", "has more than 2 MB"),
    "folder": (as_folder(CONFIG), "infer", "this is not a regular file"),
    "pipe": (as_pipe(CONFIG), "train", "this is not a regular file"),
    "device": (
        both(without(CONFIG), lambda f: (f / CONFIG).symlink_to("/dev/zero")),
        "plan",
        "this is not a regular file",
    ),
    "layers": (changed(CONFIG, num_hidden_layers=10**9), "infer", "a whole number from 1 to 10,000"),
    "many layers": (changed(CONFIG, num_hidden_layers=9999), "train", "9,999 layers, but the files contain"),
    "negative": (changed(CONFIG, hidden_size=-1), "infer", '"hidden_size" is -1'),
    "no heads": (changed(CONFIG, num_attention_heads=0), "export", '"num_attention_heads" is 0'),
    "text for a number": (changed(CONFIG, vocab_size="320"), "merge", '"vocab_size" is "320"'),
    "huge": (changed(CONFIG, hidden_size=2**20), "train", "another shape than config.json says"),
    "positions": (changed(CONFIG, max_position_embeddings=10**12), "infer", '"max_position_embeddings"'),
    "an infinite limit": (changed(CONFIG, rope_theta=float("inf")), "infer", '"rope_theta" is Infinity'),
    "rope": (changed(CONFIG, rope_parameters={"rope_type": "yarn", "factor": "x"}), "infer", "config.json: "),
    "activation": (changed(CONFIG, hidden_act="nothing"), "infer", "config.json: no model can be created"),
    "a long name": (changed(CONFIG, model_type="x" * 10**5), "infer", "a name of at most 100 characters"),
    "no window": (changed(CONFIG, layer_types=["sliding_attention"] * 2), "train", '"sliding_window" is not set'),
    "dtype": (changed(CONFIG, dtype="load"), "export", "\"dtype\" is 'load'"),
    "token": (changed(CONFIG, eos_token_id=320), "infer", "the model has the tokens 0 to 319"),
    "adapter inside": (changed("adapter_config.json", peft_type="LORA"), "train", "a model and an adapter"),
    "generation deep": (raw(GENERATION, DEEP), "infer", "generation_config.json: not valid JSON"),
    "generation list": (raw(GENERATION, b"[1]"), "train", "generation_config.json: a JSON object"),
    "temperature": (changed(GENERATION, temperature=-1), "infer", '"temperature" is -1, where a finite number'),
    "top_p": (changed(GENERATION, top_p=0), "export", '"top_p" is 0'),
    "top_k": (changed(GENERATION, top_k="x"), "infer", '"top_k" is "x"'),
    "penalty": (changed(GENERATION, repetition_penalty=0), "infer", '"repetition_penalty" is 0'),
    "eos": (changed(GENERATION, eos_token_id=["x"]), "infer", '"eos_token_id" is ["x"]'),
    "cut": (cut(WEIGHTS), "export", "not a complete safetensors file"),
    "cut for training": (cut(WEIGHTS), "train", "not a complete safetensors file"),
    "empty": (raw(WEIGHTS, b""), "infer", "not a complete safetensors file"),
    "long header": (raw(WEIGHTS, b"\xff" * 100), "infer", "its header is longer than the file"),
    "deep header": (raw(WEIGHTS, len(DEEP).to_bytes(8, "little") + DEEP), "infer", "nested more than 64 deep"),
    "weights folder": (as_folder(WEIGHTS), "infer", "this is not a regular file"),
    "overlap": (header(WEIGHTS, first(lambda e: e.update(data_offsets=[0, 8], shape=[2]))), "infer", "begins at byte"),
    "other size": (header(WEIGHTS, first(lambda e: e.update(shape=[1]))), "infer", "which are not"),
    "negative size": (header(WEIGHTS, first(lambda e: e.update(shape=[-1, 32]))), "merge", "no shape or no place"),
    "unknown dtype": (header(WEIGHTS, first(lambda e: e.update(dtype="F3"))), "infer", "stored as F3"),
    "dtype list": (header(WEIGHTS, first(lambda e: e.update(dtype=["F32"]))), "export", "stored as ['F32']"),
    "metadata": (header(WEIGHTS, lambda s: s.update(__metadata__=5)), "infer", '"__metadata__" is 5'),
    "metadata deep": (header(WEIGHTS, lambda s: s.update(__metadata__={"a": {}})), "merge", '"__metadata__" is'),
    "many": (header(WEIGHTS, lambda s: s.update(MANY_TENSORS)), "merge", "it has 150,0"),
    "a name": (header(WEIGHTS, lambda s: s.update({"a\x1b[2J": s.pop("model.norm.weight")})), "infer", "tensor name"),
    "codes": (tensors(WEIGHTS, lambda t: t.update(a=torch.ones(2, dtype=torch.int8))), "infer", "stored as I8"),
    "missing shard": (both(in_shards(), without("two.safetensors")), "infer", "two.safetensors: there is no such file"),
    "outside": (in_shards({"a": "../base/one.safetensors"}), "infer", "not a .safetensors file"),
    "absolute": (in_shards({"a": "/etc/passwd.safetensors"}), "export", "not a .safetensors file"),
    "wrong file": (in_shards({"model.norm.weight": "one.safetensors"}), "merge", "where the index says it is"),
    "index of numbers": (in_shards({"a": 5}), "infer", "not a .safetensors file"),
    "index deep": (both(in_shards(), raw(INDEX, DEEP)), "train", "index.json: not valid JSON"),
    "index empty": (both(in_shards(), raw(INDEX, b"{}")), "infer", "it lists no weights"),
    "NaN weights": (
        tensors(WEIGHTS, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "infer",
        "not finite",
    ),
}
ADAPTERS: dict[str, tuple[Edit, str, str]] = {
    "deep": (raw("adapter_config.json", DEEP), "adapter", "nested more than 64 deep"),
    "a list": (raw("adapter_config.json", b"[]"), "merge", "a JSON object is expected"),
    "rank 0": (changed("adapter_config.json", r=0), "adapter", '"r" is 0'),
    "another rank": (changed("adapter_config.json", r=3), "merge", "has a rank of 2, but"),
    "alpha NaN": (raw("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": NaN}'), "adapter", "NaN instead"),
    "alpha infinite": (changed("adapter_config.json", lora_alpha=float("inf")), "export", '"lora_alpha" is Infinity'),
    "rank_pattern": (changed("adapter_config.json", rank_pattern={"q_proj": 0.5}), "adapter", '"rank_pattern"'),
    "alpha_pattern": (changed("adapter_config.json", alpha_pattern=[1]), "merge", '"alpha_pattern" is [1]'),
    "no pattern": (changed("adapter_config.json", rank_pattern={"(": 2}), "merge", "is not read here"),
    "no weights": (without(ADAPTER), "adapter", "adapter_model.safetensors is missing"),
    "cut": (cut(ADAPTER), "merge", "not a complete safetensors file"),
    "no layers": (lambda f: save_file({}, f / ADAPTER), "adapter", "the adapter changes no layer"),
    "half a pair": (tensors(ADAPTER, lambda t: t.pop(sorted(t)[0])), "export", "lora_A is missing"),
    "vectors": (
        tensors(ADAPTER, lambda t: t.update({n: w[0].clone() for n, w in t.items()})),
        "adapter",
        "not a LoRA pair",
    ),
    "weights folder": (as_folder(ADAPTER), "adapter", "adapter_model.safetensors: not a complete safetensors file"),
    "long kind": (changed("adapter_config.json", peft_type="x" * 9000), "merge", "(9,002 characters)"),
    "NaN": (tensors(ADAPTER, lambda t: t[sorted(t)[0]].fill_(float("nan"))), "merge", "not finite"),
    "huge": (tensors(ADAPTER, lambda t: [w.fill_(1e38) for w in t.values()]), "adapter", "adapter_model.safetensors: "),
    "record results": (changed("qingtune.json", results={"seconds": "x"}), "export", 'results: "seconds" is "x"'),
    "codes": (tensors(ADAPTER, lambda t: t.update({n: w.int() for n, w in t.items()})), "adapter", "stored as I32"),
    "record deep": (raw("qingtune.json", DEEP), "adapter", "qingtune.json: not valid JSON"),
    "record list": (raw("qingtune.json", b"[]"), "merge", "qingtune.json: a JSON object"),
    "record types": (raw("qingtune.json", b'{"stop_ids": "x"}'), "adapter", '"stop_ids" is "x"'),
    "record empty": (raw("qingtune.json", b"{}"), "export", "the record is broken"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_broken_model_is_refused_in_a_line(name: str, folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    edit, command, said = BASES[name]
    edit(folders[0])
    assert said in refused(command, capsys)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_refused_in_a_line(name: str, folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    edit, command, said = ADAPTERS[name]
    edit(folders[1])
    assert said in refused(command, capsys)


@pytest.mark.parametrize("command", ["adapter", "merge", "export"])
@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_an_adapter_cannot_hang(
    setting: str, command: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the rule of `re` this takes longer than the universe has; the pattern fits no layer, so nothing changes."""
    changed("adapter_config.json", **{setting: {r"(([a-z_0-9]+)+\.?)+!": 4}})(folders[1])
    assert main(COMMANDS[command].split()) == 0, capsys.readouterr().err


def test_the_record_of_an_adapter_is_copied_without_secrets(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-planted-value-1")
    record = {"method": "lora", "base_model": "base", "base_fingerprint": "x", "system_prompt": None}
    record |= {"prompt_style": "chat", "stop_ids": [2], "settings": {"a": {"a-planted-value-1": ["a-planted-value-1"]}}}
    changed("qingtune.json", **record, results={"b": "a-planted-value-1"})(folders[1])
    assert main(COMMANDS["merge"].split()) == 0
    assert "a-planted-value-1" not in Path("out/qingtune.json").read_text(encoding="utf-8")


# --- No file chooses code -------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the package by which Transformers fetches native code; gives what was asked of it."""
    from transformers.integrations import hub_kernels
    from transformers.utils import import_utils

    asked: list[str] = []

    def get_kernel(name: str, *_: Any, **__: Any) -> Any:
        asked.append(name)
        raise AssertionError(name)

    package = ModuleType("kernels")
    for function in ("get_kernel", "load_kernel", "get_local_kernel", "has_kernel", "get_loaded_kernels"):
        setattr(package, function, get_kernel)
    monkeypatch.setitem(sys.modules, "kernels", package)
    for module in (hub_kernels, import_utils, sys.modules["transformers.modeling_utils"]):
        monkeypatch.setattr(module, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel, raising=False)
    return asked


@pytest.mark.parametrize(
    "name",
    ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
     "_experts_implementation"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["infer", "train", "merge", "export"])
def test_no_setting_of_a_model_fetches_native_code(
    command: str, name: str, folders: Folders, kernels: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changed(CONFIG, **{name: "kernels-community/evil@main:run"})(folders[0])
    assert main(COMMANDS[command].split()) == 0, capsys.readouterr().err
    assert kernels == []


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"configuration_files": ["config.5.0.0.json"]},
        {"transformers_weights": "other.safetensors"},
        {"fusion_config": {"patch_embeddings": True}},
        {"_name_or_path": "owner/another", "name_or_path": "owner/another"},
        {"return_dict": False, "output_attentions": True, "use_kernels": True},
    ],
)
def test_no_setting_of_a_model_names_other_files_or_code(
    fields: dict[str, Any], folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(COMMANDS["infer"].split()) == 0
    plain = capsys.readouterr().out
    (folders[0] / "config.5.0.0.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folders[0] / "evil.py").write_text("raise SystemExit('run')", encoding="utf-8")
    changed(CONFIG, **fields)(folders[0])
    assert main(COMMANDS["infer"].split()) == 0
    assert capsys.readouterr().out == plain


def test_a_gguf_file_does_not_bring_the_files_beside_it(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    from qingtune.models.find import find_model
    from qingtune.models.load import local_folder

    export = ["export", "--base_model", str(tiny("llama")), "--quantize", "f32", "--output_dir", str(tmp_path / "out")]
    assert main(export) == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    (tmp_path / "out" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/x"}', encoding="utf-8")
    folder = local_folder(find_model(str(file), None, "auto"), str(tmp_path / "cache"))
    assert (folder / WEIGHTS).exists()


# --- Tokenizers, numbers and runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["infer", "train", "export", "merge"])
def test_a_token_beyond_the_embedding_is_refused(
    command: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template writes an added token that the model has no row for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokenizer.add_tokens([f"<|new{number}|>" for number in range(10)], special_tokens=True)
    tokenizer.chat_template = "<|new9|>" + tokenizer.chat_template
    tokenizer.save_pretrained(folders[0])
    assert "has more tokens than the model" in refused(command, capsys)


def test_named_templates_without_a_default_are_refused(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    (folders[0] / "chat_template.jinja").unlink(missing_ok=True)
    changed("tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "{{ messages }}"}])(folders[0])
    assert "template" in refused("infer", capsys)


@pytest.mark.parametrize("temperature", ["0", "1e-40", "1e-300"])
def test_the_smallest_temperatures_take_the_likeliest_token(
    temperature: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for value in ("0", temperature):
        assert main([*COMMANDS["infer"].split()[:-1], value]) == 0, capsys.readouterr().err
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("flag", "value"), [("temperature", "1e30"), ("repetition_penalty", "1e-30"), ("top_p", "0")])
def test_sampling_has_limits(flag: str, value: str, folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMANDS["infer"].split(), f"--{flag}", value]) == 2
    assert f'"{flag}"' in capsys.readouterr().err


@pytest.mark.parametrize("name", [CONFIG, GENERATION, "adapter_config.json", "qingtune.json"])
def test_what_may_not_be_read_is_said(
    name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The superuser may read everything, so the system's answer is made up."""
    folder = folders[name in ("adapter_config.json", "qingtune.json")]
    changed(name)(folder)
    opened = os.open

    def denied(path: Any, *how: Any, **named: Any) -> int:
        if str(path) == str(folder / name):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how, **named)

    monkeypatch.setattr(os, "open", denied)
    assert f"{folder / name}: cannot be read: Permission denied" in refused("adapter", capsys)


@pytest.mark.parametrize("name", ["train_config.json", "run_facts.json", "evaluation.json", "qingtune.json"])
@pytest.mark.parametrize("content", [DEEP, b"[]", b'"x"'])
def test_a_run_folder_of_a_stranger_is_refused_in_a_line(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "train_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / name).write_bytes(content)
    assert main(["report", "--output_dir", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert f"{name}: " in shown
