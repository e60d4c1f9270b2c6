"""A model quantised tensor by tensor while it loads equals one quantised afterwards, and is kept for the next time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, reporting
from safetensors.torch import load_file, save_file

from qingtune.errors import UserError
from qingtune.files.paths import default_cache
from qingtune.files.weights_file import read_header
from qingtune.kernels.linear import Int8Linear, NF4Linear, QuantizedLinear
from qingtune.models import base, quantize
from qingtune.models.base import PACKED, load_base
from qingtune.models.find import fingerprint, stored_numbers
from qingtune.models.load import load_model
from qingtune.models.quantize import quantize_model
from qingtune.models.stored_weights import StoredWeights

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
KINDS = ["qwen2", "llama", "qwen3", "gpt2"]
WEIGHTS = "model.safetensors"
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes compiles its way of dequantising rows of odd length, for 15 s; it computes the same without."""
    from bitsandbytes.backends.default import ops

    monkeypatch.setattr(ops, "_dequantize_4bit_compute", ops._dequantize_4bit_compute.__wrapped__)


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A llama folder to change."""
    return shutil.copytree(tiny("llama"), tmp_path / "copy")


def load(folder: Path, bits: int | None, cache: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    """The model and what was said."""
    with reporting() as said:
        return load_base(folder, dtype, bits, CPU, str(cache)), said


def usual(folder: Path, bits: int | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model loaded whole, then quantised."""
    model = load_model(folder, dtype)
    if bits:
        quantize_model(model, bits, CPU)
    return model


