"""The main job end to end on a tiny model, by every method: train, infer, chat, merge, and the same commands again."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import make_model, make_tokenizer, write_jsonl

from qingtune.cli import main
from qingtune.data.format import read_conversations
from qingtune.runs.record import SETTINGS

ANSWER = "Fresh 面包"
QUESTION = "Greet.\n\nShop 3"
STEPS, LOGGED = 16, 4
CONFIG = """{
  "_how": "by this test", "model_name_or_path": "WORK/base",
  "data_path": "WORK/t.jsonl", "eval_data_path": "WORK/t.jsonl",
  "per_device_train_batch_size": 8, "max_steps": 16, "lora_r": 64, "learning_rate": 0.01, "adam_beta2": 0.95,
  "lr_scheduler_type": "cosine", "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 16, "report_to": "none"
}"""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"use_lora": True},
    "qlora4": {"use_qlora": True},
    "qlora8": {"use_qlora": True, "quantization_bit": 8},
    "full": {},
}
ADAPTERS = [name for name in METHODS if name != "full"]
SAMPLING = ("--max_new_tokens", "12", "--temperature", "0")


def call(*argv: str | Path, stdin: str = "") -> tuple[int, str, str]:
    """Run a command in this process; returns its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.stdin", io.StringIO(stdin)):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that a few steps can teach, and data that always has the same answer."""
    folder = tmp_path_factory.mktemp("work")
    model = make_model("qwen2")
    model.get_input_embeddings().weight.data.mul_(15)  # tied to the head: without this no logit can get large
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    write_jsonl(
        folder / "t.jsonl", [{"instruction": "Greet.", "input": f"Shop {n}", "output": ANSWER} for n in range(8)]
    )
    return folder


@pytest.fixture(scope="module")
def trained(work: Path) -> Callable[[str], Path]:
    """A function that trains by a method, once, from a JSON file, and gives the output folder."""

    def output_of(method: str) -> Path:
        output = work / f"output_{method}"
        if not output.exists():
            settings = (
                json.loads(CONFIG.replace("WORK", work.as_posix())) | METHODS[method] | {"output_dir": str(output)}
            )
            (work / f"{method}.json").write_text(json.dumps(settings), encoding="utf-8")
            code, out, err = call("train", "--config_file", work / f"{method}.json")
            assert code == 0, err
            (work / f"{method}.stdout").write_text(out, encoding="utf-8")
        return output

    return output_of


def infer(*argv: str | Path) -> str:
    code, out, err = call("infer", *argv, *SAMPLING)
    assert code == 0, err
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Training and its result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_output_folder_holds_what_the_guide_shows_and_the_record(trained: Callable[[str], Path], method: str) -> None:
    output = trained(method)
    model_files = ["config.json", "model.safetensors"]
    adapter_files = ["adapter_config.json", "adapter_model.safetensors"]
    wanted = [*(model_files if method == "full" else adapter_files), "tokenizer.json", "tokenizer_config.json"]
    for name in [*wanted, "chat_template.jinja", "qingtune.json", "train_config.json", "metrics.jsonl"]:
        assert (output / name).stat().st_size > 0, name
    for name in adapter_files if method == "full" else model_files:
        assert not (output / name).exists(), name
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []
    assert not list(output.parent.glob(f".{output.name}*"))


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_whole_and_show_learning(trained: Callable[[str], Path], method: str) -> None:
    lines = [json.loads(line) for line in (trained(method) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(LOGGED, STEPS + 1, LOGGED))
    for line in steps:
        keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "peak_bytes"}
        assert keys <= set(line)
        assert all(math.isfinite(line[key]) and line[key] > 0 for key in keys)
    assert steps[-1]["epoch"] == STEPS
    assert steps[-1]["loss"] < steps[0]["loss"] / 4
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluated) == [0, STEPS]
    assert evaluated[STEPS] < evaluated[0] / 4


@pytest.mark.parametrize("method", METHODS)
def test_stdout_ends_with_a_command_that_works(work: Path, trained: Callable[[str], Path], method: str) -> None:
    output = trained(method)
    *_, result, talk = (work / f"{method}.stdout").read_text(encoding="utf-8").splitlines()
    assert result == f"Result: {output}"
    program, *argv = shlex.split(talk.removeprefix("Chat with it: "))
    assert program == "qingtune"
    code, out, _ = call(*argv, *SAMPLING, stdin="Greet.\n")
    assert (code, out.count("\n")) == (0, 1)


