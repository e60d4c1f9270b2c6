"""The settings of all commands but train, each with its name, default, help and check, once."""

from __future__ import annotations

from typing import ClassVar, Literal

from qingtune.config.training import (
    DEFAULT_MODEL,
    IGNORE_FIELDS,
    MAX_DATA_GB,
    MAX_ROW_MB,
    MAX_ROW_TURNS,
    Settings,
    TrainConfig,
    setting,
)
from qingtune.config.types import (
    LEAST_PENALTY,
    MOST_PENALTY,
    MOST_TEMPERATURE,
    CommaList,
    Grid,
    Integer,
    Number,
    Quantizations,
    RepositoryName,
    SettingsOfMethods,
    Space,
    Text,
    TrainingMethods,
)


class ModelSettings(Settings):
    """The settings by which infer, chat, merge and export find a base model and an adapter."""

    base_model: str | None = setting(
        None,
        "Model",
        f"A model folder, a .gguf file, or a hub name (default: the adapter's own base, else {DEFAULT_MODEL}).",
    )
    cache_dir: str | None = setting(None, "Model", "Where downloaded and converted models are kept.")
    hub: Literal["auto", "hf", "modelscope"] = setting("auto", "Model", "Where names are looked up.")
    allow_other_base: bool = setting(
        False, "Model", "Use the adapter even if the base model's weights are not those it was trained on."
    )


class InferConfig(ModelSettings):
    """Settings of `qingtune infer` and `qingtune chat`."""

    lora_model: str | None = setting(None, "Model", "Folder of the adapter; without it the base model answers.")
    load_in_4bit: bool = setting(False, "Model", "Hold the base model's linear layers in 4 bits (NF4).")
    load_in_8bit: bool = setting(False, "Model", "Hold the base model's linear layers in 8 bits.")

    chat: bool = setting(False, "What to answer", "Talk to the model.")
    prompt: Text | None = setting(None, "What to answer", "A prompt (default: a few bundled samples).")
    prompt_file: str | None = setting(
        None, "What to answer", "A JSONL file of prompts; each row comes out again with an answer."
    )
    output_file: str | None = setting(None, "What to answer", "Where prompt_file's answers go (default: stdout).")
    overwrite_output_file: bool = setting(
        False,
        "What to answer",
        "Replace output_file; without it an unfinished one is gone on with, a finished one kept.",
    )
    system_prompt: Text | None = setting(None, "What to answer", "System message (default: the one used in training).")
    ignore_fields: CommaList = setting(None, "What to answer", IGNORE_FIELDS)
    max_row_mb: Number = setting(16, "What to answer", MAX_ROW_MB, gt=0)
    max_row_turns: Integer = setting(1000, "What to answer", MAX_ROW_TURNS, ge=1)
    max_data_gb: Number | None = setting(None, "What to answer", MAX_DATA_GB, gt=0)

    max_new_tokens: Integer = setting(512, "Decoding", "The longest answer, in tokens.", ge=1)
    temperature: Number | None = setting(
        None,
        "Decoding",
        "0: always the likeliest token (default: the model's own setting, else 0.7).",
        ge=0,
        le=MOST_TEMPERATURE,
    )
    top_p: Number | None = setting(
        None,
        "Decoding",
        "Sample from the likeliest tokens that make up this share (model's own, else 0.8).",
        gt=0,
        le=1,
    )
    top_k: Integer | None = setting(
        None, "Decoding", "Sample from this many likeliest tokens; 0: all (model's own, else 20).", ge=0
    )
    repetition_penalty: Number | None = setting(
        None,
        "Decoding",
        "Above 1: tokens that were there already get less likely (model's own, else 1).",
        ge=LEAST_PENALTY,
        le=MOST_PENALTY,
    )
    seed: Integer = setting(42, "Decoding", "Seed of the sampling.", ge=0, lt=2**32)


class ChatOptions(Settings):
    """What /set changes in a chat beside the decoding."""

    stats: Literal["on", "off"] = setting("off", "Chat", "Tell tokens and seconds after each answer.")
    thinking: Literal["fold", "show"] = setting("fold", "Chat", "Count a model's thinking, or show it.")
    history: Literal["on", "off"] = setting("on", "Chat", "Keep what is typed for later chats.")


