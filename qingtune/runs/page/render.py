"""The files of a run -> one self-contained HTML file in English and Chinese."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qingtune.config.methods import Method, method_of
from qingtune.config.training import TrainConfig
from qingtune.output.units import counted
from qingtune.runs.measures import loss_of_result, perplexity
from qingtune.runs.page.charts import Chart, Column, make_chart, smooth
from qingtune.runs.page.source import Source
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


def render(source: Source) -> str:
    """The page; all text of models and data is escaped."""
    before, after = _losses(source)
    data = source.facts.get("data")
    return _template().render(
        Words=Words,
        counted=counted,
        size=size,
        name=Path(source.folder).resolve().name,
        source=source,
        method=_method(source),
        base_model=_base_model(source),
        figures=_figures(source),
        before=before,
        after=after,
        rows=((data or {}).get("evaluation") or {}).get("summary", {}).get("samples"),
        FEW_ROWS=FEW_ROWS,
        chat=shlex.join(["qingtune", "chat", *_model_flags(source)]),
        evaluate=_evaluate(source),
        loss_chart=_loss_chart(source),
        charts=[chart for chart in _charts(source) if chart],
        measures=_measures(source),
        bars=_bars(source.results.get("planned_bytes"), source.results.get("peak_bytes")),
        measured=source.results.get("peak_bytes"),
        data=data,
        changed=_settings(source.settings, changed=True),
        unchanged=_settings(source.settings, changed=False),
        machine=_machine(source),
        versions=((source.record.versions if source.record else source.facts.get("versions")) or {}).items(),
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
    environment.filters["shortened"] = _shortened
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
    evaluated = [] if after is None else [loss for loss in (before, after) if loss is not None]
    logged = [] if evaluated else curves.known("loss")
    steps = results.get("steps") or (curves.steps or [0])[-1]
    total = source.facts.get("total_steps") or steps
    seconds = results.get("seconds") or sum(curves.known("seconds"))
    speed = curves.tokens_per_second
    peak = results.get("peak_bytes") or max(curves.known("peak_bytes"), default=0)
    trained, parameters = results.get("trained_parameters") or 0, results.get("parameters")
    count = f"{trained / 1e6:,.2f} M" if trained >= 1e5 else f"{trained:,}"
    share = f" ({trained / parameters:.2%})" if parameters else ""
    figures: list[tuple[Words, str | Words]] = [
        (Words("evaluation loss", "评估损失"), _from_to(evaluated, 3)),
        (Words("perplexity", "困惑度"), _from_to([perplexity(loss) for loss in evaluated], 2)),
        (Words("last training loss", "最后的训练损失"), _from_to(logged[-1:], 4)),
        (Words("steps", "步数"), f"{steps:,}" + f" / {total:,}" * (total != steps) if steps else ""),
        (Words("time", "用时"), time_taken(seconds) if seconds else ""),
        (Words("tokens/s", "token/秒"), number(speed, 0) if speed else ""),
        (Words("peak memory", "峰值内存"), size(peak) if peak else ""),
        (Words("trained parameters", "可训练参数"), count + share if trained else ""),
    ]
    return [(name, value) for name, value in figures if value]


def _from_to(values: Sequence[float], decimals: int) -> str:
    return "\u00a0→ ".join(number(value, decimals) for value in values)


def _model_flags(source: Source) -> list[str]:
    if _chosen(source.settings) == "full":
        return ["--base_model", source.folder]
    return ["--base_model", _base_model(source), "--lora_model", source.folder]


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
    unit, divisor = ("GB", 1e9) if max(curves.known("peak_bytes"), default=0) >= 1e8 else ("MB", 1e6)
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


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … (+{len(text) - LONGEST_TEXT:,})"


def _measures(source: Source) -> list[tuple[Words, str, str, str, bool]]:
    """Each measure: name, before, after, difference with its interval, and whether that interval leaves out zero."""
    measures: list[tuple[Words, str, str, str, bool]] = []
    for metric in source.metrics:
        before, after = ("–" if value is None else significant(value) for value in (metric.before, metric.after))
        decimals = min(4, max(len(text.partition(".")[2]) for text in (before, after)))
        difference = "–" if metric.difference is None else _signed(metric.difference, decimals)
        if metric.interval and any(metric.interval):
            low, high = (_signed(end, decimals) for end in metric.interval)
            difference += f" [{low},\u00a0{high}]"
        measures.append((named(METRICS, metric.name), before, after, difference, metric.sure))
    return measures


def _signed(value: float, decimals: int) -> str:
    """A difference with its sign; one that rounds to nothing is 0."""
    text = f"{value:+,.{decimals}f}"
    return text if text.strip("+-0.") else "0"


def _bars(planned: Mapping[str, Any] | None, measured: float | None) -> list[tuple[str, Words, str, float, float]]:
    """The plan's parts one after the other, their sum, and what was measured.

    Returns:
        Of each: its kind, name and size, and where it starts and how long it is, in percent of the longest.
    """
    if not planned:
        return []
    parts = {name: count for name, count in planned.items() if not name.startswith("total") and count}
    total = sum(parts.values())
    longest = max(total, measured or 0) or 1
    error = f" ({total / measured - 1:+.1%})" if measured else ""
    bars: list[tuple[str, Words, str, float, float]] = []
    start = 0.0
    for name, count in parts.items():
        bars.append(("part", named(PARTS, name.removesuffix("_bytes")), size(count), start, 100 * count / longest))
        start += 100 * count / longest
    bars.append(("total", Words("plan, total", "预估合计"), size(total) + error, 0, 100 * total / longest))
    if measured:
        bars.append(("measured", Words("measured peak", "实测峰值"), size(measured), 0, 100 * measured / longest))
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
    facts = dict(source.facts.get("machine") or {})
    if facts.get("memory_bytes") is not None:
        facts["memory_bytes"] = size(facts["memory_bytes"])
    return [(named(ENVIRONMENT, name), str(value)) for name, value in facts.items()]
