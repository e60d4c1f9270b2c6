"""`qingtune evaluate`: losses and answers are Transformers', a stopped evaluation goes on, and nothing is compared in
which the two models differ by more than their training."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS, instruction_rows, make_tokenizer, write_jsonl
from tiny_runs import LORA, lively_model, save_model, train

from qingtune.adapters.peft_files import load_adapter
from qingtune.answering import speaker
from qingtune.answering.generate import Decoder
from qingtune.commands import evaluate as evaluation
from qingtune.commands.evaluate import evaluate
from qingtune.config.commands import EvaluateConfig
from qingtune.errors import UserError
from qingtune.kernels.device import Hardware
from qingtune.models.load import load_model

FP32 = Hardware(torch.device("cpu"), torch.float32, "fp32")
# The longest prompt first, which is the order of answering: what is answered before a stop is in the file.
ROWS = sorted(
    instruction_rows(6),
    key=lambda row: len(make_tokenizer()(f"{row['instruction']}\n\n{row['input']}")["input_ids"]),
    reverse=True,
)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in fp32, in which Transformers can be compared with."""
    monkeypatch.setattr(speaker, "choose_hardware", lambda: FP32)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


def run(tmp_path: Path, rows: Sequence[dict[str, Any]] = ROWS, name: str = "out", **settings: Any) -> dict[str, Any]:
    """Evaluate these rows; gives the content of evaluation.json."""
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    values = {"data": str(data), "output_dir": str(tmp_path / name), "max_new_tokens": 12}
    evaluate(EvaluateConfig(**values | settings))
    return result(tmp_path / name)


