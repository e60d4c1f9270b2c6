"""The schema of all commands except train: each setting's name, default, help text and check."""

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
    """Base model and adapter of infer, chat, merge, export and evaluate."""

    base_model: str | None = setting(
        None,
        "Model",
        f"A model folder, a .gguf file, or a hub name (default: the adapter's own base, else {DEFAULT_MODEL}).",
    )
    cache_dir: str | None = setting(None, "Model", "Cache of downloaded and converted models.")
    hub: Literal["auto", "hf", "modelscope"] = setting("auto", "Model", "Hub to look names up on.")
    allow_other_base: bool = setting(False, "Model", "Use the adapter even if it was trained on other base weights.")


class InferConfig(ModelSettings):
    """Settings of `qingtune infer` and `qingtune chat`."""

    lora_model: str | None = setting(None, "Model", "Adapter folder (default: none; the base model answers).")
    load_in_4bit: bool = setting(False, "Model", "Load the linear layers of the base model in 4 bits (NF4).")
    load_in_8bit: bool = setting(False, "Model", "Load the linear layers of the base model in 8 bits.")

    chat: bool = setting(False, "What to answer", "Chat with the model.")
    prompt: Text | None = setting(None, "What to answer", "One prompt (default: a few bundled samples).")
    prompt_file: str | None = setting(
        None, "What to answer", "JSONL file of prompts; each row is written back with an answer."
    )
    output_file: str | None = setting(None, "What to answer", "File for the answers to prompt_file (default: stdout).")
    overwrite_output_file: bool = setting(
        False,
        "What to answer",
        "Replace output_file. By default an unfinished file is resumed, and a finished one is kept.",
    )
    system_prompt: Text | None = setting(None, "What to answer", "System message (default: the one used in training).")
    ignore_fields: CommaList = setting(None, "What to answer", IGNORE_FIELDS)
    max_row_mb: Number = setting(16, "What to answer", MAX_ROW_MB, gt=0)
    max_row_turns: Integer = setting(1000, "What to answer", MAX_ROW_TURNS, ge=1)
    max_data_gb: Number | None = setting(None, "What to answer", MAX_DATA_GB, gt=0)

    max_new_tokens: Integer = setting(512, "Decoding", "Maximum length of an answer, in tokens.", ge=1)
    temperature: Number | None = setting(
        None,
        "Decoding",
        "Sampling temperature; 0: greedy (default: the model's own, else 0.7).",
        ge=0,
        le=MOST_TEMPERATURE,
    )
    top_p: Number | None = setting(
        None,
        "Decoding",
        "Sample from the most likely tokens up to this total probability (default: the model's own, else 0.8).",
        gt=0,
        le=1,
    )
    top_k: Integer | None = setting(
        None, "Decoding", "Sample from this many most likely tokens; 0: all (default: the model's own, else 20).", ge=0
    )
    repetition_penalty: Number | None = setting(
        None,
        "Decoding",
        "Above 1: makes tokens that already occurred less likely (default: the model's own, else 1).",
        ge=LEAST_PENALTY,
        le=MOST_PENALTY,
    )
    seed: Integer = setting(42, "Decoding", "Seed of the sampling.", ge=0, lt=2**32)


class ChatOptions(Settings):
    """What /set changes in a chat, in addition to decoding."""

    stats: Literal["on", "off"] = setting("off", "Chat", "Show tokens and seconds after each answer.")
    thinking: Literal["fold", "show"] = setting("fold", "Chat", "Fold thinking into a line, or show it.")
    history: Literal["on", "off"] = setting("on", "Chat", "Keep input for later chats.")


class MergeConfig(ModelSettings):
    """Settings of `qingtune merge`."""

    lora_model: str = setting(..., "Model", "Adapter folder.")
    output_dir: str = setting(..., "Result", "Folder for the merged model.")
    overwrite_output_dir: bool = setting(False, "Result", "Replace an earlier merge in output_dir.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "Result", "Dtype of the stored weights (default: that of the base); float32 rounds nothing."
    )
    save_in_4bit: bool = setting(
        False, "Result", "Store linear layers in 4 bits (bitsandbytes NF4); reports how much quality that costs."
    )


