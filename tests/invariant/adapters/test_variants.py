"""Every kind of adapter goes both ways: trained here it opens in PEFT on the unchanged base, and the other way round;
a merged model gives the adapter's logits, whether a model or stored weights are merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_runs import BOUND, assert_close, assert_equal, assert_same_logits, lively, lively_model, logits_of

from qingtune.adapters.full_modules import find_modules, train_in_full, untie
from qingtune.adapters.lora import add_lora, lora_layers, merge_lora, why_general
from qingtune.adapters.merge_stored import HEAD
from qingtune.adapters.peft_files import load_adapter, read_adapter, save_adapter
from qingtune.adapters.variants import Variant
from qingtune.errors import UserError
from qingtune.models.quantize import quantize_model

RANK, ALPHA = 4, 6.0
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"up_proj": 3.0}}
# Settings by PEFT's names, which are ours too.
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "patterns": PATTERNS,
    "layers": {"layers_to_transform": [1]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["model.norm", "input_layernorm"]},
    "a whole block": {"modules_to_save": ["layers.0.mlp"]},
    "dora, rslora, patterns, layers": {"use_dora": True, "use_rslora": True, "layers_to_transform": [1]}
    | {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"mlp.*": 2.0}},
    "dora, pissa, patterns": {"use_dora": True, "init_lora_weights": "pissa"} | PATTERNS,
    "rslora, pissa, head": {"use_rslora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]},
    "dora, olora, norm": {"use_dora": True, "init_lora_weights": "olora", "modules_to_save": ["model.norm"]},
}
ONLY_HERE = {"pissa_niter_16": {"init_lora_weights": "pissa_niter_16"}}
ON_GPT2: dict[str, dict[str, Any]] = {
    **{name: VARIANTS[name] for name in ("dora", "rslora", "pissa", "layers")},
    "gpt2's patterns": {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"h.1.mlp.c_proj": 3.0}},
    "gpt2's head": {"modules_to_save": ["lm_head"]},
    "gpt2's embedding and norm": {"modules_to_save": ["wte", "ln_f"]},
    "dora, pissa, gpt2's head": {"use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]},
}
CASES = [("qwen2", name) for name in VARIANTS]
CASES += [("llama", name) for name in ("dora", "pissa", "patterns", "head and embedding", "dora, olora, norm")]
CASES += [("llama tied", "head"), ("llama tied", "embedding"), ("llama tied", "head and embedding")]
CASES += [("gpt2", name) for name in ON_GPT2]
OURS = [*CASES, ("qwen2", "pissa_niter_16"), ("gpt2", "olora")]


def settings_of(name: str) -> dict[str, Any]:
    return (VARIANTS | ON_GPT2 | ONLY_HERE)[name]


def model_of(kind: str) -> Any:
    if kind == "llama tied":
        return lively(make_model("llama", tie_word_embeddings=True))
    return lively_model(kind)


def adapted(
    kind: str, settings: dict[str, Any], layers: Sequence[str] | None = None, dropout: float = 0.0, model: Any = None
) -> Any:
    """A model with adapters of ours."""
    model = model or model_of(kind)
    settings = dict(settings)
    whole = find_modules(model, settings.pop("modules_to_save", None))
    add_lora(model, layers, RANK, ALPHA, dropout, seed=3, variant=Variant(**settings), leave=whole)
    train_in_full(model, whole)
    return model


def of_peft(kind: str, settings: dict[str, Any], **more: Any) -> Any:
    """A model with adapters of PEFT's."""
    linear = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    linear += [] if kind == "gpt2" else ["gate_proj", "up_proj", "down_proj"]
    config: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "fan_in_fan_out": kind == "gpt2",
        "target_modules": linear,
    }
    torch.manual_seed(7)
    return get_peft_model(model_of(kind), LoraConfig(task_type="CAUSAL_LM", **config | settings | more))


def loss_of(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


def few_steps(model: Any) -> None:
    """Train all that is to be trained, so that it moves."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def merged_from_files(kind: str, folder: Path) -> Any:
    """The base with an adapter's files merged into its stored weights one at a time."""
    model, adapter = model_of(kind), read_adapter(folder)
    if adapter.parts_head and model.config.tie_word_embeddings:
        untie(model)
    stored = model.state_dict()
    assert adapter.names <= set(stored)
    model.load_state_dict({name: adapter.merged(name, weight) for name, weight in stored.items()})
    return model


@pytest.mark.parametrize(("kind", "name"), OURS, ids=str)
def test_ours_opens_in_peft(kind: str, name: str, tmp_path: Path) -> None:
    model = adapted(kind, settings_of(name))
    base = logits_of(model_of(kind))
    assert_same_logits(logits_of(model), base, 10 * BOUND)  # training begins at the base model, whatever the start
    few_steps(model)
    ours = logits_of(model)
    assert float((ours - base).abs().max()) > 1e-2 * float(base.abs().max())
    save_adapter(model, tmp_path, "the base", 0.0)

    peft = PeftModel.from_pretrained(model_of(kind), str(tmp_path))
    assert_same_logits(logits_of(peft), ours)
    assert_same_logits(logits_of(peft.merge_and_unload()), ours)
    again = model_of(kind)
    load_adapter(again, tmp_path)
    assert_same_logits(logits_of(again), ours)
    assert_same_logits(logits_of(merged_from_files(kind, tmp_path)), ours)
    for of_ours in (model, again):
        merge_lora(of_ours)
        assert not lora_layers(of_ours)
        assert_same_logits(logits_of(of_ours), ours)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=str)
