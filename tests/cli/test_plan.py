"""`qingtune plan` from a header alone; `--dry_run`; plan and measured peak in a run's record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from fork_server import ForkServer

from qingtune.cli import main
from qingtune.errors import UserError
from qingtune.models.find import CONVERTED

CONFIG = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def header(tmp_path: Path) -> Path:
    """A folder with nothing but the config.json of a model of 7 billion parameters."""
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def plan(*argv: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["plan", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_header_alone_is_enough(header: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan("--model_name_or_path", header, "--use_qlora", "--json", capsys=capsys)
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["model"]["parameters"] == 7_615_616_512
    assert content["method"] == "qlora4"
    assert content["total_bytes"] == sum(content["parts"].values())
    assert content["methods"]["full"]["total_bytes"] > content["methods"]["qlora4"]["total_bytes"]
    assert content["samples"]["count"] is None


def test_a_plan_of_32_billion_parameters_takes_seconds(header: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Imports take most of the 8 s that the whole command may take on two cores."""
    sizes = {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_hidden_layers": 64}
    flags = ("--model_name_or_path", header, "--use_lora", "--lora_r", 64)
    plan(*flags, capsys=capsys)
    (header / "config.json").write_text(json.dumps({**CONFIG, **sizes, "num_key_value_heads": 8}), encoding="utf-8")
    began = time.process_time()
    code, out, _ = plan(*flags, "--json", capsys=capsys)
    assert (code, json.loads(out)["model"]["parameters"]) == (0, 32_763_876_352)
    assert time.process_time() - began < 4


def test_methods_that_other_settings_rule_out_have_no_row(header: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings in (("--init_lora_weights", "pissa"), ("--modules_to_save", "layers.0.mlp")):
        code, out, _ = plan("--model_name_or_path", header, "--use_lora", *settings, "--json", capsys=capsys)
        content = json.loads(out)
        assert (code, list(content["methods"])) == (0, ["full", "full8", "lora"])
        assert not any("quantization_bit" in one["change"] for one in content["advice"])


def test_the_table_and_a_configuration_file(header: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model_name_or_path": str(header), "use_lora": True, "lora_r": 64}), encoding="utf-8")
    code, out, err = plan("--config_file", file, "--max_seq_length", "512", capsys=capsys)
    assert (code, err) == (0, "")
    assert "7.62 billion parameters (qwen2)" in " ".join(out.split())
    assert "> LoRA" in out
    assert "longest sample 512 tokens" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_samples_are_counted_where_there_is_a_tokenizer(
    tiny: Callable[..., Path], data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qingtune.data.format import read_conversations
    from qingtune.data.tokenize import make_template, tokenize
    from qingtune.models.load import load_tokenizer, stop_ids

    template = make_template(load_tokenizer(tiny()), stop_ids(tiny()))
    conversations = read_conversations([str(data_file)], None, "raise").conversations
    truth = [len(s.token_ids) for s in tokenize(template, conversations, 2048, "raise").samples]
    code, out, _ = plan("--model_name_or_path", tiny(), "--data_path", data_file, "--json", capsys=capsys)
    assert code == 0
    found = json.loads(out)["samples"]
    assert found["count"] == len(truth) == 20
    assert found["mean"] == pytest.approx(sum(truth) / len(truth), rel=0.25)
    assert 0.2 < found["trained_share"] < 1
    assert "counted" in found["basis"]


def test_without_a_tokenizer_a_token_is_a_byte_at_most(
    header: Path, tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*[{"instruction": "写一条笔记", "output": "七点出炉。"}] * 3, {"instruction": "x"}]
    data = write_jsonl(tmp_path / "小店.jsonl", rows)
    _, out, _ = plan("--model_name_or_path", header, "--data_path", data, "--json", capsys=capsys)
    most = json.loads(out)["samples"]
    assert (most["count"], most["trained_share"]) == (3, 1.0)
    assert 30 < most["longest"] == most["mean"] < 100
    assert "at most one token per byte" in most["basis"]
    assert "1 row skipped" in most["basis"]
    (header / "tokenizer.json").write_bytes((tiny() / "tokenizer.json").read_bytes())
    _, out, _ = plan("--model_name_or_path", header, "--data_path", data, "--json", capsys=capsys)
    counted = json.loads(out)["samples"]
    assert counted["longest"] <= most["longest"]
    assert "3 samples counted" in counted["basis"]
    flags = ("--model_name_or_path", header, "--data_path", data, "--max_seq_length", 16)
    code, _, err = plan(*flags, capsys=capsys)
    assert code == 2
    assert "every sample is longer than 16 tokens. Raise max_seq_length" in err
    assert plan(*flags, "--on_long", "truncate", capsys=capsys)[0] == 0


def test_a_converted_file_is_counted_with_its_tokenizer(
    tmp_path: Path, tiny: Callable[..., Path], data_file: Path
) -> None:
    from qingtune.commands.plan import tokenizer_file

    model, cache = tmp_path / "my[1].gguf", tmp_path / "cache"
    model.touch()
    assert tokenizer_file(model, cache) is None
    for digest in ("0123", "4567"):
        folder = cache / CONVERTED / f"my[1]-{digest}"
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").touch()
        several = digest == "4567"
        assert tokenizer_file(model, cache) == (None if several else folder / "tokenizer.json")


def test_a_cache_that_cannot_be_written_is_told(
    header: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qingtune.planning import calibrate

    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "SHAPES", ((64, 32),))
    (tmp_path / "cache").touch()
    code, out, err = plan(
        "--model_name_or_path", header, "--cache_dir", tmp_path / "cache", "--calibrate", capsys=capsys
    )
    assert (code, out) == (2, "")
    assert "cache: the speed of this machine could not be written" in err
    assert "Traceback" not in err


def test_a_file_of_the_model_leads_to_the_model(header: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan("--model_name_or_path", header / "config.json", capsys=capsys)
    assert (code, err.splitlines()[-1].rpartition(". ")[2]) == (2, f"Pass its folder, {header}.")
    (header / "config.json").unlink()
    (header / "q4.gguf").touch()
    code, _, err = plan("--model_name_or_path", header, capsys=capsys)
    assert (code, err.splitlines()[-1].partition(". ")[2]) == (2, f"Pass a .gguf file, such as {header / 'q4.gguf'}.")


def test_a_small_gpu_is_told_what_fits_together(header: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_name_or_path", header, "--use_lora", "--gpu_memory_gib", 12, "--json"]
    given = json.loads(plan(*flags, capsys=capsys)[1])
    assert [one["fits"] for one in given["advice"]] == [False] * (len(given["advice"]) - 1) + [True]
    last = given["advice"][-1]
    flags += [word for change in last["change"].split(", ") for word in f"--{change}".split()]
    flags.remove("--use_lora")
    followed = json.loads(plan(*flags, capsys=capsys)[1])
    assert followed["fits"] is True
    assert followed["total_bytes"] == given["total_bytes"] - last["saves_bytes"]


def test_a_gpu_that_is_not_here(header: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model_name_or_path", header, "--use_lora", "--per_device_train_batch_size", 1)
    fits = {}
    for gib in (12, 24):
        code, out, _ = plan(*flags, "--gpu_memory_gib", gib, "--json", capsys=capsys)
        content = json.loads(out)
        assert (code, content["machine"]["kind"]) == (0, "cuda")
        assert content["machine"]["free_bytes"] == gib * 2**30
        fits[gib] = content["fits"]
    assert fits == {12: False, 24: True}
    _, out, _ = plan(*flags, "--gpu_memory_gib", 24, capsys=capsys)
    assert "a GPU of 24 GiB (not this machine)" in " ".join(out.split())
    assert "nothing was measured there" in out
    assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object is expected"),
        ("{}", "config.json names no model_type"),
        ('{"model_type": "brand_new"}', "is not known to the installed Transformers"),
        (json.dumps(CONFIG | {"num_hidden_layers": "many"}), '"num_hidden_layers" is "many"'),
    ],
)
def test_a_malformed_header_is_refused(
    text: str, message: str, header: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (header / "config.json").write_text(text, encoding="utf-8")
    code, out, err = plan("--model_name_or_path", header, capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert "config.json" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora_rnak", "8"), 'Did you mean "lora_r"?'),
        (("--data_path", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--use_lora", "--lora_target_modules", "q_prj"), 'Did you mean "q_proj"?'),
        (("--model_name_or_path", "./none"), "./none: no model folder"),
        (("--gpu_memory_gib", "24", "--calibrate"), "the plan is for another"),
    ],
)
def test_wrong_usage_is_refused(
    flags: tuple[str, ...], message: str, header: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = () if "--model_name_or_path" in flags else ("--model_name_or_path", str(header))
    code, out, err = plan(*model, *flags, capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err


def test_the_limit_of_a_container_counts(
    header: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qingtune.machine import resources

    monkeypatch.setattr(resources, "_torch_has_cuda", lambda: False)
    monkeypatch.setattr(resources, "_left_by_control_groups", lambda: [1_000_000_000])
    code, out, _ = plan("--model_name_or_path", header, "--use_qlora", "--json", capsys=capsys)
    content = json.loads(out)
    assert code == 0
    assert content["machine"]["free_bytes"] <= 1_000_000_000
    assert content["fits"] is False
    assert content["largest_batch_that_fits"] == 0


def test_calibration_gives_the_time(
    header: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qingtune.planning import calibrate

    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "SHAPES", ((64, 32),))
    where = ("--model_name_or_path", header, "--cache_dir", tmp_path / "cache")
    assert "Time: unknown" in plan(*where, capsys=capsys)[1]
    code, out, err = plan(*where, "--calibrate", capsys=capsys)
    assert code == 0
    assert "GFLOP/s" in err
    assert "tokens/s" in out
    assert "matrix products" in plan(*where, capsys=capsys)[1]


# --- Runs ------------------------------------------------------------------------------------------------------------


def flags_of(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output),
        "--use_lora", "--max_steps", "2", "--save_strategy", "no", *more,
    ]  # fmt: skip


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny: Callable[..., Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from qingtune.commands import train

    monkeypatch.setattr(train, "load_adapted_model", lambda *_: pytest.fail("the weights were loaded"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(flags_of(tiny(), data_file, tmp_path / "out", "--dry_run")) == 0
    out, err = capsys.readouterr()
    assert "> LoRA" in out
    assert "the samples themselves" in out
    assert "Training data" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_runs_record_holds_plan_and_peak(
    tiny: Callable[..., Path], data_file: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    output = tmp_path / "out"
    done = fork_server.run("-m", "qingtune", *flags_of(tiny(), data_file, output, "--report_to", "none"))
    assert done.returncode == 0, done.stderr
    assert "Plan: " in done.stderr
    assert "It fits: " in done.stderr
    results = json.loads((output / "qingtune.json").read_text())["results"]
    planned = results["planned_bytes"]
    assert planned["total"] == sum(size for name, size in planned.items() if name != "total")
    assert abs(planned["total"] - results["peak_bytes"]) < 150e6
    assert f"(planned: {planned['total'] / 1e9:.2f})" in done.stdout


def test_a_model_that_cannot_be_planned_is_trained(
    tiny: Callable[..., Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from qingtune.commands import train

    def refuse(*_: Any) -> None:
        raise UserError("no such size")

    monkeypatch.setattr(train, "plan_run", refuse)
    output = tmp_path / "out"
    assert main([*flags_of(tiny(), data_file, output, "--report_to", "none")]) == 0
    _, err = capsys.readouterr()
    assert "No plan of memory: no such size" in err
    assert json.loads((output / "qingtune.json").read_text())["results"]["planned_bytes"] is None