@pytest.mark.parametrize("method", METHODS)
def test_same_run_again_says_finished_and_changes_nothing(
    work: Path, trained: Callable[[str], Path], method: str
) -> None:
    output = trained(method)
    before = contents(output)
    halved = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--logging_steps", "3")
    for config, flags in ((work / f"{method}.json", ()), (work / f"{method}.json", halved), (output / SETTINGS, ())):
        code, out, err = call("train", "--config_file", config, *flags)
        assert (code, out) == (0, "")
        assert "already finished" in err
    assert contents(output) == before


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--lora_r", "4"), ["lora_r was 64, is 4", "lora_alpha was 128.0, is 8.0"]),
        (("--seed", "7", "--use_lora", "false"), ["seed was 42, is 7", "use_lora was true, is false"]),
        (("--per_device_train_batch_size", "4"), ["samples a step was 8, is 4"]),
        (("--data_path", "{work}/other.jsonl"), ["data was ", "data_path was "]),
    ],
    ids=lambda value: value[0],
)
def test_other_settings_for_the_same_folder_are_refused(
    work: Path, trained: Callable[[str], Path], flags: tuple[str, ...], changed: list[str]
) -> None:
    output = trained("lora")
    write_jsonl(work / "other.jsonl", [{"instruction": "Else.", "output": "Yes."}])
    before = contents(output)
    code, out, err = call("train", "--config_file", work / "lora.json", *(flag.format(work=work) for flag in flags))
    assert (code, out) == (2, "")
    complaint = err.partition("error: ")[2]
    for line in (str(output), *changed, "--overwrite_output_dir"):
        assert line in complaint
    assert "learning_rate was" not in complaint
    assert contents(output) == before


def test_overwriting_trains_anew(work: Path, tmp_path: Path, trained: Callable[[str], Path]) -> None:
    trained("lora")
    again = ("train", "--config_file", work / "lora.json", "--max_steps", "1", "--output_dir", tmp_path / "out")
    assert call(*again)[0] == 0
    assert call(*again, "--seed", "7")[0] == 2
    assert call(*again, "--seed", "7", "--overwrite_output_dir")[0] == 0
    assert call("train", "--config_file", tmp_path / "out" / SETTINGS, "--overwrite_output_dir")[0] == 0  # its own
    assert json.loads((tmp_path / "out" / "train_config.json").read_text(encoding="utf-8"))["seed"] == 7


# --- Inference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_model_answers_as_it_was_taught(work: Path, trained: Callable[[str], Path], method: str) -> None:
    output = trained(method)
    assert infer("--base_model", work / "base", "--prompt", QUESTION).strip() != ANSWER
    if method == "full":
        assert infer("--base_model", output, "--prompt", QUESTION) == f"{ANSWER}\n"
        return
    bits = {"qlora4": ["--load_in_4bit"], "qlora8": ["--load_in_8bit"]}.get(method, [])
    assert infer("--lora_model", output, *bits, "--prompt", QUESTION) == f"{ANSWER}\n"
    assert infer("--base_model", work / "base", "--lora_model", output, "--prompt", QUESTION) == f"{ANSWER}\n"


def test_prompt_file_comes_out_with_answers(tmp_path: Path, trained: Callable[[str], Path]) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Greet.", "input": "Shop 1", "output": "not looked at", "id": 7},
        {"prompt": QUESTION, "标签": ["面包"]},
        {"messages": [{"role": "user", "content": QUESTION}]},
    ]
    asked = ("--lora_model", trained("lora"), "--prompt_file", write_jsonl(tmp_path / "p.jsonl", rows))
    wanted = [{**row, "answer": ANSWER, "answer_ended": True} for row in rows]
    printed = infer(*asked)
    assert [json.loads(line) for line in printed.splitlines()] == wanted
    assert infer(*asked, "--output_file", tmp_path / "a.jsonl") == ""
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == printed


