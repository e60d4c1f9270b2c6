"""Weights are known again by their fingerprint, load as they were saved, and broken folders are told in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from qingtune.errors import UserError
from qingtune.models.find import CONVERTED, ModelSource, context_length, find_model, fingerprint
from qingtune.models.gguf_convert import tie_if_same
from qingtune.models.load import load_model, load_tokenizer, local_folder, save_model, stop_ids, stored_dtype

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
IDS = torch.arange(20)[None]
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A llama folder to spoil: its head is not tied, so that no weight stands in for another."""
    return shutil.copytree(tiny("llama"), tmp_path / "copy")


def change_weights(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


# --- Fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5KB", "20KB", "1GB"])
def test_the_fingerprint_does_not_depend_on_the_files(size: str, tiny: Tiny, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size != "1GB")
    assert fingerprint(tmp_path) == fingerprint(tiny("llama"))


def middle(tensors: Tensors, name: str) -> torch.Tensor:
    """A view of the value in the middle of a tensor, where the fingerprint looks."""
    flat = tensors[name].view(-1)
    return flat[flat.numel() // 2 :][:1]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: middle(tensors, UP).mul_(1.01),
        lambda tensors: middle(tensors, NORM).add_(1e-6),
        lambda tensors: tensors.update({UP: tensors[UP].view(torch.int32)}),
        lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}),
        lambda tensors: tensors.update({UP + "2": tensors.pop(UP)}),
        lambda tensors: tensors.pop(UP),
    ],
)
def test_the_fingerprint_tells_other_weights(change: Callable[[Tensors], Any], tiny: Tiny, copy: Path) -> None:
    change_weights(copy, lambda tensors: None)
    assert fingerprint(copy) == fingerprint(tiny("llama"))
    change_weights(copy, change)
    assert fingerprint(copy) != fingerprint(tiny("llama"))


def test_models_of_other_seeds_have_other_fingerprints(tiny: Tiny) -> None:
    assert len({fingerprint(tiny(kind, seed)) for kind in ("qwen2", "llama") for seed in (0, 1)}) == 4


# --- Loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_again(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(kind, seed=3)
    expected = logits_of(model)
    save_model(model, tmp_path, dtype)
    again = load_model(tmp_path, dtype)
    for (name, ours), (_, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0, atol=0, msg=name)
    loose = 0 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits_of(again).float(), expected, rtol=0, atol=loose)
    assert stored_dtype(tmp_path) == dtype
    assert again.config.tie_word_embeddings == (kind != "llama")
    assert context_length(tmp_path) == 256


def test_an_architecture_without_fused_attention_is_saved(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 320}
    config = transformers.Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    save_model(transformers.AutoModelForCausalLM.from_config(config), tmp_path, torch.float32)
    assert load_model(tmp_path, torch.float32).config.model_type == "gemma2"


def test_a_model_is_loaded_in_the_dtype_asked_for(tiny: Tiny) -> None:
    assert stored_dtype(tiny("llama")) == torch.float32
    assert {parameter.dtype for parameter in load_model(tiny("llama"), torch.bfloat16).parameters()} == {torch.bfloat16}


SPOILED: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "empty": lambda path: path.write_bytes(b""),
    "git pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "header cut": lambda path: path.write_bytes(path.read_bytes()[:500]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_broken_weights_are_told(name: str, copy: Path) -> None:
    SPOILED[name](copy / WEIGHTS)
    with pytest.raises(UserError, match="copy"):
        load_model(copy, torch.float32)
    if name != "cut":  # which leaves all that the fingerprint reads
        with pytest.raises(UserError, match="copy"):
            fingerprint(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    change_weights(copy, lambda tensors: [tensors.pop(UP), tensors.pop(NORM)])
    with pytest.raises(UserError, match=rf"2 weights are missing, for example {UP}.*Download it again"):
        load_model(copy, torch.float32)


def test_weights_of_another_shape_are_named(copy: Path) -> None:
    change_weights(copy, lambda tensors: tensors.update({NORM: torch.ones(7)}))
    with pytest.raises(UserError, match=NORM):
        load_model(copy, torch.float32)


def test_a_missing_part_of_several_is_named(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    make_model("llama").save_pretrained(copy, max_shard_size="20KB")
    parts = sorted(copy.glob("*.safetensors"))
    parts[1].unlink()
    with pytest.raises(UserError, match=parts[1].name):
        load_model(copy, torch.float32)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "brandnew"}, 'architecture "brandnew" is not known to the installed Transformers'),
        ({"model_type": "clip"}, 'architecture "clip" has no causal language model'),
        ({"model_type": "brandnew", "auto_map": {"AutoModel": "code.Model"}}, "its own code.*never run"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, None),
        ({"hidden_size": "many"}, "hidden_size"),
    ],
)
def test_architectures_that_cannot_be_had(values: dict[str, Any], told: str | None, copy: Path) -> None:
    change_config(copy, **values)
    (copy / "code.py").write_text("raise SystemExit('the code of a model was run')", encoding="utf-8")

    def loaded() -> Any:
        return load_model(local_folder(find_model(str(copy), None, "auto"), None), torch.float32)

    if told is None:
        assert type(loaded()).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(UserError, match=told):
            loaded()


