"""Attacks by a model folder: its config.json, code and kernels that it names, and adapters hidden in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

from attack_case import (
    CHAT,
    CHECK_TOKENS,
    EVALUATE,
    EXPORT,
    INFER,
    INFER_ADAPTER,
    MERGE,
    PLAN,
    TRAIN,
    Argv,
    Case,
    Expected,
    Place,
    nothing,
    with_word,
)
from attack_values import DEEP, ESCAPES, WRONG_NUMBERS, WRONG_TYPES, broken_files, edited, shown

CONFIG = "model/config.json"
ALL = ("model", "adapter", "rows.jsonl")
LOADING: tuple[Argv, ...] = (INFER, TRAIN, MERGE, EXPORT)  # these read weights
COMMANDS: tuple[Argv, ...] = (*LOADING, PLAN, INFER_ADAPTER, EVALUATE, CHECK_TOKENS)
# Sizes that have to be those of the weights: any other value is refused by whatever loads them.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
# Values of wrong type for what changes a result.
_ODD: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (0, 3, 8, -2, "2", None, 1e300),
    "rms_norm_eps": (-1, float("nan"), float("inf"), "small", None, [1e-6]),
    "rope_theta": (0, -1, float("nan"), "big", None),
    "rope_parameters": (7, [], {"rope_type": "evil"}, {"rope_type": "yarn", "factor": 1e300}, {"rope_theta": "x"}),
    "max_position_embeddings": (0, -5, "long", 10**12, None, [256]),
    "hidden_act": ("__import__", "silu()", None, 5, "relu6x", ["silu"]),
    "model_type": ("evil", "", 5, None, ["qwen2"], "../../etc/passwd", ESCAPES, "llama", "bert", "x" * DEEP),
    "architectures": (5, ["EvilForCausalLM"], [], "Qwen2ForCausalLM", [None]),
    "tie_word_embeddings": ("yes", 2, None, [True]),
    "dtype": ("float7", "float64", "int8", 16, None, ["float32"], "torch.float8_e4m3fn"),
    "layer_types": (5, [], ["evil", "evil"], ["sliding_attention"] * 2, ["full_attention"] * 999),
    "eos_token_id": ("2", -1, 10**9, [[2]], {"a": 2}, 2.5),
    "attention_dropout": (2, "x", float("nan"), -1),
    "use_sliding_window": ("yes", 7),
    "sliding_window": (0, -1, "x"),
    "quantization_config": (5, {}, {"quant_method": "evil"}, {"load_in_4bit": True}, {"quant_method": 5}, []),
    "initializer_range": ("x", float("nan"), 1e300),
}


def config_cases() -> Iterator[Case]:
    """config.json: broken, of wrong types, of impossible sizes."""
    yield from broken_files("config", CONFIG, LOADING, ALL)
    number = 0
    for name in _SIZES:
        for value in (*WRONG_NUMBERS, *WRONG_TYPES)[number % 2 :: 2]:
            number += 1
            yield _config({name: value}, LOADING[number % len(LOADING)], "refused")
    for name, values in _ODD.items():
        for value in values:
            number += 1
            yield _config({name: value}, COMMANDS[number % len(COMMANDS)], "either")
    for argv in (*COMMANDS, CHAT):
        command = argv[0] + "-adapter" * ("adapter" in argv) + "-tokens" * ("check" in argv)
        yield Case("config", f"control-{command}", nothing, (argv,), "fine", ALL, stdin=b"hello\n/quit\n")
    for kind in ("llama", "qwen3"):
        argv = with_word(TRAIN, "model", kind)
        yield Case("config", f"control-{kind}", nothing, (argv,), "fine", (kind, "rows.jsonl"))


def _config(changes: dict[str, Any], argv: Argv, expect: Expected) -> Case:
    (name, value), *_ = changes.items()
    file = "config.json"
    same = {"vocab_size": None}.get(name, 0) == value  # never so: kept values are in the controls
    wanted: Expected = "either" if same else expect
    return Case(
        "config", f"{name}={shown(value)}", edited(CONFIG, changes), (argv,), wanted, ALL,
        names=(file, "model:", "model/", name), tty="\x1b" in str(value),
    )  # fmt: skip


# --- Code and kernels ------------------------------------------------------------------------------------------------

_KERNELS = ("kernels-community/x@rev", "kernels-community/flash-attn", "evil/kernel:fn", "flash_attention_2")
_NAMES = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")


def hub_cases() -> Iterator[Case]:
    """Loaders of native code named in config.json, code of the model's own, adapters hidden in its folder."""
    number = 0
    for name in _NAMES:
        for value in (*_KERNELS, {"": "evil/kernel"}):
            number += 1
            argv = COMMANDS[number % 4]
            yield Case(
                "hub kernels", f"{name}={shown(value)}", edited(CONFIG, {name: value}), (argv,), "either", ALL,
                names=("config.json", "model"), watch="kernels",
            )  # fmt: skip
    for number, spoil in enumerate((_auto_map, _code_of_type, _hidden_adapter, _hidden_foreign, _hidden_broken)):
        for argv in (INFER, TRAIN) if number < 2 else (TRAIN, INFER, EXPORT):
            expect: Expected = "either"  # a message that two things lie in one folder is as good as passing over one
            yield Case(
                "hub kernels", f"{spoil.__name__.strip('_')}-{argv[0]}", spoil, (argv,), expect, ALL, watch="kernels"
            )  # fmt: skip
    yield Case("hub kernels", "control-sdpa", edited(CONFIG, {"attn_implementation": "sdpa"}), (INFER,), "fine")
    yield Case("hub kernels", "control-eager", edited(CONFIG, {"_attn_implementation": "eager"}), (TRAIN,), "fine")


def _auto_map(place: Place) -> None:
    place.write("model/modeling_x.py", f"open({str(place.pwned)!r}, 'w')\n")
    place.edit_json(CONFIG, {"auto_map": {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}})
    place.edit_json("model/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling_x.T", None]}})


def _code_of_type(place: Place) -> None:
    _auto_map(place)
    place.edit_json(CONFIG, {"model_type": "stranger", "architectures": ["M"]})


def _hidden_adapter(place: Place) -> None:
    for path in (place / "adapter").iterdir():
        shutil.copy(path, place / "model" / path.name)


def _hidden_foreign(place: Place) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "adapter" / name, place / "model" / name)
    place.edit_json("model/adapter_config.json", {"base_model_name_or_path": "nobody/evil"})


def _hidden_broken(place: Place) -> None:
    place.write("model/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": ["evil"]}))