def test_chat_obeys_its_commands(tmp_path: Path, trained: Callable[[str], Path]) -> None:
    saved = tmp_path / "chat.jsonl"
    script = [
        ("/undo", "[nothing to undo]"),
        ("/retry", "[nothing to retry]"),
        ("/help", "/save FILE"),
        ("Greet.", None),
        ("/retry", None),
        ("/undo", "[taken back]"),
        ("/undo", "[nothing to undo]"),
        ("/system", "[system: none (the template's default)]"),
        ("/system 你是店主。", "[system: 你是店主。]"),
        ("Greet.", None),
        ("/save", "/save needs a file name."),
        (f"/save {saved}", f"[added to {saved}]"),
        (f"/save {tmp_path / 'none' / 'x'}", "cannot be written"),
        ("/clear", "[cleared]"),
        ("/undo", "[nothing to undo]"),
        ("/zzz", "/zzz is not a command"),
        ("", None),
        ("/exit", None),
        ("Not answered.", None),
    ]
    code, out, err = call(
        "chat", "--lora_model", trained("lora"), *SAMPLING, stdin="".join(f"{line}\n" for line, _ in script)
    )
    assert code == 0
    rest = err
    for note in filter(None, (note for _, note in script)):
        assert note in rest
        rest = rest.partition(note)[2]  # each after the one before
    first, again, last = out.splitlines()
    assert first == again == ANSWER
    (conversation,) = read_conversations([str(saved)], None, "raise").conversations
    turns = [(message.role, message.content) for message in conversation.messages]
    assert turns == [("system", "你是店主。"), ("user", "Greet."), ("assistant", last)]


# --- Merging, and adapters on the wrong base -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTERS)
def test_merged_model_answers_without_the_adapter(tmp_path: Path, trained: Callable[[str], Path], method: str) -> None:
    code, out, err = call("merge", "--lora_model", trained(method), "--output_dir", tmp_path / "merged")
    assert (code, "the model equals base + adapter" in err) == (0, True)
    assert str(tmp_path / "merged") in out
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "qingtune.json"} <= names
    assert "adapter_config.json" not in names
    assert infer("--base_model", tmp_path / "merged", "--prompt", QUESTION) == f"{ANSWER}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merged_model_is_replaced_only_if_asked(tmp_path: Path, trained: Callable[[str], Path]) -> None:
    merging = ("merge", "--lora_model", trained("lora"), "--output_dir", tmp_path / "merged")
    assert call(*merging)[0] == 0
    before = contents(tmp_path / "merged")
    code, _, err = call(*merging)
    assert (code, "--overwrite_output_dir" in err) == (2, True)
    assert contents(tmp_path / "merged") == before
    assert call(*merging, "--overwrite_output_dir")[0] == 0
    assert contents(tmp_path / "merged")["model.safetensors"] == before["model.safetensors"]


# --- Exporting and publishing ----------------------------------------------------------------------------------------


def test_an_export_can_be_published_and_is_not_unasked(tmp_path: Path, trained: Callable[[str], Path]) -> None:
    shop = tmp_path / "shop"
    code, out, err = call("export", "--lora_model", trained("qlora4"), "--output_dir", shop)
    assert (code, "largest error of a tensor: " in err) == (0, True), err
    assert out.startswith(f"Exported: {shop} (shop-q8_0.gguf, Modelfile, README.md)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]
    code, out, err = call("push", "--folder", shop, "--repo", "me/shop", "--private")
    assert (code, err) == (0, "")
    last = "Nothing was uploaded. To upload, run the same command with --confirm.\n"
    assert out.endswith(last)


@pytest.mark.parametrize("command", ["infer", "merge"])
def test_adapter_on_another_base_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, trained: Callable[[str], Path], command: str
) -> None:
    goal = {"infer": ("--prompt", "q", *SAMPLING), "merge": ("--output_dir", tmp_path / "merged")}[command]
    argv = (command, "--base_model", tiny("qwen2", seed=1), "--lora_model", trained("lora"), *goal)
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert "trained on weights other than those of this base" in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = call(*argv, "--allow_other_base")
    assert (code, "Warning: the adapter was trained on weights other" in err) == (0, True)


def test_full_result_is_no_adapter(tmp_path: Path, trained: Callable[[str], Path]) -> None:
    for goal in (("infer", "--prompt", "q"), ("merge", "--output_dir", tmp_path / "merged")):
        code, out, err = call(*goal, "--lora_model", trained("full"))
        assert (code, out) == (2, "")
        assert "this is a whole model, not an adapter" in err
    assert list(tmp_path.iterdir()) == []