@pytest.mark.parametrize("content", [None, '{"a"', "{}"])
def test_a_folder_without_a_usable_tokenizer_is_told(content: str | None, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="copy: no tokenizer can be loaded"):
        load_tokenizer(copy)


# --- Small things ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "found"),
    [
        (None, {"eos_token_id": 2}, [2]),
        ({"eos_token_id": [7, 2]}, {"eos_token_id": 2}, [2, 7]),
        ({"eos_token_id": 9}, {"eos_token_id": [4, 5]}, [4, 5, 9]),
        ({"eos_token_id": None}, {}, []),
        ({"eos_token_id": 0}, {}, [0]),
        (None, {"text_config": {"eos_token_id": 3}}, [3]),
        (None, {"eos_token_id": 2, "text_config": {"eos_token_id": 3}}, [2]),
    ],
)
def test_stop_ids_are_those_of_both_files(
    generation: dict[str, Any] | None, config: dict[str, Any], found: list[int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    assert stop_ids(tmp_path) == found


def test_a_broken_generation_config_is_told(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos', encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        stop_ids(copy)


@pytest.mark.parametrize(("apart", "tied"), [(0.0, True), (0.045, True), (0.3, False), (None, False)])
def test_head_and_embedding_are_tied_if_they_are_one_matrix(apart: float | None, tied: bool) -> None:
    model = make_model("llama")
    embedding = model.get_input_embeddings().weight
    if apart is not None:  # else it stays as it was made: another matrix of the same kind
        noise = torch.randn_like(embedding)
        model.lm_head.weight.data = embedding.data + apart * noise * embedding.data.norm() / noise.norm()
    tie_if_same(model)
    assert (model.lm_head.weight is embedding) == tied == model.config.tie_word_embeddings


# --- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """A llama model as llama.cpp writes it: matrices in F16, rows of queries and keys in its rotary order."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [tokenizer.convert_ids_to_tokens(number) or f"[unused{number}]" for number in range(config.vocab_size)]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        array = tensor.half().numpy() if tensor.ndim > 1 else tensor.numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF file and the model in it, whose weights are numbers that F16 and bf16 hold exactly."""
    model = make_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().half().bfloat16().float()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model, make_tokenizer())
    return path, model


def test_a_gguf_file_is_converted_once_and_answers_as_its_source(
    gguf_file: tuple[Path, Any], tmp_path: Path, reported: Callable[[], list[str]]
) -> None:
    path, model = gguf_file
    folder = local_folder(find_model(str(path), None, "auto"), str(tmp_path))
    assert folder.parent == tmp_path / CONVERTED
    assert len([line for line in reported() if line.startswith("Converting")]) == 1
    torch.testing.assert_close(logits_of(load_model(folder, torch.float32)), logits_of(model), rtol=0, atol=1e-6)
    assert stop_ids(folder) == [2]
    assert context_length(folder) == 256
    tokenizer, source = load_tokenizer(folder), make_tokenizer()
    assert tokenizer.chat_template == source.chat_template
    for text in ("<|im_start|>user\nFresh bread<|im_end|>\n", "七点出炉 🥖", "  a\n\n b"):
        assert tokenizer(text)["input_ids"] == source(text)["input_ids"]
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    moved = shutil.copy(path, tmp_path / "tiny.gguf")
    assert local_folder(ModelSource("tiny", Path(moved)), str(tmp_path)) == folder
    assert len([line for line in reported() if line.startswith("Converting")]) == 1
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written


def test_a_cache_that_cannot_be_written_is_told(gguf_file: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"the converted model could not be written: .*--cache_dir"):
        local_folder(ModelSource("tiny", gguf_file[0]), str(tmp_path / "cache"))


@pytest.mark.parametrize("size", [4, 20, 1000, 20_000, 60_000])
def test_a_broken_gguf_file_is_told_and_leaves_nothing(size: int, gguf_file: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file[0].read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut\.gguf: "):
        local_folder(find_model(str(path), None, "auto"), str(tmp_path / "cache"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "cut.gguf"]