def plain_loss(model: Any, rows: Sequence[dict[str, Any]], *turns: dict[str, str]) -> float:
    """Mean over the answers' tokens and the token that ends them, by Transformers and the template alone."""
    tokenizer, total, count = make_tokenizer(), 0.0, 0
    for row in rows:
        asked = {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))}
        prompt = tokenizer.apply_chat_template([*turns, asked], tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{prompt}{row['output']}<|im_end|>", add_special_tokens=False)["input_ids"]
        labels = [-100] * len(before) + ids[len(before) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * (len(ids) - len(before))
        count += len(ids) - len(before)
    return total / count


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "vaultgemma"])
def test_loss_and_answers_are_transformers(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", kind)
    found = run(tmp_path, base_model=str(folder))
    model = load_model(folder, torch.float32).eval()
    assert found["metrics"]["loss"]["after"]["value"] == pytest.approx(plain_loss(model, ROWS), abs=1e-5)
    tokenizer = make_tokenizer()
    for row in lines(tmp_path / "out" / "predictions_after.jsonl"):
        asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], return_tensors="pt", add_generation_prompt=True, return_dict=True
        )
        made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["answer"] == tokenizer.decode(made, skip_special_tokens=True)
        assert row["answer_ended"] == (int(made[-1]) == 2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that learnt something of the rows."""
    save_model(tmp_path / "base")
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert train(tmp_path / "adapter", tmp_path / "base", data, **LORA, max_steps=5, system_prompt="You sell bread.")
    return tmp_path / "adapter"


def test_an_adapter_is_compared_with_its_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, lora_model=str(adapter))
    system = {"role": "system", "content": "You sell bread."}  # of training, given to both
    base = load_model(tmp_path / "base", torch.float32).eval()
    before, after = (found["metrics"]["loss"][side]["value"] for side in ("before", "after"))
    assert before == pytest.approx(plain_loss(base, ROWS, system), abs=1e-5)
    load_adapter(base, adapter)
    assert after == pytest.approx(plain_loss(base.eval(), ROWS, system), abs=1e-5)
    assert after < before
    shown = capsys.readouterr().out.splitlines()
    table = shown[: shown.index(f"before: {tmp_path / 'base'}")]
    assert [line.split()[0] for line in table[:2]] == ["metric", "loss"]
    assert max(map(len, table)) <= 80
    assert f"{after - before:+.4f}" in table[1]


def test_an_adapter_whose_base_is_gone_says_so(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError) as caught:
        run(tmp_path, lora_model=str(adapter))
    assert str(caught.value).startswith(f"{adapter}: its base model was not found: {tmp_path / 'base'}: no model")
    assert str(caught.value).endswith("Pass it as --base_model.")
    run(tmp_path, lora_model=str(adapter), base_model=str(tmp_path / "moved"), skip_generation=True)


def test_bits_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    run(tmp_path, base_model=str(folder), load_in_8bit=True, skip_generation=True)
    assert f"after: {folder}, in 8 bits\n" in capsys.readouterr().out


def test_rows_of_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    rows = [
        {"prompt": TEXTS[0] + "\u2028", "form": {"max_characters": 1000, "tags": 1}},
        {"text": TEXTS[1]},
        {"instruction": "q", "output": "w " * 300},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>hm</think>\na"}]},
    ]
    found = run(tmp_path, rows, base_model=str(folder), max_seq_length=200)
    metrics = found["metrics"]
    assert found["rows_with_reference"] == 2
    assert found["rows_without_loss"]["after"] == [f"{tmp_path}/rows.jsonl:3"]
    assert {name: metrics[name]["rows"] for name in ("loss", "ROUGE-1", "ended by itself %", "form: tags %")} == {
        "loss": 2, "ROUGE-1": 2, "ended by itself %": 3, "form: tags %": 1,
    }  # fmt: skip
    assert metrics["form: max_characters %"]["after"]["value"] == 100
    assert ["answer" in line for line in lines(tmp_path / "out" / "predictions_after.jsonl")] == [
        True, False, True, True,
    ]  # fmt: skip
    assert "1 row too long for a loss" in capsys.readouterr().out


class Cut:
    """A decoder that is interrupted after so many prompts."""

    def __init__(self, inner: Any, most: int) -> None:
        self.inner, self.left, self.slots = inner, most, 1
        self.step, self.move, self.logits_at = inner.step, inner.move, inner.logits_at

    def start(self, ids: Sequence[int], slot: int = 0) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.start(ids, slot)


def interrupt(monkeypatch: pytest.MonkeyPatch, most: Sequence[int]) -> list[Decoder]:
    """Have each model that is loaded stop after so many prompts; gives those that were loaded."""
    load, loaded = speaker.load_decoder, []

    def cut(*arguments: Any) -> Any:
        loaded.append(Cut(load(*arguments), most[len(loaded)]))
        return loaded[-1]

    monkeypatch.setattr(speaker, "load_decoder", cut)
    return loaded


@pytest.mark.parametrize("most", [[0], [4], [9, 0], [9, 5]])
def test_stopped_evaluation_goes_on(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: list[int]
) -> None:
    whole = run(tmp_path, name="whole", lora_model=str(adapter))
    with monkeypatch.context() as context:
        interrupt(context, most)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, lora_model=str(adapter))
    assert not (tmp_path / "out" / "evaluation.json").exists()
    side = "before" if len(most) == 1 else "after"
    assert len(lines(tmp_path / "out" / f"predictions_{side}.jsonl")) == most[-1]
    loaded = interrupt(monkeypatch, [9, 9])
    assert run(tmp_path, lora_model=str(adapter))["metrics"] == whole["metrics"]
    assert len(loaded) == 3 - len(most)  # a model that has answered everything is not loaded again
    for side in ("before", "after"):
        name = f"predictions_{side}.jsonl"
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json", "evaluation.md", "predictions_after.jsonl", "predictions_before.jsonl",
    ]  # fmt: skip


def test_how_to_go_on_does_not_begin_anew(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, [2])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, lora_model=str(adapter), overwrite_output_dir=True)
    assert "to resume, run the same command without --overwrite_output_dir" in capsys.readouterr().err


def test_other_settings_do_not_go_on(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        interrupt(context, [9, 3])
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, lora_model=str(adapter))
    kept = lines(tmp_path / "out" / "predictions_after.jsonl")
    with pytest.raises(UserError, match=r"decoding differ.*overwrite_output_dir"):
        run(tmp_path, lora_model=str(adapter), max_new_tokens=13)
    assert lines(tmp_path / "out" / "predictions_after.jsonl") == kept
    run(tmp_path, lora_model=str(adapter), max_new_tokens=13, overwrite_output_dir=True)
    with pytest.raises(UserError, match="contains a finished evaluation"):
        run(tmp_path, lora_model=str(adapter))


def test_one_model_is_in_memory_at_a_time(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, alive = speaker.load_decoder, weakref.WeakSet[Any]()

    def watched(*arguments: Any) -> Any:
        assert len(alive) == 0
        decoder = load(*arguments)
        alive.add(decoder)
        return decoder

    monkeypatch.setattr(speaker, "load_decoder", watched)
    run(tmp_path, lora_model=str(adapter))


def test_the_page_of_a_run_shows_its_evaluation(adapter: Path, tmp_path: Path) -> None:
    page = adapter / "report.html"
    assert "chrF" not in page.read_text(encoding="utf-8")
    found = run(tmp_path, lora_model=str(adapter), output_dir=str(adapter), name=adapter.name)
    text = page.read_text(encoding="utf-8")
    assert "chrF" in text
    assert f"{found['metrics']['loss']['after']['value']:.3f}" in text


def test_losses_alone(adapter: Path, tmp_path: Path) -> None:
    found = run(tmp_path, lora_model=str(adapter), skip_generation=True)
    assert list(found["metrics"]) == ["loss", "perplexity"]
    assert "answer" not in lines(tmp_path / "out" / "predictions_after.jsonl")[0]
    answered = [{**row, "answer": "as infer wrote it", "answer_ended": True} for row in ROWS]
    found = run(tmp_path, answered, name="again", lora_model=str(adapter), skip_generation=True)
    assert list(found["metrics"]) == ["loss", "perplexity"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_fully_trained_model_is_compared_with_what_it_came_from(
    tmp_path: Path, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base")
    train(tmp_path / "full", base, write_jsonl(tmp_path / "train.jsonl", ROWS), max_steps=2, learning_rate=1e-3)
    if gone:
        base.rename(tmp_path / "elsewhere")
    found = run(tmp_path, base_model=str(tmp_path / "full"), skip_generation=True)
    assert list(found["models"]) == (["after"] if gone else ["before", "after"])
    assert ("is not on this machine" in capsys.readouterr().err) == gone
    again = {"base_model": str(tmp_path / "full"), "skip_generation": True, "name": "again"}
    if gone:
        found = run(tmp_path, before_model=str(tmp_path / "elsewhere"), **again)
        assert found["metrics"]["loss"]["difference"]["value"] < 0
    else:
        assert list(run(tmp_path, only_after=True, **again)["models"]) == ["after"]


def test_losses_of_other_tokenizers_are_not_subtracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    other = tmp_path / "other"
    lively_model("qwen2").save_pretrained(other)
    spell_out(other)
    found = run(tmp_path, base_model=str(folder), before_model=str(other), skip_generation=True)
    assert found["metrics"]["loss"]["difference"] is None
    assert found["metrics"]["loss"]["before"]["value"] > 0
    assert "cannot be compared" in capsys.readouterr().out


def spell_out(folder: Path) -> None:
    """Give a model a tokenizer without merges, by which texts have more tokens."""
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({}, ROWS, "no model was given"),
        ({"base_model": "x", "data": None}, ROWS, "--data is missing"),
        ({"base_model": "x", "only_after": True, "before_model": "y"}, ROWS, "are both given"),
        ({"base_model": "x", "load_in_4bit": True, "load_in_8bit": True}, ROWS, "are both given"),
        ({"base_model": "MODEL"}, [{"prompt": "q", "form": {"titel": True}}], '"form.titel"'),
        (
            {"base_model": "MODEL"},
            [{"prompt": "q", "form": {"tags": "x"}}, {"prompt": ""}, {"prompt": "q", "form": "{"}],
            r'"form.tags".*\n.*"prompt" is empty\n.*"form" is not JSON.*\n\(3 of 3 rows',
        ),
        ({"base_model": "MODEL"}, [{"prompt": ""}, {"question": "q"}], r'"prompt" is empty\n.*"prompt" is missing'),
        ({"base_model": "MODEL"}, [], "no row to evaluate on"),
        ({"base_model": "MODEL"}, [ROWS[0], {"prompt": "word " * 300}], "rows.jsonl:2: the prompt has"),
        ({"base_model": "MODEL"}, [ROWS[0], {"prompt": "q", "completion": "<|im_end|>"}], "jsonl:2: holds <|im_end|>"),
        ({"base_model": "x", "lm_eval": "arc_easy"}, ROWS, "pip install lm_eval=="),
    ],
)
def test_what_cannot_be_evaluated_is_told(
    settings: dict[str, Any], rows: list[dict[str, Any]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: None)
    if settings.get("base_model") == "MODEL":
        settings = settings | {"base_model": str(save_model(tmp_path / "model"))}
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        run(tmp_path, rows, **settings)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("predictions*"))


def test_a_loss_that_is_no_number_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = lively_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"rows.jsonl:1: the loss is nan"):
        run(tmp_path, base_model=str(folder))