def test_peft_s_opens_here(kind: str, name: str, tmp_path: Path) -> None:
    peft = of_peft(kind, settings_of(name))
    few_steps(peft)
    theirs = logits_of(peft)
    peft.save_pretrained(str(tmp_path))
    model = model_of(kind)
    base = logits_of(model)
    load_adapter(model, tmp_path)
    assert_same_logits(logits_of(model), theirs)
    assert float((theirs - base).abs().max()) > 1e-2 * float(base.abs().max())
    assert_same_logits(logits_of(merged_from_files(kind, tmp_path)), theirs)
    merge_lora(model)
    assert_same_logits(logits_of(model), theirs)
    save_whole = tmp_path / "merged"
    model.save_pretrained(save_whole)
    assert_same_logits(logits_of(type(model).from_pretrained(save_whole)), theirs)  # with a head of its own if untied


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_converted_by_peft_opens_here(start: str, tmp_path: Path) -> None:
    peft = of_peft("qwen2", {"init_lora_weights": start})
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(str(tmp_path / "start"))
    few_steps(peft)
    peft.save_pretrained(str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = lively_model("qwen2")
    load_adapter(model, tmp_path / "end")
    assert_same_logits(logits_of(model), logits_of(peft))


@pytest.mark.parametrize("tied", [True, False])
def test_tying_that_peft_was_asked_to_keep_is_kept(tied: bool, tmp_path: Path) -> None:
    kind = "qwen2" if tied else "llama"
    peft = of_peft(kind, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True})
    few_steps(peft)
    peft.save_pretrained(str(tmp_path))
    model = model_of(kind)
    load_adapter(model, tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert_same_logits(logits_of(model), logits_of(peft))
    assert_same_logits(logits_of(merged_from_files(kind, tmp_path)), logits_of(peft))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_gradients_of_dora_are_pefts(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(kind, {"use_dora": True} | settings)
    few_steps(ours)
    save_adapter(ours, tmp_path, "base", 0.0)
    ours = model_of(kind)
    load_adapter(ours, tmp_path)
    peft = PeftModel.from_pretrained(model_of(kind), str(tmp_path), is_trainable=True)
    for model in (ours, peft):
        loss_of(model.train()).backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert any("magnitude" in name for name in found)
    assert_close({name: g for name, g in found.items() if g is not None}, theirs, 1e-4)  # type: ignore[arg-type]


def test_dropout_of_dora_is_as_in_peft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = adapted("qwen2", {"use_dora": True}, ["q_proj"])
    few_steps(ours)
    save_adapter(ours, tmp_path, "base", 0.5)
    peft = PeftModel.from_pretrained(lively_model("qwen2"), str(tmp_path)).base_model.model.model.layers[0]
    x = torch.randn(3, 32)
    theirs, mine = peft.self_attn.q_proj, ours.model.layers[0].self_attn.q_proj
    masks = [torch.rand(3, 32) > 0.5]
    monkeypatch.setattr("qingtune.adapters.lora.dropout", lambda x, _: x * masks[0] * 2)
    monkeypatch.setattr(theirs.lora_dropout["default"], "forward", lambda x: x * masks[0] * 2)
    mine.dropout_probability = 0.5
    torch.testing.assert_close(mine.train()(x), theirs.train()(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mine(x), mine.eval()(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_on_quantised_weights_is_dora_on_what_they_stand_for(bits: int) -> None:
    model, dense = lively_model("qwen2"), lively_model("qwen2")
    quantize_model(model, bits, torch.device("cpu"))
    for name, layer in dict(model.named_modules()).items():
        if name.endswith("_proj"):
            dense.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    for one in (model, dense):
        adapted("", {"use_dora": True}, model=one)
        few_steps(one)
    assert_same_logits(logits_of(model), logits_of(dense), 1e-3)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_cannot_be_found_in_quantised_weights_are_refused(start: str, tmp_path: Path) -> None:
    of_peft("qwen2", {"init_lora_weights": start}).save_pretrained(str(tmp_path))
    model = lively_model("qwen2")
    quantize_model(model, 8, torch.device("cpu"))
    with pytest.raises(UserError, match=f"init_lora_weights {start}.* without quantisation"):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_is_left_of_a_16_bit_weight_is_rounded_once(start: str) -> None:
    model = adapted("", {"init_lora_weights": start}, model=lively_model("qwen2").to(torch.bfloat16))
    base = lively_model("qwen2").to(torch.bfloat16).float()
    for name, adapter in lora_layers(model).items():
        weight, left = base.get_submodule(name).weight, adapter.base.weight
        assert (left.dtype, adapter.lora_A.dtype, adapter.lora_B.dtype) == (torch.bfloat16, *[torch.float32] * 2)
        exact = weight - adapter.scaling * adapter.lora_B @ adapter.lora_A
        torch.testing.assert_close(left.float(), exact, rtol=2**-8, atol=1e-6)  # half a step of bf16, and fp32's noise


def test_plain_lora_is_what_it_was(tmp_path: Path) -> None:
    """Settings that ask for nothing leave names, files and numbers as they are without them."""
    plain = lively_model("qwen2")
    add_lora(plain, None, RANK, ALPHA, 0.0, seed=3)
    one = adapted("qwen2", {"rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None})
    assert_equal(dict(plain.named_parameters()), dict(one.named_parameters()))
    assert why_general(plain, "cpu") is None
    save_adapter(plain, tmp_path, "base", 0.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (RANK, ALPHA, {}, {})
    assert (config["use_dora"], config["use_rslora"], config["modules_to_save"]) == (False, False, None)
    assert config["init_lora_weights"] is True


# --- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": [1, 2]}, "there is no layer 2 .* Its layers are 0 to 1"),
        ({"rank_pattern": {"c_attn": 2}}, 'rank_pattern: "c_attn" does not match'),
        ({"alpha_pattern": {"layers.0.*": 2}, "layers_to_transform": [1]}, "alpha_pattern: .* does not match"),
        ({"modules_to_save": ["lm_haed"]}, 'modules_to_save: "lm_haed" matches no module.*Did you mean "lm_head"'),
        ({"modules_to_save": ["layers"]}, "not a module with weights"),
        ({"modules_to_save": ["rotary_emb"]}, "not a module with weights"),
        ({"modules_to_save": ["model"]}, "no layer is left"),
        (
            {"init_lora_weights": "pissa", "rank_pattern": {"k_proj": 17}},
            "a rank of at most 16 for .*k_proj, not 17",
        ),
        ({"init_lora_weights": "olora", "rank_pattern": {"k_proj": 17}}, "a rank of at most 16"),
    ],
)
def test_what_fits_no_layer_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted("qwen2", settings)


def test_quantised_modules_cannot_be_trained_in_full() -> None:
    model = lively_model("qwen2")
    quantize_model(model, 8, torch.device("cpu"))
    with pytest.raises(UserError, match="is quantised, and quantised weights cannot be trained"):
        find_modules(model, ["mlp"])
    assert find_modules(model, ["lm_head", "norm"]) == ["lm_head", "model.norm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, _: config | {"r": 5}, "a rank of 4, but adapter_config.json says 5"),
        (lambda config, _: config | {"use_dora": True}, "lora_magnitude_vector is missing"),
        (lambda config, _: config | {"rank_pattern": {"(": 3}}, "rank_pattern"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    change: Callable[[dict[str, Any], Any], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    model = adapted("qwen2", {})
    save_adapter(model, tmp_path, "base", 0.0)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()), None)))
    for read in (read_adapter, lambda folder: load_adapter(lively_model("qwen2"), folder)):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


def test_a_head_that_is_no_longer_the_embedding_is_told_and_stored(tmp_path: Path) -> None:
    model = adapted("qwen2", {"modules_to_save": ["lm_head"]})
    assert model.config.tie_word_embeddings is False
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"lm_head.weight"}
    save_adapter(model, tmp_path, "base", 0.0)
    adapter = read_adapter(tmp_path)
    assert adapter.parts_head
    for module, parts in (("model.norm", False), ("embed_tokens", True)):
        save_adapter(adapted("qwen2", {"modules_to_save": [module]}), tmp_path, "base", 0.0)
        other = read_adapter(tmp_path)
        assert other.parts_head is (HEAD in other.names) is parts
    weight = torch.ones(320, 32)
    assert other.merged(HEAD, weight) is weight  # the head stays what the embedding was
    other.check_names({*other.names} - {HEAD})
    with pytest.raises(UserError, match="another model: this one has no model"):
        other.check_names({HEAD})
