"""Settings without effect in a run, each with the reason: those of other tools, and ours that others switch off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qingtune.config.methods import IGNORED_WITHOUT_ADAPTERS
from qingtune.config.training import TrainConfig

# TrainingArguments that cannot change a result here, each with the reason that the user sees. Names that would change
# a result (label_smoothing_factor, neftune_noise_alpha, ...) are not listed: they are errors, like any unknown name.
_NO_EFFECT_GROUPS = {
    "the command decides what is done": "do_train do_eval do_predict prediction_loss_only",
    "samples are tokenised before training, so no workers are needed": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order"
    ),
    "a row's format decides which columns are used": "remove_unused_columns label_names length_column_name",
    "to use several devices, start the command with `torchrun`": (
        "deepspeed fsdp fsdp_config accelerator_config parallelism_config local_rank ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout"
    ),
    "samples are concatenated without padding": "group_by_length train_sampling_strategy",
    "the log goes to output_dir, one line every logging_steps": (
        "logging_dir logging_strategy logging_first_step log_level log_level_replica log_on_each_node run_name project "
        "logging_nan_inf_filter disable_tqdm include_num_input_tokens_seen skip_memory_metrics"
    ),
    "checkpoints are safetensors, written by one process": (
        "save_safetensors save_on_each_node save_only_model enable_jit_checkpoint"
    ),
    "the training loop decides this itself": (
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_cache use_liger_kernel liger_kernel_config "
        "torch_compile torch_compile_backend torch_compile_mode tf32 torch_empty_cache_steps auto_find_batch_size "
        "average_tokens_across_devices bf16_full_eval fp16_full_eval fp16_opt_level eval_accumulation_steps "
        "eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics ignore_data_skip debug "
        "restore_callback_states_from_checkpoint"
    ),
}
# TrainingArguments that would change a result and are not supported: ignored while they are switched off, as in a dump
# of all arguments, and an error otherwise, like any unknown name.
_ONLY_IDLE_NAMES = (
    "label_smoothing_factor neftune_noise_alpha push_to_hub push_to_hub_token push_to_hub_model_id hub_model_id "
    "no_cuda push_to_hub_organization hub_token hub_private_repo hub_always_push hub_revision use_cpu use_mps_device "
    "data_seed dataloader_drop_last eval_delay eval_on_start lr_scheduler_kwargs optim_args optim_target_modules "
    "adafactor full_determinism jit_mode_eval use_ipex past_index sharded_ddp mp_parameters torchdynamo ray_scope"
)
ONLY_IDLE = frozenset(_ONLY_IDLE_NAMES.split())
NO_EFFECT = {name: reason for reason, names in _NO_EFFECT_GROUPS.items() for name in names.split()}

# Values of these names that ask for nothing and need no notice.
_INERT = ("none", "", "false", "0", "0.0", "no")


def asks_nothing(name: str, value: object) -> bool:
    """Whether a value of a name in NO_EFFECT or ONLY_IDLE leaves it switched off."""
    text = str(value).lower()  # flags are text
    return value in ([], {}) or text in _INERT or (name == "remove_unused_columns" and text == "true")


def idle_names(given: Mapping[str, Any]) -> dict[str, str]:
    """The names in NO_EFFECT that ask for something, each with the reason."""
    return {
        name: NO_EFFECT[name] for name, value in given.items() if name in NO_EFFECT and not asks_nothing(name, value)
    }


def without_effect(config: TrainConfig, given: Mapping[str, Any]) -> dict[str, str]:
    """The settings without effect in this run, each with the reason.

    Args:
        config: checked and resolved.
        given: what the user gave, by today's names; settings at their defaults ask for nothing.
    """
    found = idle_names(given)
    for reason, names in _switched_off(config):
        found |= {name: reason for name in names if name in given and _differs(config, name)}
    return found


def notice_of(reasons: Mapping[str, str]) -> list[str]:
    """One line that names all settings without effect; none where there are none."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    groups = "; ".join(f"{', '.join(of_reason)} ({reason})" for reason, of_reason in names.items())
    return [f"No effect here: {groups}."] if groups else []


def _switched_off(config: TrainConfig) -> list[tuple[str, tuple[str, ...]]]:
    """Reasons why settings have no effect in a run, and these settings; the best of several reasons comes last."""
    rules = [
        (config.method == "full", "full training has no adapters", IGNORED_WITHOUT_ADAPTERS),
        (config.method != "qlora", "only QLoRA quantises the weights", ("quantization_bit",)),
        (config.val_size == 0, "val_size is 0", ("val_seed",)),
        (not config.has_evaluation, "there is no evaluation data", ("eval_steps", "per_device_eval_batch_size")),
        (config.eval_strategy == "no", 'eval_strategy is "no"', ("per_device_eval_batch_size",)),
        (config.eval_strategy != "steps", f'eval_strategy is "{config.eval_strategy}"', ("eval_steps",)),
        (config.save_strategy != "steps", f'save_strategy is "{config.save_strategy}"', ("save_steps",)),
        (not config.load_best_model_at_end, "load_best_model_at_end is false", ("metric_for_best_model",)),
        (config.max_steps > 0, f"max_steps is {config.max_steps}", ("num_train_epochs",)),
        (config.warmup_steps > 0, f"warmup_steps is {config.warmup_steps:g}", ("warmup_ratio",)),
        (config.lr_scheduler_type == "constant", "lr_scheduler_type is constant", ("warmup_steps", "warmup_ratio")),
        (config.optim == "sgd", "optim is sgd", ("adam_beta1", "adam_beta2", "adam_epsilon")),
    ]
    return [(reason, names) for applies, reason, names in reversed(rules) if applies]


def _differs(config: TrainConfig, name: str) -> bool:
    default = config.logging_steps if name == "eval_steps" else TrainConfig.model_fields[name].default
    return getattr(config, name) != default