class ExportConfig(ModelSettings):
    """Settings of `qingtune export`."""

    lora_model: str | None = setting(None, "Model", "Adapter folder to merge (default: none; exports the base).")

    output_dir: str = setting(
        ..., "Result", "Folder for the files; its last part becomes the model's name.", min_length=1
    )
    format: Literal["gguf", "gguf_lora"] = setting(
        "gguf",
        "Result",
        "gguf: the model, for llama.cpp, Ollama and tools built on them; gguf_lora: the adapter alone, which llama.cpp "
        "puts on its base (--lora).",
    )
    quantize: Quantizations | None = setting(
        None,
        "Result",
        "Weight types, one file per type: f32, f16, bf16, q8_0, q4_0; with llama-cpp-python also q6_k, q5_k_m, q5_k_s, "
        "q4_k_m, q4_k_s, q3_k_m; comma-separated (default: q8_0; with gguf_lora, f32).",
    )
    overwrite_output_dir: bool = setting(False, "Result", "Replace an earlier export in output_dir.")
    system_prompt: Text | None = setting(
        None, "Result", "System message in the Modelfile for Ollama (default: that of training); empty: none."
    )


class EvaluateConfig(ModelSettings):
    """Settings of `qingtune evaluate`."""

    lora_model: str | None = setting(
        None, "Model", "Adapter folder; the adapter on its base is compared with the base."
    )
    before_model: str | None = setting(
        None,
        "Model",
        "Model to compare with (default: the adapter's base; for a merged or fully trained model, the base named in "
        "its record, if it is on this machine).",
    )
    only_after: bool = setting(False, "Model", "Evaluate one model; compare with none.")
    load_in_4bit: bool = setting(False, "Model", "Load the linear layers of the models in 4 bits (NF4).")
    load_in_8bit: bool = setting(False, "Model", "Load the linear layers of the models in 8 bits.")

    data: CommaList = setting(
        None,
        "Data",
        "Rows in any training format: one file or several, comma-separated. Rows without an answer are judged by their "
        '"form" only.',
    )
    limit: Integer | None = setting(None, "Data", "Use only this many rows, also of each lm_eval task.", ge=1)
    system_prompt: Text | None = setting(
        None, "Data", "System message for rows without one, for both models (default: that of training)."
    )
    ignore_fields: CommaList = setting(None, "Data", IGNORE_FIELDS)
    max_row_mb: Number = setting(16, "Data", MAX_ROW_MB, gt=0)
    max_row_turns: Integer = setting(1000, "Data", MAX_ROW_TURNS, ge=1)
    max_data_gb: Number | None = setting(None, "Data", MAX_DATA_GB, gt=0)
    max_seq_length: Integer = setting(2048, "Data", "Longest row whose loss is measured, in tokens.", ge=8)

    skip_generation: bool = setting(False, "Answers", "Measure losses only; generate no answers.")
    max_new_tokens: Integer = setting(512, "Answers", "Maximum length of an answer, in tokens (greedy).", ge=1)
    lm_eval: CommaList = setting(
        None,
        "Answers",
        "Tasks of lm-evaluation-harness: names or .yaml files, comma-separated (needs `pip install lm_eval`).",
    )

    output_dir: str = setting(
        ..., "Result", "Folder for evaluation.json, evaluation.md and the predictions.", min_length=1
    )
    overwrite_output_dir: bool = setting(
        False, "Result", "Start over. By default an unfinished evaluation is resumed, and a finished one is kept."
    )


class PushConfig(Settings):
    """Settings of `qingtune push`."""

    folder: str = setting(..., "What", "Folder to publish: an export, a merged model or an adapter.", min_length=1)
    repo: RepositoryName = setting(..., "Where", "OWNER/NAME on the hub.")
    to: Literal["hf", "modelscope"] = setting("hf", "Where", "Hugging Face or ModelScope.")
    private: bool = setting(False, "Where", "If the repository does not exist, create it as private.")
    confirm: bool = setting(False, "Where", "Upload. Without this flag the command only shows what it would upload.")


class ReportConfig(Settings):
    """Settings of `qingtune report`."""

    output_dir: str = setting("./output", "Run", "Folder of the run; report.html is written there.", min_length=1)
    open: bool = setting(False, "Run", "Open the page in the browser.")


