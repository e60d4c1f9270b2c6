"""What settings mean together: those that contradict each other, and defaults that depend on others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from qingtune.config.methods import REFUSED_WITHOUT_ADAPTERS, Method
from qingtune.config.training import TrainConfig

# Near the best of those tried on Qwen2.5-Coder-0.5B, half or less of what a smaller one wanted (docs/measurements.md).
_LEARNING_RATES: dict[Method, float] = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
# AdamW moves each weight by about the learning rate a step, whatever its gradient; a model's weights are about 0.02.
_MOST_LEARNING_RATE = 1.0
# Above these, runs seldom learn anything; the QLoRA guide goes up to 1e-3.
_HIGH_LEARNING_RATES: dict[Method, float] = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}

Training = TypeVar("Training", bound=TrainConfig)


def conflicts(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Settings that are each right by themselves and wrong together: their names, what is wrong, the fix."""
    if config.needs_data and not config.data_path:
        fix = "Pass a data file, for example --data_path data/store_xhs_sft_samples.jsonl."
        yield ("data_path",), "data_path is missing", fix
    if config.bf16 and config.fp16:
        fix = "Set one, or remove both to let the hardware decide."
        yield ("bf16", "fp16"), "bf16 and fp16 are both true", fix
    if config.samples_per_step and config.gradient_accumulation_steps != 1:
        what = "samples_per_step and gradient_accumulation_steps both say how many samples a step has"
        yield ("gradient_accumulation_steps", "samples_per_step"), what, "Remove gradient_accumulation_steps."
    if config.shard != "none" and config.eval_samples:
        what = "eval_samples answers in one process, and shard leaves each with a part of the model"
        yield ("eval_samples", "shard"), what, "Remove eval_samples, or set shard none."
    if config.shard != "none" and config.fp16:
        what = "fp16 scales losses, which each process of a sharded run would do by itself"
        yield ("fp16", "shard"), what, "Use bf16, or set shard none."
    if config.max_steps == 0:
        yield ("max_steps",), "max_steps is 0", "Set a number of steps, or -1 to use num_train_epochs."
    if config.optim != "sgd" and _peak(config) > _MOST_LEARNING_RATE:
        what = f"learning_rate {_about_peak(config)} moves every weight by about that much in each AdamW step"
        fix = "Choose one near the default (2e-5 for full training, 2e-4 for adapters)."
        yield ("learning_rate", "loraplus_lr_ratio", "optim"), what, fix
    yield from _conflicts_of_evaluation(config)
    given = [name for name in REFUSED_WITHOUT_ADAPTERS if getattr(config, name) != _default(name)]
    if config.method == "full" and given:
        what = f"{', '.join(given)} {'need' if len(given) > 1 else 'needs'} adapters"
        yield (*given, "use_lora", "use_qlora"), what, "Set use_lora or use_qlora."
    start = config.init_lora_weights
    if config.method == "qlora" and start in ("pissa", "pissa_niter_16", "olora"):
        what = (
            f"init_lora_weights {start} subtracts the initial adapters from the weights; in QLoRA the rest would then "
            "be quantised again"
        )
        fix = "Choose use_lora, or another init_lora_weights."
        yield ("init_lora_weights", "use_qlora", "use_lora"), what, fix