class MergeConfig(ModelSettings):
    """Settings of `qingtune merge`."""

    lora_model: str = setting(..., "Model", "Folder of the adapter.")
    output_dir: str = setting(..., "Result", "Where the merged model is written.")
    overwrite_output_dir: bool = setting(False, "Result", "Replace an earlier merge in output_dir.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None,
        "Result",
        "The number format in which weights are stored (default: as in the base); float32 rounds nothing.",
    )
    save_in_4bit: bool = setting(
        False,
        "Result",
        "Store linear layers in 4 bits (bitsandbytes NF4); loses quality, and tells how much.",
    )


class ExportConfig(ModelSettings):
    """Settings of `qingtune export`."""

    lora_model: str | None = setting(None, "Model", "Folder of an adapter to merge in; without it the base alone.")

    output_dir: str = setting(
        ..., "Result", "Where the files are written; its last part names the model.", min_length=1
    )
    format: Literal["gguf"] = setting("gguf", "Result", "The format, for llama.cpp, Ollama and programs built on them.")
    quantize: Quantizations = setting(
        ["q8_0"], "Result", "How weights are kept, one file each: f32, f16, bf16, q8_0, q4_0, comma-separated."
    )
    overwrite_output_dir: bool = setting(False, "Result", "Replace an earlier export in output_dir.")
    system_prompt: Text | None = setting(
        None, "Result", "System message in Ollama's Modelfile (default: the one used in training); empty for none."
    )


class EvaluateConfig(ModelSettings):
    """Settings of `qingtune evaluate`."""

    lora_model: str | None = setting(
        None, "Model", "Folder of the adapter; base and adapter are then compared with the base alone."
    )
    before_model: str | None = setting(
        None,
        "Model",
        "The model to compare with (default: an adapter's base; of a merged or fully trained model the one its record "
        "names, if it is on this machine).",
    )
    only_after: bool = setting(False, "Model", "Compare with nothing.")
    load_in_4bit: bool = setting(False, "Model", "Hold the models' linear layers in 4 bits (NF4).")
    load_in_8bit: bool = setting(False, "Model", "Hold the models' linear layers in 8 bits.")

    data: CommaList = setting(
        None,
        "Data",
        'Rows in any form of training; those without an answer are judged by their "form" alone. One file or several, '
        "comma-separated.",
    )
    limit: Integer | None = setting(None, "Data", "Take the first rows only; also those of each lm_eval task.", ge=1)
    system_prompt: Text | None = setting(
        None,
        "Data",
        "System message for rows that have none, given to both models (default: the one used in training).",
    )
    ignore_fields: CommaList = setting(None, "Data", IGNORE_FIELDS)
    max_row_mb: Number = setting(16, "Data", MAX_ROW_MB, gt=0)
    max_row_turns: Integer = setting(1000, "Data", MAX_ROW_TURNS, ge=1)
    max_data_gb: Number | None = setting(None, "Data", MAX_DATA_GB, gt=0)
    max_seq_length: Integer = setting(2048, "Data", "Longer rows have no loss, in tokens.", ge=8)

    skip_generation: bool = setting(False, "Answers", "Losses only.")
    max_new_tokens: Integer = setting(512, "Answers", "The longest answer, in tokens; answers are greedy.", ge=1)
    lm_eval: CommaList = setting(
        None,
        "Answers",
        "Tasks of lm-evaluation-harness, comma-separated names or .yaml files (needs `pip install lm_eval`).",
    )

    output_dir: str = setting(
        ..., "Result", "Where evaluation.json, evaluation.md and the predictions are written.", min_length=1
    )
    overwrite_output_dir: bool = setting(
        False, "Result", "Begin anew; without it an unfinished evaluation is gone on with, a finished one kept."
    )


class PushConfig(Settings):
    """Settings of `qingtune push`."""

    folder: str = setting(..., "What", "The folder to publish: an export, a merged model or an adapter.", min_length=1)
    repo: RepositoryName = setting(..., "Where", "OWNER/NAME on the hub.")
    to: Literal["hf", "modelscope"] = setting("hf", "Where", "Hugging Face or ModelScope.")
    private: bool = setting(False, "Where", "Make a repository that only its owner sees, if there is none yet.")
    confirm: bool = setting(False, "Where", "Upload; without this, only what would be done is shown.")