def everything(model: Any) -> Tensors:
    """All of a model's tensors, those that are not saved too, and what its packed weights and logits come to."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            tensors |= {f"{name}:{part}": tensor for part, tensor in layer.packed_tensors().items()}
            tensors[f"{name}:dense"] = layer.dequantize(torch.float32)
    with torch.inference_mode():
        tensors["logits"] = model(input_ids=torch.arange(20)[None]).logits
    return tensors


def assert_same(one: Any, two: Any) -> None:
    """Models alike in everything, bit for bit."""
    ours, theirs = everything(one), everything(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor, theirs[name]), name
    settings = [model.config.to_dict() | {"_name_or_path": "", "mode": model.training} for model in (one, two)]
    assert settings[0] == settings[1]


def no_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a layer was quantised again")

    for kind in (NF4Linear, Int8Linear):
        monkeypatch.setattr(kind, "pack", refuse)


def kept_folders(cache: Path) -> list[Path]:
    return sorted((cache / "quantized").iterdir())


def change_weights(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_without_bits_it_is_the_model_as_loaded(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    model, said = load(tiny(kind), None, tmp_path)
    assert_same(model, usual(tiny(kind), None))
    assert not said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_while_loading_and_kept_equal_quantised_after_loading(
    kind: str, bits: int, dtype: torch.dtype, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = usual(tiny(kind), bits, dtype)
    first, said = load(tiny(kind), bits, tmp_path, dtype)
    assert_same(first, wanted)
    (folder,) = kept_folders(tmp_path)
    assert len(said) == 1
    assert str(folder) in said[0]
    no_quantizing(monkeypatch)
    again, said = load(tiny(kind), bits, tmp_path, dtype)
    assert_same(again, wanted)
    assert not said


def test_tied_heads_stay_tied_and_others_apart(tiny: Tiny, tmp_path: Path) -> None:
    for kind in KINDS:
        for _ in ("quantised", "kept"):
            model, _ = load(tiny(kind), 8, tmp_path)
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert tied == (kind != "llama"), kind


def test_weights_in_several_files_are_found(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama").save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    wanted = usual(tiny("llama"), 4)
    assert_same(load(tmp_path / "parts", 4, tmp_path)[0], wanted)
    no_quantizing(monkeypatch)
    assert_same(load(tmp_path / "parts", 4, tmp_path)[0], wanted)


@pytest.mark.parametrize("name", ["model_old.safetensors", "model-00001-of-00002.safetensors", "zz.safetensors"])
def test_a_file_that_transformers_does_not_read_does_not_count(
    name: str, copy: Path, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copy(tiny("llama", 1) / WEIGHTS, copy / name)
    assert_same(load(copy, 8, tmp_path)[0], usual(tiny("llama"), 8))


@pytest.mark.parametrize("how", ["content", "time", "other file", "other file at the same time"])
def test_a_changed_model_is_quantised_anew(how: str, copy: Path, tiny: Tiny, tmp_path: Path) -> None:
    load(copy, 8, tmp_path)
    if how == "content":
        change_weights(copy, lambda tensors: tensors[UP].mul_(3))
    elif how == "time":
        os.utime(copy / WEIGHTS, ns=(0, 12345))
    else:  # of the same size, under the same name
        before = os.stat(copy / WEIGHTS)
        shutil.copy(tiny("llama", 1) / WEIGHTS, copy / WEIGHTS)
        if how.endswith("time"):
            os.utime(copy / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    model, said = load(copy, 8, tmp_path)
    assert_same(model, usual(copy, 8))
    assert len(said) == 1
    assert len(kept_folders(tmp_path)) == 2


def test_weights_made_to_look_alike_are_quantised_anew(copy: Path, tmp_path: Path) -> None:
    """A stranger's model may have the bytes of another by which it is known, its name, size and time."""
    load(copy, 8, tmp_path)
    before, known = os.stat(copy / WEIGHTS), fingerprint(copy)
    content = bytearray((copy / WEIGHTS).read_bytes())
    header, start = read_header(copy / WEIGHTS)
    content[start + header[UP].start + 1] ^= 1  # its middle is what is looked at
    (copy / WEIGHTS).write_bytes(content)
    os.utime(copy / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(copy) == known
    model, _ = load(copy, 8, tmp_path)
    assert_same(model, usual(copy, 8))
    assert len(kept_folders(tmp_path)) == 2


def test_freed_memory_goes_back_after_each_layer(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else holes in the heap make the first load of a 4-bit model take more than the model in 16 bits."""
    returned: list[None] = []
    monkeypatch.setattr(quantize, "give_back_memory", lambda: returned.append(None))
    model, _ = load(tiny("llama"), 4, tmp_path)
    assert len(returned) == sum(isinstance(module, QuantizedLinear) for module in model.modules()) > 1


def test_each_width_and_dtype_is_kept_apart(tiny: Tiny, tmp_path: Path) -> None:
    for bits, dtype in ((4, torch.float32), (8, torch.float32), (4, torch.bfloat16)):
        load(tiny("llama"), bits, tmp_path, dtype)
    assert len(kept_folders(tmp_path)) == 3


def test_nothing_but_the_packed_layers_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    load(tiny("llama"), 8, tmp_path)
    (folder,) = kept_folders(tmp_path)
    assert [path.name for path in folder.iterdir()] == [PACKED]
    parts = {name.rpartition(".")[2] for name in load_file(folder / PACKED)}
    assert parts == {"packed", "scale"}


def test_without_a_setting_it_is_kept_in_the_default_cache(tiny: Tiny, reported: Callable[[], list[str]]) -> None:
    load_base(tiny("llama", 7), torch.float32, 8, CPU, None)
    assert str(default_cache() / "quantized" / tiny("llama", 7).name) in reported()[0]


def test_a_cache_that_cannot_be_written_is_told_and_the_run_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("a file")
    model, said = load(tiny("llama"), 4, cache)
    assert_same(model, usual(tiny("llama"), 4))
    assert len(said) == 1
    assert "was not cached" in said[0]


@pytest.mark.parametrize("change", [lambda old: old[:-500], lambda old: old[:20], lambda old: b""])
def test_a_broken_kept_file_is_made_anew(change: Callable[[bytes], bytes], tiny: Tiny, tmp_path: Path) -> None:
    load(tiny("llama"), 8, tmp_path)
    kept = kept_folders(tmp_path)[0] / PACKED
    whole = kept.read_bytes()
    kept.write_bytes(change(whole))
    model, _ = load(tiny("llama"), 8, tmp_path)
    assert_same(model, usual(tiny("llama"), 8))
    assert kept.read_bytes() == whole


WRONG: dict[str, Callable[[Tensors], Any]] = {
    "layer missing": lambda tensors: tensors.pop(UP),
    "norm missing": lambda tensors: tensors.pop(NORM),
    "layer of another shape": lambda tensors: tensors.update({UP: torch.ones(7, 32)}),
    "norm of another shape": lambda tensors: tensors.update({NORM: torch.ones(7)}),
    "layer turned": lambda tensors: tensors.update({UP: tensors[UP].t().contiguous()}),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_told_as_in_loading_whole(name: str, bits: int, copy: Path, tmp_path: Path) -> None:
    change_weights(copy, WRONG[name])
    with pytest.raises(UserError) as wanted:
        load_model(copy, torch.float32)
    with pytest.raises(UserError) as told:
        load(copy, bits, tmp_path)
    assert str(told.value) == str(wanted.value)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_broken_weights_are_told(content: bytes, copy: Path, tmp_path: Path) -> None:
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match=rf"{WEIGHTS}: not a complete safetensors file"):
        load(copy, 8, tmp_path)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_model_larger_than_the_memory_is_refused(
    bits: int | None, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    numbers = stored_numbers(copy)
    needed = int(numbers * (bits or 32) / 8)
    monkeypatch.setattr(base, "free_bytes", lambda *_, **__: needed - 1)
    with pytest.raises(UserError, match=r"billion weights take 0\.00 GB of memory, but 0\.00 GB are free"):
        load(copy, bits, tmp_path)
    monkeypatch.setattr(base, "free_bytes", lambda *_, **__: needed)
    load(copy, bits, tmp_path)


def test_names_that_transformers_translates_are_loaded_whole(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "gpt2")  # GPT-2's own files lack the prefix

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change_weights(folder, strip)
    model, _ = load(folder, 8, tmp_path)
    assert_same(model, usual(tiny("gpt2"), 8))


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(copy: Path) -> None:
    stored = StoredWeights(copy)
    os.truncate(copy / WEIGHTS, (copy / WEIGHTS).stat().st_size - 1)
    with pytest.raises(UserError, match="shorter"):
        _ = [stored.read(name) for name in stored.shapes]