class CheckConfig(Settings):
    """Settings of `qingtune check`."""

    data: CommaList = setting(
        None, "Data", "Training data: one file or several, comma-separated (.jsonl .json .csv .parquet, also .gz)."
    )
    eval_data: CommaList = setting(
        None, "Data", "Evaluation data; rows that are also in the training data are reported."
    )
    system_prompt: Text | None = setting(None, "Data", "System message for rows without one.")
    ignore_fields: CommaList = setting(None, "Data", IGNORE_FIELDS)
    max_row_mb: Number = setting(16, "Data", MAX_ROW_MB, gt=0)
    max_row_turns: Integer = setting(1000, "Data", MAX_ROW_TURNS, ge=1)
    max_data_gb: Number | None = setting(None, "Data", MAX_DATA_GB, gt=0)

    model_name_or_path: str | None = setting(
        None, "Tokens", "Model whose tokenizer and chat template count the tokens (default: tokens are not counted)."
    )
    cache_dir: str | None = setting(None, "Tokens", "Cache of downloaded and converted models.")
    hub: Literal["auto", "hf", "modelscope"] = setting("auto", "Tokens", "Hub to look names up on.")
    max_seq_length: Integer = setting(2048, "Tokens", "Maximum sample length, in tokens.", ge=8)
    on_long: Literal["drop", "truncate", "raise"] = setting(
        "drop", "Tokens", "What training does with longer samples; with raise, they are errors."
    )

    strict: bool = setting(False, "Report", "Exit with code 2 if a row is faulty.")
    json_report: bool = setting(False, "Report", "Print the report as JSON.", flag="json")


class PlanConfig(TrainConfig):
    """Settings of `qingtune plan`: those of the run, and how to print the plan."""

    needs_data: ClassVar[bool] = False

    calibrate: bool = setting(
        False, "Plan", "Measure matrix products on this machine for two seconds first, to estimate the duration."
    )
    gpu_memory_gib: Number | None = setting(
        None,
        "Plan",
        "Plan for an NVIDIA GPU with this much memory (in GiB; 24 for a 24 GB card) instead of this machine.",
        gt=0,
        le=1e6,
    )
    json_report: bool = setting(False, "Plan", "Print the plan as JSON.", flag="json")


class CompareConfig(TrainConfig):
    """Settings of `qingtune compare`: those of training and these; output_dir holds the whole comparison."""

    methods: TrainingMethods = setting(
        None,
        "Compare",
        "Methods to compare: full, lora, qlora4, qlora8; comma-separated (default: all four; with grid or space, the "
        "configured method).",
    )
    seeds: Integer = setting(
        1, "Compare", "Trials per setup, with seed, seed + 1, ...; more than one shows the spread.", ge=1, le=100
    )
    keep_models: Literal["best", "all"] = setting(
        "best",
        "Compare",
        "Whole models to keep from full training: the best one (of the first seed), or all. Adapters are always kept.",
    )
    per_method: SettingsOfMethods = setting(
        None,
        "Compare",
        'Settings for one method, such as full.learning_rate=2e-5; in a file {"full": {"learning_rate": 2e-5}}. '
        "learning_rate itself applies only to the configured method; the others use their defaults.",
        words="METHOD.NAME=VALUE",
    )
    grid: Grid = setting(
        None,
        "Compare",
        "Values to try, in all combinations: lora_r=8,16,64 learning_rate=1e-4,2e-4; in a file "
        '{"lora_r": [8, 16, 64]}. "default" tries the default. Separate values that contain commas with ";".',
        words="NAME=A,B",
    )
    space: Space = setting(
        None,
        "Compare",
        "Ranges to search: learning_rate=1e-5..1e-3:log lora_r=8,16,64 lora_dropout=0..0.1; needs Optuna.",
        words="NAME=LOW..HIGH",
    )
    trials: Integer = setting(20, "Compare", "Number of setups to try in a search.", ge=1)
    sampler: Literal["random", "tpe"] = setting(
        "tpe", "Compare", "How a search picks setups: random, or tpe (ten at random, then by earlier results)."
    )
    pruner: Literal["none", "halving"] = setting(
        "none",
        "Compare",
        "halving: at evaluations 1, 2, 4, 8, ... stop trials that are worse than half of the earlier ones.",
    )
