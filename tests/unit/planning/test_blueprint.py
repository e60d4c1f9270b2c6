"""What is counted on the meta device is what Transformers' models, real adapters and real packed weights hold."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from mixtures import make_mixture

from qingtune.adapters.of_settings import add_adapters
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.kernels.linear import QuantizedLinear, quantized_class
from qingtune.machine.resources import Machine
from qingtune.models.layers import BALANCE
from qingtune.models.multimodal import FAMILIES
from qingtune.models.quantize import quantize_model
from qingtune.planning.blueprint import Blueprint, make_blueprint

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "granite": {},
    "smollm3": {},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1]},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "num_key_value_heads": 4,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip
WHERE = Path("config.json")
WIDE = Machine("cpu", "a CPU", 4, None, None)


def on_meta(kind: str, **settings: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))


def numbers(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_transformers(kind: str, tied: bool) -> None:
    settings = {**BASE, **KINDS[kind], "tie_word_embeddings": tied}
    assert make_blueprint({"model_type": kind, **settings}, WHERE).parameters == numbers(on_meta(kind, **settings))


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe", "gemma3", "qwen3_moe", "mistral", "gpt2", "gemma4_text"])
def test_a_config_json_that_names_an_architecture_is_enough(kind: str) -> None:
    """Gemma 3 and Qwen3.5 are loaded without their vision parts, and so counted."""
    blueprint = make_blueprint({"model_type": kind}, WHERE)
    alone = on_meta("gemma3_text") if kind == "gemma3" else on_meta(kind)
    assert blueprint.parameters == numbers(alone) > 10**8
    assert bool(blueprint.notices) is (kind in FAMILIES)
    for method in ({"use_lora": True}, {"use_qlora": True, "use_lora": False}):
        assert 0 < blueprint.built(TrainConfig(**method), WIDE).trainable < blueprint.parameters / 10


PUBLISHED = {  # sizes as published, and parameters as the model cards count them: all, and those a token goes through
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
         "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        7.62e9, 7.62e9,
    ),
    "Qwen2.5-32B": (
        {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
         "num_hidden_layers": 64, "num_key_value_heads": 8, "vocab_size": 152064},
        32.8e9, 32.8e9,
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
         "num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 151936, "head_dim": 128,
         "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        30.5e9, 3.3e9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_parameters(name: str) -> None:
    content, parameters, active = PUBLISHED[name]
    blueprint = make_blueprint(content, WHERE)
    assert blueprint.parameters == pytest.approx(parameters, rel=0.01)
    ends = 2 * blueprint.hidden * blueprint.vocabulary
    assert blueprint.active_body + ends == pytest.approx(active, rel=0.02)


SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "named": {"lora_target_modules": "q_proj,mlp.down_proj"},
    "ranks by layer": {"rank_pattern": "q_proj=8,layers.1.mlp.up_proj=3"},
    "one layer": {"layers_to_transform": "1"},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": "lm_head"},
    "embedding and norm": {"modules_to_save": "embed_tokens,norm"},
    "pissa": {"init_lora_weights": "pissa"},
    "8 bits": {"use_qlora": True, "use_lora": False, "quantization_bit": 8},
    "4 bits": {"use_qlora": True, "use_lora": False, "modules_to_save": "lm_head"},
    "full": {"use_lora": False},
}


OF_MIXTURES = ["all", "dora", "embedding and norm", "8 bits", "4 bits", "full"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*itertools.product(("qwen2", "qwen3", "llama"), SETTINGS), *itertools.product(("qwen3_moe",), OF_MIXTURES)],
)
def test_what_is_built_is_what_a_run_holds(kind: str, settings: str) -> None:
    config = TrainConfig.model_validate({"use_lora": True, "lora_r": 4, "lora_alpha": 8, **SETTINGS[settings]})
    model: Any = make_mixture() if kind == "qwen3_moe" else make_model(kind)
    built = make_blueprint(model.config.to_dict(), WHERE).built(config, WIDE)
    if config.method == "qlora":
        quantize_model(model, config.quantization_bit, torch.device("cpu"))
    if config.method != "full":
        add_adapters(config, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packed = [layer.packed_tensors() for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    full = config.method == "full"
    assert built.trainable == sum(parameter.numel() for parameter in trained)
    assert built.gradients == sum(parameter.nbytes for parameter in trained)
    assert built.adapters == (0 if full else built.gradients)
    assert built.weights == sum(p.nbytes for p in model.parameters()) - built.adapters
    assert built.quantized == sum(
        tensor.nbytes for tensors in packed for name, tensor in tensors.items() if "quant_state" not in name
    )
    assert bool(built.taken) is (settings == "pissa")
    assert built.kernels is not None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(64, 64), (7, 33), (300, 1000), (1, 1)])
def test_packed_layers_have_the_sizes_of_packing(bits: int, shape: tuple[int, int]) -> None:
    real = quantized_class(bits)(torch.randn(*shape), None).packed_tensors()
    without = quantized_class(bits)(torch.empty(shape, device="meta"), None)
    kept = {name: tensor for name, tensor in real.items() if "quant_state" not in name}
    assert {name: (buffer.numel(), buffer.dtype) for name, buffer in without.named_buffers()} == {
        name: (tensor.numel(), tensor.dtype) for name, tensor in kept.items()
    }


def test_a_plan_leaves_no_trace_in_the_next_one() -> None:
    """To train the head gives it a matrix of its own, which Transformers notes in the configuration."""
    blueprint = make_blueprint({"model_type": "qwen2", **BASE, "tie_word_embeddings": True}, WHERE)
    plain = TrainConfig(use_lora=True)
    before = blueprint.built(plain, WIDE)
    untied = blueprint.built(TrainConfig.model_validate({"use_lora": True, "modules_to_save": "lm_head"}), WIDE)
    assert untied.weights + untied.adapters > before.weights + before.adapters
    assert blueprint.built(plain.model_copy(update={"seed": 7}), WIDE) == before


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"lora_target_modules": "q_prj"}, "lora_target_modules", 'Did you mean "q_proj"'),
        ({"layers_to_transform": "9"}, "layers_to_transform", "there is no layer 9"),
        ({"rank_pattern": "none=3"}, "rank_pattern", '"none" does not match any adapted layer'),
        ({"modules_to_save": "lm_hed"}, "modules_to_save", 'Did you mean "lm_head"'),
    ],
)
def test_settings_that_name_what_is_not_there_are_refused(settings: dict[str, Any], where: str, what: str) -> None:
    config = TrainConfig.model_validate({"use_lora": True, **settings})
    with pytest.raises(UserError, match=what) as caught:
        make_blueprint({"model_type": "qwen2", **BASE}, WHERE).built(config, WIDE)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "four"}, '"num_hidden_layers" is "four"'),
        ({"num_hidden_layers": 0}, '"num_hidden_layers" is 0'),
        ({"vocab_size": True}, '"vocab_size" is true'),
        ({"num_attention_heads": -1}, '"num_attention_heads" is -1'),
        ({"num_hidden_layers": 10**7}, '"num_hidden_layers" is 10000000'),
        ({"layer_types": 5}, '"layer_types" is 5'),
        ({"tie_word_embeddings": "false"}, '"tie_word_embeddings" is "false"'),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": ["qwen2"]}, '"model_type" is'),
        ({"model_type": "brand_new"}, '"brand_new" is not known'),
        ({"model_type": "brand_new", "auto_map": {}}, "needs its own code"),
        ({"model_type": "vit"}, "vit"),
    ],
)
def test_a_broken_header_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_blueprint({"model_type": "qwen2", **BASE, **changes}, WHERE)


def test_weights_that_training_would_refuse_are_named() -> None:
    for method, named in (("awq", True), ("fp8", True), ("bitsandbytes", False), (None, False)):
        content = {"model_type": "qwen2", **BASE, "quantization_config": {"quant_method": method}}
        notices = make_blueprint(content, WHERE).notices
        assert any(f"stored quantised by {method}, which training refuses" in one for one in notices) is named


@pytest.mark.parametrize(
    ("changes", "fast"),
    [
        ({}, True),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, True),
        ({"use_sliding_window": False, "sliding_window": 8}, True),
        ({"hidden_act": "gelu"}, False),
    ],
)
def test_the_kernels_are_those_that_training_chooses(changes: dict[str, Any], fast: bool) -> None:
    blueprint = make_blueprint({"model_type": "qwen2", **BASE, **changes}, WHERE)
    assert (blueprint.built(TrainConfig(use_lora=True), WIDE).kernels is not None) is fast
    apple = Machine("mps", "a GPU", 2, None, None)
    assert blueprint.built(TrainConfig(use_lora=True), apple).kernels is None
    dropping = TrainConfig.model_validate({"use_lora": True, "use_dora": True, "lora_dropout": 0.1})
    assert blueprint.built(dropping, WIDE).kernels is None


def test_experts_are_counted_apart() -> None:
    mixture = make_blueprint({"model_type": "qwen3_moe", **BASE, **KINDS["qwen3_moe"]}, WHERE)
    assert mixture.experts == 3 * 4 * 3 * 16 * 32  # layers, experts, matrices
    assert mixture.reaches_experts
    assert not mixture.renamed
    assert mixture.largest_read == 4 * 2 * 16 * 32 * 5 // 2  # the embedding
    other = make_blueprint({"model_type": "deepseek_v3", **BASE, **KINDS["deepseek_v3"]}, WHERE)
    assert other.experts
    assert not other.reaches_experts
    dense: Blueprint = make_blueprint({"model_type": "qwen3", **BASE}, WHERE)
    assert (dense.experts, dense.renamed) == (0, False)
    assert not make_blueprint({"model_type": "qwen3_5_text", **BASE, **DELTA}, WHERE).renamed  # only in what they begin


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"output_router_logits": True}, True),
        ({}, False),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.0}, False),
    ],
)
def test_a_load_balancing_loss_that_is_not_trained_is_named(settings: dict[str, Any], named: bool) -> None:
    content = {"model_type": "qwen3_moe", **BASE, **KINDS["qwen3_moe"], **settings}
    assert make_blueprint(content, WHERE).notices == ((BALANCE,) if named else ())
