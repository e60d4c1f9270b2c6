"""Parameters counted from config.json are those of Transformers' models, module by module; faults are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import make_model

from qingtune.adapters.full_modules import find_modules, train_in_full
from qingtune.adapters.lora import add_lora
from qingtune.adapters.variants import Variant
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.models.shape import ModelShape, shape_of_config
from qingtune.planning.trained_numbers import find_trained

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "granite": {},
    "smollm3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1]},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "num_key_value_heads": 4,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **{**BASE, **KINDS[kind], **changes})


def shape_of(model: Any) -> ModelShape:
    return shape_of_config(model.config.to_dict(), "config.json")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_transformers(kind: str, tied: bool) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(kind, tie_word_embeddings=tied))
    shape = shape_of(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del linear[next(name for name, module in model.named_modules() if module is head)]
    assert [(module.name, module.shape) for module in shape.linear] == list(linear.items())
    modules = {name for name, module in model.named_modules() if name and list(module.parameters())}
    assert set(shape.module_names()) == modules


def test_a_null_query_rank_is_no_query_rank() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of("deepseek_v3", q_lora_rank=None))
    assert shape_of(model).parameters == sum(parameter.numel() for parameter in model.parameters())


PUBLISHED = {  # sizes as published, and parameters as the model cards count them
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
    shape = shape_of_config(content, name)
    assert shape.parameters == pytest.approx(parameters, rel=0.01)
    outside = sum(module.parameters for module in shape.modules if module.kind in ("embedding", "head", "vector"))
    assert shape.active_body + outside == pytest.approx(active, rel=0.02)


SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "named": {"lora_target_modules": "q_proj,mlp.down_proj"},
    "ranks by layer": {"rank_pattern": "q_proj=8,layers.1.mlp.up_proj=3"},
    "one layer": {"layers_to_transform": "1"},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": "lm_head"},
    "embedding and norm": {"modules_to_save": "embed_tokens,norm"},
    "a whole mlp": {"modules_to_save": "layers.0.mlp"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_trained_numbers_are_those_of_the_adapters(kind: str, settings: str) -> None:
    model = make_model(kind)
    shape = shape_of(model)
    values = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, **SETTINGS[settings]}
    config = TrainConfig.model_validate(values)
    variant = Variant(
        use_dora=config.use_dora,
        rank_pattern=config.rank_pattern or {},
        layers_to_transform=config.layers_to_transform,
    )
    whole = find_modules(model, config.modules_to_save)
    add_lora(model, config.lora_target_modules, 4, 8.0, 0.0, variant=variant, leave=whole)
    train_in_full(model, whole)
    trained = find_trained(shape, config)
    assert trained.numbers == sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    assert shape.parameters + trained.untied + trained.adapters == everything


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"lora_target_modules": "q_prj"}, "lora_target_modules", 'Did you mean "q_proj"'),
        ({"layers_to_transform": "9"}, "layers_to_transform", "there is no layer 9"),
        ({"rank_pattern": "none=3"}, "rank_pattern", '"none" matches none'),
        ({"modules_to_save": "lm_hed"}, "modules_to_save", 'Did you mean "lm_head"'),
    ],
)
def test_settings_that_name_what_is_not_there_are_refused(settings: dict[str, Any], where: str, what: str) -> None:
    config = TrainConfig.model_validate({"use_lora": True, **settings})
    with pytest.raises(UserError, match=what) as caught:
        find_trained(shape_of(make_model("qwen2")), config)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, 'does not say "hidden_size"'),
        ({"num_hidden_layers": "four"}, "\"num_hidden_layers\" is 'four'"),
        ({"num_hidden_layers": 0}, '"num_hidden_layers" is 0'),
        ({"vocab_size": True}, '"vocab_size" is True'),
        ({"num_attention_heads": -1}, '"num_attention_heads" is -1'),
        ({"num_experts": 4, "mlp_only_layers": "all"}, "\"mlp_only_layers\" is 'all'"),
        ({"num_hidden_layers": 10**7}, '"num_hidden_layers" is more than 10,000'),
        ({"hidden_size": 10**300}, '"hidden_size" is more than'),
        ({"layer_types": 5}, '"layer_types" is 5, where a list of texts is wanted'),
        ({"layer_types": [["full_attention"]]}, '"layer_types" is'),
        ({"tie_word_embeddings": "false"}, "\"tie_word_embeddings\" is 'false', where true or false is wanted"),
        ({"use_sliding_window": 1}, '"use_sliding_window" is 1'),
        ({"num_key_value_heads": [2, 1]}, '"num_key_value_heads" is '),
        ({"model_type": None}, "it names no model_type"),
        ({"model_type": ["qwen2"]}, "it names no model_type"),
    ],
)
def test_broken_sizes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shape_of_config({"model_type": "qwen2", **BASE, **changes}, "config.json")


def test_an_unknown_architecture_is_counted_as_llama_and_told() -> None:
    shape = shape_of_config({"model_type": "brand_new", **BASE}, "config.json")
    assert shape.parameters == shape_of_config({"model_type": "llama", **BASE}, "config.json").parameters
    assert '"brand_new" is counted as if it were Llama' in shape.notices[0]
    assert not shape_of_config({"model_type": "llama", **BASE}, "config.json").notices


def test_of_a_model_of_several_parts_the_text_is_counted() -> None:
    nested: dict[str, Any] = {
        "model_type": "some_vl",
        "text_config": {"model_type": "qwen2", **BASE},
        "vision_config": {},
    }
    shape = shape_of_config(nested, "config.json")
    assert shape.parameters == shape_of_config({"model_type": "qwen2", **BASE}, "config.json").parameters
    assert shape.notices == ("Only the language part of this model is counted.",)
    assert shape.plain
    nested["text_config"]["layer_types"] = ["sliding_attention"] * 4
    assert not shape_of_config(nested, "config.json").plain


def test_weights_that_training_would_refuse_are_told() -> None:
    for method, told in (("awq", True), ("fp8", True), ("bitsandbytes", False), (None, False)):
        content = {"model_type": "qwen2", **BASE, "quantization_config": {"quant_method": method}}
        notices = shape_of_config(content, "config.json").notices
        assert any(f"stored quantised by {method}, which training refuses" in one for one in notices) is told


def test_a_published_gemma_that_leaves_out_its_heads_is_counted() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    shape = shape_of_config({"model_type": "gemma3", "text_config": text}, "config.json")
    assert shape.parameters == pytest.approx(3.88e9, rel=0.01)  # the language part of the 4B model


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"use_sliding_window": True, "sliding_window": 8}, False),
        ({"use_sliding_window": False, "sliding_window": 8}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"num_experts": 4}, False),
    ],
)
def test_layers_of_other_kinds_are_noticed(changes: dict[str, Any], plain: bool) -> None:
    assert shape_of_config({"model_type": "qwen2", **BASE, **changes}, "config.json").plain is plain