class ReportConfig(Settings):
    """Settings of `qingtune report`."""

    output_dir: str = setting("./output", "Run", "The folder of the run; report.html is written there.", min_length=1)
    open: bool = setting(False, "Run", "Show the page in the browser.")


class CheckConfig(Settings):
    """Settings of `qingtune check`."""

    data: CommaList = setting(
        None, "Data", "Training data: one file or several, comma-separated (.jsonl .json .csv .parquet, also .gz)."
    )
    eval_data: CommaList = setting(None, "Data", "Evaluation data, looked for in the training data.")
    system_prompt: Text | None = setting(None, "Data", "System message for rows that have none.")
    ignore_fields: CommaList = setting(None, "Data", IGNORE_FIELDS)
    max_row_mb: Number = setting(16, "Data", MAX_ROW_MB, gt=0)
    max_row_turns: Integer = setting(1000, "Data", MAX_ROW_TURNS, ge=1)
    max_data_gb: Number | None = setting(None, "Data", MAX_DATA_GB, gt=0)

    model_name_or_path: str | None = setting(
        None, "Tokens", "The model whose tokenizer and template count tokens (default: none are counted)."
    )
    cache_dir: str | None = setting(None, "Tokens", "Where downloaded and converted models are kept.")
    hub: Literal["auto", "hf", "modelscope"] = setting("auto", "Tokens", "Where names are looked up.")
    max_seq_length: Integer = setting(2048, "Tokens", "The longest sample, in tokens.", ge=8)
    on_long: Literal["drop", "truncate", "raise"] = setting(
        "drop", "Tokens", "What training would do with longer samples; raise makes them faults."
    )

    strict: bool = setting(False, "Report", "Exit with 2 if there is a fault.")
    json_report: bool = setting(False, "Report", "Print the report as JSON.", flag="json")


class PlanConfig(TrainConfig):
    """Settings of `qingtune plan`: those of the run, and how to tell it."""

    needs_data: ClassVar[bool] = False

    calibrate: bool = setting(
        False, "Plan", "Measure this machine's matrix products first, for two seconds, to tell the time of a run."
    )
    gpu_memory_gib: Number | None = setting(
        None,
        "Plan",
        "Plan for an NVIDIA GPU with so much memory (GiB: 24 for a card of 24 GB) instead of this machine.",
        gt=0,
        le=1e6,
    )
    json_report: bool = setting(False, "Plan", "Print the plan as JSON.", flag="json")


class CompareConfig(TrainConfig):
    """Settings of `qingtune compare` besides those of training; output_dir holds the whole comparison."""

    methods: TrainingMethods = setting(
        None,
        "Compare",
        "full, lora, qlora4 and qlora8, comma-separated (default: all four; with grid or space, that of the settings).",
    )
    seeds: Integer = setting(
        1, "Compare", "Trials of each setup, with seed, seed + 1, ...; more than one shows the spread.", ge=1, le=100
    )
    keep_models: Literal["best", "all"] = setting(
        "best",
        "Compare",
        "Whole models that full trials leave: the best one (of the first seed), or all. Adapters are always kept.",
    )
    per_method: SettingsOfMethods = setting(
        None,
        "Compare",
        'Settings of single methods; in a file {"full": {"learning_rate": 2e-5}}. A learning_rate given otherwise is '
        "that of the settings' own method, and the others train at their defaults.",
        words="METHOD.NAME=VALUE",
    )
    grid: Grid = setting(
        None,
        "Compare",
        'Settings to vary, all with all: lora_r=8,16,64 learning_rate=1e-4,2e-4; in a file {"lora_r": [8, 16, 64]}. '
        '"default" leaves a setting out; where values hold commas, ; parts them.',
        words="NAME=A,B",
    )
    space: Space = setting(
        None,
        "Compare",
        "Settings to search: learning_rate=1e-5..1e-3:log lora_r=8,16,64 lora_dropout=0..0.1; needs Optuna.",
        words="NAME=LOW..HIGH",
    )
    trials: Integer = setting(20, "Compare", "Setups that a search tries.", ge=1)
    sampler: Literal["random", "tpe"] = setting(
        "tpe", "Compare", "How a search chooses: at random, or after ten such by what did well (TPE)."
    )
    pruner: Literal["none", "halving"] = setting(
        "none",
        "Compare",
        "halving: at evaluations 1, 2, 4, 8, ... a search goes on only with the better half of what came so far.",
    )
