"""The schema: each setting's name, default, help text and check. Files, flags, docs and the JSON Schema come from it.

This file holds the settings of training; commands.py holds those of the other commands.
"""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qingtune.config.methods import Method, TrainingMethod, method_of
from qingtune.config.types import (
    AlphaPattern,
    CommaList,
    Integer,
    Number,
    Numbers,
    RankPattern,
    Start,
    Strategy,
    Text,
    auto_or_switch,
    whole_number,
)

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


class Settings(BaseModel):
    """Base class of all settings: unknown names are errors, and checked values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_none(cls, values: Any) -> Any:
        """Read the text "null" from flags and grids as None, for settings that may be None."""
        if not isinstance(values, dict):
            return values  # the model refuses it with a reason
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        given = cast("dict[str, Any]", values)
        return {name: None if value == "null" and name in optional else value for name, value in given.items()}


def setting(
    default: Any, group: str, description: str, *, flag: str = "", words: str | None = None, **checks: Any
) -> Any:
    """A field with its help text and its heading in --help and the docs.

    Args:
        flag: a second name of the flag.
        words: how help shows one word of a flag that takes several words, up to the next flag.
    """
    extra: dict[str, Any] = {"group": group}
    extra |= {name: given for name, given in (("flag", flag), ("words", words)) if given}
    return Field(default, description=description, json_schema_extra=extra, **checks)


# Shared by every command that reads rows.
IGNORE_FIELDS = (
    "Fields of rows and turns to ignore, comma-separated. Without this, a field that would change what a row teaches "
    "(such as label, tools, weight) is an error."
)
MAX_ROW_MB = "Largest row, in MB; a larger row is an error."
MAX_ROW_TURNS = "Most turns in a row; a row with more is an error."
MAX_DATA_GB = "Memory limit for the rows, in GB (default: half of the free memory)."


class TrainConfig(Settings):
    """Settings of `qingtune train`. Names and meanings follow Transformers' TrainingArguments where it has them."""

    needs_data: ClassVar[bool] = True

    model_name_or_path: str = setting(
        DEFAULT_MODEL, "Model", "A model folder, a .gguf file, or a name on a model hub.", min_length=1
    )
    cache_dir: str | None = setting(
        None, "Model", "Cache of downloaded and converted models (default: ~/.cache/qingtune)."
    )
    hub: Literal["auto", "hf", "modelscope"] = setting(
        "auto", "Model", "Hub to look names up on: hf, modelscope, or auto (hf, then modelscope)."
    )

    use_lora: bool = setting(False, "Method", "Train low-rank adapters on frozen weights (LoRA).")
    use_qlora: bool = setting(False, "Method", "LoRA on quantised weights (QLoRA); see quantization_bit.")
    quantization_bit: Annotated[Literal[4, 8], BeforeValidator(whole_number)] = setting(
        4, "Method", "QLoRA bits per weight: 4 (NF4, double quantisation) or 8 (int8, one scale per row)."
    )
    lora_r: Integer = setting(16, "Method", "Rank of the adapters.", ge=1, le=65536)
    lora_alpha: Number | None = setting(
        None, "Method", "The adapter scale is lora_alpha / lora_r (default: twice lora_r).", gt=0, le=65536
    )
    lora_dropout: Number = setting(0.0, "Method", "Dropout on the input of the adapters.", ge=0, lt=1)
    lora_target_modules: CommaList = setting(
        None,
        "Method",
        'Layers to adapt: comma-separated names. "all" or null: every linear layer except the output head, and the '
        "experts of mixtures.",
    )

    use_dora: bool = setting(
        False, "Adapters", "DoRA: train the magnitude of each weight row separately from its direction. Slower."
    )
    use_rslora: bool = setting(
        False, "Adapters", "rsLoRA: scale adapters by lora_alpha / sqrt(lora_r); for high ranks."
    )
    init_lora_weights: Start = setting(
        "default",
        "Adapters",
        "Initial adapter weights. default and gaussian start with no change to the base. pissa starts from the largest "
        "singular values (pissa_niter_16: approximately, and faster), olora from a QR decomposition.",
    )
    loraplus_lr_ratio: Number | None = setting(
        None,
        "Adapters",
        "LoRA+: multiply the learning rate of the B matrices (and of vectors, as in PEFT) by this; the paper uses 16.",
        ge=1,
    )
    rank_pattern: RankPattern = setting(
        None, "Adapters", "Rank per layer: a JSON object, or q_proj=8,layers.0.mlp.up_proj=32."
    )
    alpha_pattern: AlphaPattern = setting(None, "Adapters", "lora_alpha per layer, in the same form.")
    layers_to_transform: Numbers = setting(
        None, "Adapters", "Decoder layers to adapt, by number, such as 0-3,7 (default: all)."
    )
    modules_to_save: CommaList = setting(
        None,
        "Adapters",
        "Modules to train and save in full (fp32) together with the adapters, such as lm_head,embed_tokens,norm.",
    )

    data_path: CommaList = setting(
        None, "Data", "Training data: one file or several, comma-separated (.jsonl .json .csv .parquet, also .gz)."
    )
    eval_data_path: CommaList = setting(None, "Data", "Evaluation data, in the same formats.")
    val_size: Number = setting(
        0.0,
        "Data",
        "Rows to hold out for evaluation if eval_data_path is not set: a share (below 1) or a number.",
        ge=0,
    )
    val_seed: Integer | None = setting(
        None, "Data", "Seed that selects the val_size rows (default: seed).", ge=0, lt=2**32
    )
    max_seq_length: Integer = setting(2048, "Data", "Maximum sample length, in tokens.", ge=8)
    on_long: Literal["drop", "truncate", "raise"] = setting(
        "drop", "Data", "For longer samples: drop them, truncate their end, or raise an error."
    )
    on_bad_row: Literal["raise", "skip"] = setting(
        "raise", "Data", "For rows that cannot be used: raise an error, or skip and count them."
    )
    system_prompt: Text | None = setting(
        None, "Data", "System message for rows without one (default: that of the model's chat template)."
    )
    ignore_fields: CommaList = setting(None, "Data", IGNORE_FIELDS)
    max_row_mb: Number = setting(16, "Data", MAX_ROW_MB, gt=0)
    max_row_turns: Integer = setting(1000, "Data", MAX_ROW_TURNS, ge=1)
    max_data_gb: Number | None = setting(None, "Data", MAX_DATA_GB, gt=0)

    output_dir: str = setting("./output", "Run", "Folder for the result.", min_length=1)
    overwrite_output_dir: bool = setting(False, "Run", "Replace the result of an earlier run in output_dir.")
    dry_run: bool = setting(False, "Run", "Print the plan (memory and time) and stop before weights are loaded.")
    resume_from_checkpoint: Annotated[bool | str, BeforeValidator(auto_or_switch)] = setting(
        "auto", "Run", "auto: resume the run in output_dir, if there is one; false: start over; or a checkpoint folder."
    )
    seed: Integer = setting(42, "Run", "Seed of data order, adapter initialisation and dropout.", ge=0, lt=2**32)

    per_device_train_batch_size: Integer = setting(8, "Batches", "Samples per micro-batch on each device.", ge=1)
    per_device_eval_batch_size: Integer = setting(8, "Batches", "Samples per evaluation batch on each device.", ge=1)
    gradient_accumulation_steps: Integer = setting(1, "Batches", "Micro-batches per optimizer step.", ge=1)
    samples_per_step: Integer | None = setting(
        None,
        "Batches",
        "Samples per optimizer step, over all processes, whose number then changes nothing but the speed; "
        "gradient_accumulation_steps follows from it (default: the micro-batches of all processes).",
        ge=1,
    )
    num_train_epochs: Number = setting(3.0, "Batches", "Passes over the data.", gt=0, le=10_000)
    max_steps: Integer = setting(
        -1, "Batches", "Optimizer steps; if above 0, overrides num_train_epochs.", ge=-1, le=10**9
    )

    learning_rate: Number | None = setting(
        None, "Optimizer", "Peak learning rate (default: 2e-5 full, 2e-4 LoRA and QLoRA).", gt=0
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        setting("linear", "Optimizer", "Learning-rate schedule after the warm-up.")
    )
    warmup_steps: Number = setting(0, "Optimizer", "Warm-up steps; below 1, a share of all steps.", ge=0)
    warmup_ratio: Number = setting(
        0.0, "Optimizer", "Warm-up as a share of all steps, if warmup_steps is 0.", ge=0, le=1
    )
    weight_decay: Number = setting(0.0, "Optimizer", "Decoupled weight decay, except on biases and norms.", ge=0, le=1)
    max_grad_norm: Number = setting(1.0, "Optimizer", "Clip the gradient norm to this; 0: no clipping.", ge=0)
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "sgd",
    ] = setting(
        "adamw_torch_fused",
        "Optimizer",
        "Optimizer. The 8-bit ones keep optimizer states in 8 bits and, in full training on a CPU, weights and "
        "gradients in 16 bits. The paged ones need an NVIDIA GPU.",
    )
    adam_beta1: Number = setting(0.9, "Optimizer", "AdamW's first decay rate.", ge=0, lt=1)
    adam_beta2: Number = setting(0.999, "Optimizer", "AdamW's second decay rate.", ge=0, lt=1)
    adam_epsilon: Number = setting(1e-8, "Optimizer", "AdamW's epsilon.", gt=0, le=1)

    logging_steps: Integer = setting(10, "Log, evaluate, save", "Steps between log lines.", ge=1)
    eval_strategy: Strategy | None = setting(
        None, "Log, evaluate, save", "When to evaluate (default: each epoch if there is evaluation data)."
    )
    eval_steps: Integer | None = setting(
        None, "Log, evaluate, save", "Steps between evaluations (default: logging_steps).", ge=1
    )
    eval_samples: Integer = setting(
        0,
        "Log, evaluate, save",
        "At each evaluation, answer this many rows (the first ones; greedy with a repetition penalty of 1.1, up to 256 "
        "tokens) and write the answers to eval_samples.jsonl.",
        ge=0,
    )
    save_strategy: Strategy = setting("steps", "Log, evaluate, save", "When to save a checkpoint.")
    save_steps: Integer = setting(500, "Log, evaluate, save", "Steps between checkpoints.", ge=1)
    save_total_limit: Integer | None = setting(
        None, "Log, evaluate, save", "Checkpoints to keep, in addition to the best one.", ge=1
    )
    load_best_model_at_end: bool = setting(
        False, "Log, evaluate, save", "The result is the weights with the best evaluation, not the last ones."
    )
    metric_for_best_model: Literal["eval_loss", "loss"] | None = setting(
        None, "Log, evaluate, save", "Metric that decides which evaluation is best: eval_loss."
    )
    greater_is_better: bool | None = setting(
        None, "Log, evaluate, save", "Whether a greater metric is better; for a loss, false."
    )
    report_to: CommaList = setting(
        ["tensorboard"],
        "Log, evaluate, save",
        "Trackers, comma-separated: tensorboard, wandb, swanlab, mlflow, trackio, comet_ml, clearml, ...; or none.",
    )

    gradient_checkpointing: Annotated[bool | Literal["auto"], BeforeValidator(auto_or_switch)] = setting(
        "auto",
        "Hardware",
        "Recompute activations in the backward pass: less memory, about 1.4 times the compute. true: in all layers; "
        "false: in none; auto: in as many as the free memory requires (with general kernels: in none, and in all once "
        "memory runs out).",
    )
    shard: Literal["none", "layers"] = setting(
        "none",
        "Hardware",
        "With several processes: none (each holds the whole model), or layers (each holds a part of every layer, and "
        "all of one only while it computes with it).",
    )
    bf16: bool | None = setting(None, "Hardware", "Train in bfloat16 (default: if the hardware supports it).")
    fp16: bool | None = setting(None, "Hardware", "Train in float16; GPUs only.")

    dataloader_num_workers: Integer = setting(0, "No effect here", "Samples are tokenised before training.", ge=0)
    deepspeed: dict[str, Any] | str | None = setting(
        None, "No effect here", "To use several devices, start the command with `torchrun`."
    )
    remove_unused_columns: bool = setting(True, "No effect here", "Columns that a format does not use are ignored.")

    @property
    def method(self) -> Method:
        """full, lora or qlora; use_qlora takes precedence over use_lora, because scripts set both."""
        return method_of(self.use_lora, self.use_qlora)

    def samples_a_step(self, processes: int = 1) -> int:
        """Samples of an optimizer step, over all processes."""
        each = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.samples_per_step or each * processes

    @property
    def has_evaluation(self) -> bool:
        """Whether there is data to evaluate on."""
        return bool(self.eval_data_path) or self.val_size > 0

    @property
    def training_method(self) -> TrainingMethod:
        """The method, with the bits of QLoRA: full, lora, qlora4 or qlora8."""
        if self.method == "qlora":
            return "qlora4" if self.quantization_bit == 4 else "qlora8"
        return self.method


# Names of settings in older scripts.
ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
