"""The files of a run -> one self-contained HTML file in English and Chinese."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qingtune.config.methods import Method, method_of
from qingtune.config.training import TrainConfig
from qingtune.runs.losses import loss_of_result, perplexity
from qingtune.runs.page.charts import Chart, Column, make_chart, smooth
from qingtune.runs.page.source import Answers, Source
from qingtune.runs.page.words import (
    ENVIRONMENT,
    METHODS,
    METRICS,
    PARTS,
    Words,
    both,
    named,
    number,
    significant,
    size,
    time_taken,
)
from qingtune.runs.record import FEW_ROWS

LONGEST_TEXT = 4000  # characters of a sample; what follows is counted
_CHOSEN_ALWAYS = ("model_name_or_path", "data_path", "output_dir")


@dataclass(frozen=True)
class Bar:
    """A part of the plan: `start` and `width` in percent of the longest bar."""

    label: Words
    text: str
    start: float
    width: float
    kind: str


@dataclass(frozen=True)
class MeasureRow:
    """A measure before and after; `sure`: its difference's interval leaves out zero."""

    label: Words
    before: str
    after: str
    difference: str
    sure: bool


def render(source: Source) -> str:
    """The page; all text of models and data is escaped."""
    return _template().render(
        Words=Words,
        size=size,
        name=Path(source.folder).resolve().name,
        source=source,
        finished=source.record is not None,
        method=_method(source),
        base_model=_base_model(source),
        figures=_figures(source),
        sentence=_sentence(source),
        chat=_chat(source),
        evaluate=_evaluate(source),
        loss_chart=_loss_chart(source),
        charts=[chart for chart in _charts(source) if chart],
        answers=[_shortened(answers) for answers in source.answers],
        rows=_rows(source),
        bars=_bars(source.results.get("planned_bytes"), source.results.get("peak_bytes")),
        measured=source.results.get("peak_bytes"),
        data=source.facts.get("data"),
        changed=_settings(source.settings, changed=True),
        unchanged=_settings(source.settings, changed=False),
        machine=_machine(source),
        versions=_versions(source),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


# --- The head --------------------------------------------------------------------------------------------------------


def _method(source: Source) -> Words:
    settings = source.settings
    method = source.record.method if source.record else _chosen(settings)
    words = named(METHODS, method)
    if method == "qlora" and (bits := settings.get("quantization_bit")):
        return Words(f"{words.english}, {bits} bits", f"{words.chinese}（{bits} bit）")
    return words


def _chosen(settings: Mapping[str, Any]) -> Method:
    return method_of(settings.get("use_lora"), settings.get("use_qlora"))


def _base_model(source: Source) -> str:
    return source.record.base_model if source.record else str(source.settings.get("model_name_or_path", "–"))


def _losses(source: Source) -> tuple[float | None, float | None]:
    """Evaluation loss before training, and that of the result or the last one so far."""
    curves, results = source.curves, source.results
    before = curves.eval_loss_before if results.get("eval_loss_before") is None else results["eval_loss_before"]
    after = loss_of_result(results, best_kept=bool(source.settings.get("load_best_model_at_end")))
    if after is None and curves.eval_steps and curves.eval_steps[-1] > 0:
        after = curves.eval_losses[-1]
    return _finite(before), _finite(after)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _figures(source: Source) -> list[tuple[Words, str | Words]]:
    """The few numbers that matter most, each with its name."""
    curves, results = source.curves, source.results
    before, after = _losses(source)
    figures: list[tuple[Words, str | Words]] = []
    if after is not None:
        figures += [
            (Words("evaluation loss", "评估损失"), _from_to(before, after, 3)),
            (
                Words("perplexity", "困惑度"),
                _from_to(None if before is None else perplexity(before), perplexity(after), 2),
            ),
        ]
    elif losses := [loss for loss in curves.values["loss"] if math.isfinite(loss)]:
        figures.append((Words("last training loss", "最后的训练损失"), number(losses[-1], 4)))
    if steps := results.get("steps") or (curves.steps[-1] if curves.steps else None):
        total = source.facts.get("total_steps")
        figures.append((Words("steps", "步数"), f"{steps:,}" + (f" / {total:,}" if total and total != steps else "")))
    if seconds := results.get("seconds") or sum(value for value in curves.values["seconds"] if math.isfinite(value)):
        figures.append((Words("time", "用时"), time_taken(seconds)))
    if speed := curves.tokens_per_second:
        figures.append((Words("tokens/s", "token/秒"), number(speed, 0)))
    if peak := results.get("peak_bytes") or _highest(curves.values["peak_bytes"]):
        figures.append((Words("peak memory", "峰值内存"), size(peak)))
    if trained := results.get("trained_parameters"):
        share = trained / results["parameters"] if results.get("parameters") else None
        figures.append(
            (Words("trained parameters", "可训练参数"), _millions(trained) + (f" ({share:.2%})" if share else ""))
        )
    return figures


def _from_to(before: float | None, after: float | None, decimals: int) -> str:
    parts = [number(value, decimals) for value in (before, after) if value is not None]
    return "\u00a0→ ".join(parts)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def _highest(values: Sequence[float]) -> float | None:
    return max((value for value in values if math.isfinite(value)), default=None)


def _sentence(source: Source) -> Words:
    """The result in a sentence."""
    before, after = _losses(source)
    if not source.record:
        return Words(
            "This run is not finished: it is still going on, or was stopped. The same command goes on with it.",
            "训练尚未完成：仍在进行，或已中断。用同一条命令即可继续。",
        )
    if after is None:
        return Words(
            "Nothing was held out for evaluation, so it is not known what training gained on rows the model has not "
            "seen. Give --eval_data_path or --val_size next time.",
            "没有留出评估数据，因此无法判断模型在没见过的数据上有无提升。下次请加上 --eval_data_path 或 --val_size。",
        )
    rows = _rows_evaluated(source)
    if before is None:
        return Words(f"Evaluation loss is {after:.4f}{rows.english}", f"评估损失为 {after:.4f}{rows.chinese}")
    change = after / before - 1 if before else 0.0
    if after < before:
        return Words(
            f"Evaluation loss fell by {-change:.1%}, from {before:.4f} to {after:.4f}{rows.english}",
            f"评估损失从 {before:.4f} 降到 {after:.4f}，下降 {-change:.1%}{rows.chinese}",
        )
    return Words(
        f"Evaluation loss did not fall: {before:.4f} before, {after:.4f} after{rows.english} A lower learning rate, "
        "fewer epochs or more data may help.",
        f"评估损失没有下降：训练前 {before:.4f}，训练后 {after:.4f}{rows.chinese}"
        "可以试试更小的学习率、更少的轮数或更多的数据。",
    )


def _rows_evaluated(source: Source) -> Words:
    """The end of a sentence on the loss: on how many rows it rests, and that few of them prove little."""
    count = ((source.facts.get("data") or {}).get("evaluation") or {}).get("summary", {}).get("samples")
    if not count:
        return Words(".", "。")
    rows = Words(f", on {count:,} held-out sample{'s' * (count > 1)}.", f"（{count:,} 条留出样本）。")
    if count >= FEW_ROWS:
        return rows
    return Words(
        f"{rows.english} With so few, a small difference may be chance.",
        f"{rows.chinese}样本太少，小的差异可能只是偶然。",
    )


def _model_flags(source: Source) -> list[str]:
    if _chosen(source.settings) == "full":
        return ["--base_model", source.folder]
    return ["--base_model", _base_model(source), "--lora_model", source.folder]


def _chat(source: Source) -> str:
    return shlex.join(["qingtune", "chat", *_model_flags(source)])


def _evaluate(source: Source) -> str:
    data = source.settings.get("eval_data_path") or ["ROWS.jsonl"]
    where = ["--output_dir", source.folder]
    evaluate = shlex.join(["qingtune", "evaluate", *_model_flags(source), "--data", ",".join(data), *where])
    return f"{evaluate}\n{shlex.join(['qingtune', 'report', *where])}"


# --- Curves ----------------------------------------------------------------------------------------------------------


def _loss_chart(source: Source) -> Chart | None:
    curves = source.curves
    loss = curves.values["loss"]
    columns = [Column("raw", Words("training", "训练"), curves.steps, loss)]
    if smoothed := smooth(loss):
        averages, window = smoothed
        label = Words(f"training, smoothed over {window:,} lines", f"训练（{window:,} 行指数平滑）")
        columns.append(Column("smooth", label, curves.steps, averages))
    columns.append(Column("evaluation", Words("evaluation", "评估"), curves.eval_steps, curves.eval_losses))
    return make_chart(
        Words("Loss", "损失"),
        Words("nats per trained token", "nat / 参与训练的 token"),
        columns,
        lambda value: f"{value:.4f}",
    )


def _charts(source: Source) -> list[Chart | None]:
    curves = source.curves
    values = curves.values
    speeds = [
        many / took if took > 0 else math.nan for many, took in zip(values["tokens"], values["seconds"], strict=True)
    ]
    most = _highest(values["peak_bytes"]) or 0
    unit, divisor = ("GB", 1e9) if most >= 1e8 else ("MB", 1e6)
    memory = [value / divisor for value in values["peak_bytes"]]

    def line(column: Sequence[float]) -> list[Column]:
        return [Column("raw", Words("last", "最新"), curves.steps, column)]

    rate, norm = Words("Learning rate", "学习率"), Words("Gradient norm", "梯度范数")
    speed, peak = Words("Speed", "训练速度"), Words("Peak memory so far", "峰值内存（至当前步）")
    return [
        make_chart(rate, both(""), line(values["learning_rate"]), lambda v: f"{v:.2e}", from_zero=True),
        make_chart(norm, Words("before clipping", "裁剪前"), line(values["grad_norm"]), significant, from_zero=True),
        make_chart(speed, Words("tokens/s", "token/秒"), line(speeds), lambda v: number(v, 0), from_zero=True),
        make_chart(peak, both(unit), line(memory), lambda v: f"{number(v, 2)} {unit}", from_zero=True),
    ]


# --- Answers and measures --------------------------------------------------------------------------------------------


def _shortened(answers: Answers) -> Answers:
    return Answers(*(_short(text) for text in (answers.prompt, answers.reference, answers.before, answers.after)))


def _short(text: Any) -> Any:
    if text is None or len(str(text)) <= LONGEST_TEXT:
        return text
    return f"{str(text)[:LONGEST_TEXT]} … (+{len(str(text)) - LONGEST_TEXT:,})"


def _rows(source: Source) -> list[MeasureRow]:
    rows: list[MeasureRow] = []
    for metric in source.metrics:
        before, after = ("–" if value is None else significant(value) for value in (metric.before, metric.after))
        decimals = min(4, max(len(text.partition(".")[2]) for text in (before, after)))
        difference = "–" if metric.difference is None else _signed(metric.difference, decimals)
        if metric.interval and any(metric.interval):
            low, high = (_signed(end, decimals) for end in metric.interval)
            difference += f" [{low},\u00a0{high}]"
        rows.append(MeasureRow(named(METRICS, metric.name), before, after, difference, metric.sure))
    return rows


def _signed(value: float, decimals: int) -> str:
    """A difference with its sign; one that rounds to nothing is 0."""
    text = f"{value:+,.{decimals}f}"
    return text if text.strip("+-0.") else "0"


def _bars(planned: Mapping[str, Any] | None, measured: float | None) -> list[Bar]:
    """The plan's parts one after the other, their sum, and what was measured."""
    if not planned:
        return []
    parts = {name: count for name, count in planned.items() if not name.startswith("total") and count}
    total = sum(parts.values())
    longest = max(total, measured or 0) or 1
    bars: list[Bar] = []
    start = 0.0
    for name, count in parts.items():
        width = 100 * count / longest
        bars.append(Bar(named(PARTS, name.removesuffix("_bytes")), size(count), start, width, "part"))
        start += width
    bars.append(Bar(Words("plan, total", "预估合计"), size(total), 0, 100 * total / longest, "total"))
    if measured:
        error = f" ({total / measured - 1:+.1%})"
        bars[-1] = Bar(bars[-1].label, size(total) + error, 0, bars[-1].width, "total")
        bars.append(Bar(Words("measured peak", "实测峰值"), size(measured), 0, 100 * measured / longest, "measured"))
    return bars


# --- Tables ----------------------------------------------------------------------------------------------------------


def _settings(settings: Mapping[str, Any], *, changed: bool) -> list[tuple[str, str]]:
    """Settings that differ from the defaults, or those that do not, as text."""
    fields = TrainConfig.model_fields
    return [
        (name, _as_text(value))
        for name, value in settings.items()
        if (name not in fields or name in _CHOSEN_ALWAYS or value != fields[name].default) == changed
    ]


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_as_text(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _machine(source: Source) -> list[tuple[Words, str]]:
    facts = dict(source.facts.get("machine", {}))
    if facts.get("memory_bytes") is not None:
        facts["memory_bytes"] = size(facts["memory_bytes"])
    return [(named(ENVIRONMENT, name), str(value)) for name, value in facts.items()]


def _versions(source: Source) -> list[tuple[str, str]]:
    known = source.record.versions if source.record else source.facts.get("versions", {})
    return list(known.items())