def _conflicts_of_evaluation(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    rows, strategy = ("eval_data_path", "val_size"), config.eval_strategy
    if config.eval_data_path and config.val_size > 0:
        fix = "Set one: a separate file, or a part of the training data."
        yield rows, "eval_data_path and val_size are both given", fix
    if config.val_size >= 1 and config.val_size != int(config.val_size):
        what = f"val_size {config.val_size} is neither a share below 1 nor a whole number of rows"
        yield ("val_size",), what, "For example 0.1 or 50."
    if strategy in ("steps", "epoch") and not config.has_evaluation:
        what = f'eval_strategy is "{strategy}", but there is no evaluation data'
        yield ("eval_strategy", *rows), what, 'Set eval_data_path or val_size, or set eval_strategy to "no".'
    if config.eval_samples > 0 and (not config.has_evaluation or strategy == "no"):
        fix = 'Set eval_data_path or val_size, and an eval_strategy other than "no".'
        yield ("eval_samples", *rows, "eval_strategy"), "eval_samples needs evaluations", fix
    if config.load_best_model_at_end and not config.has_evaluation:
        what = "load_best_model_at_end needs evaluations"
        yield ("load_best_model_at_end", *rows), what, "Set eval_data_path or val_size."
    if config.load_best_model_at_end and strategy == "no":
        what = 'load_best_model_at_end needs evaluations, but eval_strategy is "no"'
        yield ("load_best_model_at_end", "eval_strategy"), what, 'Set eval_strategy to "steps" or "epoch".'
    if config.greater_is_better:
        what = "greater_is_better is true, but a smaller eval_loss is better"
        yield ("greater_is_better",), what, "Leave it out."


def resolve(config: Training) -> tuple[Training, list[str]]:
    """Fill in the settings whose defaults depend on others; each choice comes with its reason."""
    chosen: dict[str, Any] = {}
    reasons: list[str] = []
    usual = _LEARNING_RATES[config.method]
    if config.learning_rate is None:
        chosen["learning_rate"] = usual
        reasons.append(f"learning_rate = {usual:g}, the default of {config.method} training.")
    if config.optim != "sgd" and _peak(config) > _HIGH_LEARNING_RATES[config.method]:
        reasons.append(
            f"Warning: learning_rate {_about_peak(config)} is so high that the model may not learn; the default is "
            f"{usual:g}."
        )
    if config.method != "full":
        reasons += _about_alpha(config)
        if config.lora_alpha is None:
            chosen["lora_alpha"] = float(2 * config.lora_r)
    if config.eval_strategy is None:
        chosen["eval_strategy"] = "epoch" if config.has_evaluation else "no"
    if config.eval_steps is None:
        chosen["eval_steps"] = config.logging_steps
    if config.use_lora and config.use_qlora:
        reasons.append("use_lora and use_qlora are both true; training with QLoRA (LoRA on quantised weights).")
    if config.lora_target_modules == ["all"]:
        chosen["lora_target_modules"] = None
    if config.report_to and "none" in [name.lower() for name in config.report_to]:
        chosen["report_to"] = None
    return config.model_copy(update=chosen), reasons


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of training's settings, with the method and the rank of a run."""
    decided = {name: settings[name] for name in ("use_lora", "use_qlora", "lora_r") if name in settings}
    resolved = resolve(TrainConfig.model_validate(decided))[0].model_dump(mode="json")
    return resolved | {name: _default(name) for name in decided}


def _default(name: str) -> Any:
    return TrainConfig.model_fields[name].default


def _peak(config: TrainConfig) -> float:
    """The largest learning rate of any parameter; of the method's default, where none is given."""
    return (config.learning_rate or _LEARNING_RATES[config.method]) * (config.loraplus_lr_ratio or 1)


def _about_peak(config: TrainConfig) -> str:
    rate, ratio = config.learning_rate or _LEARNING_RATES[config.method], config.loraplus_lr_ratio
    return f"{rate:g} times loraplus_lr_ratio {ratio:g}" if ratio else f"{rate:g}"


def _about_alpha(config: TrainConfig) -> list[str]:
    """Why adapters are scaled as they are, if the user did not choose or chose a scale that teaches little."""
    default, alpha = 2 * config.lora_r, config.lora_alpha
    if alpha is None:
        scaled = "so the adapter scale is 2 at any rank"
        if config.use_rslora:
            scaled = f"with use_rslora the adapter scale is lora_alpha / sqrt(lora_r) = {2 * config.lora_r**0.5:.4g}"
        return [f"lora_alpha = {default}, twice lora_r, {scaled}."]
    if config.use_rslora or alpha >= config.lora_r / 2:
        return []
    return [
        f"lora_alpha {alpha:g} at lora_r {config.lora_r} gives an adapter scale of {alpha / config.lora_r:.3g}, with "
        f"which adapters learn slowly (docs/measurements.md). Leave lora_alpha out (default {default}), or raise "
        "learning_rate."
    ]
