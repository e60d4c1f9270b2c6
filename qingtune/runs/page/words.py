"""Words of the page in both of its languages, and numbers as text."""

from __future__ import annotations

import math
from typing import NamedTuple

from qingtune.config.methods import METHOD_NAMES
from qingtune.output.units import duration


class Words(NamedTuple):
    """The same in English and Chinese."""

    english: str
    chinese: str


def both(text: str) -> Words:
    """A text that is the same in both languages: a name, a number."""
    return Words(text, text)


METHODS = {name: both(english) for name, english in METHOD_NAMES.items()}
METHODS["full"] = Words(METHOD_NAMES["full"], "全参数微调")

# The plan's parts.
PARTS = {
    "weights": Words("weights", "模型权重"),
    "quantized_weights": Words("quantised weights", "量化后的权重"),
    "adapters": Words("adapters", "适配器"),
    "gradients": Words("gradients", "梯度"),
    "optimizer_states": Words("optimizer states", "优化器状态"),
    "activations": Words("activations", "激活值"),
    "logits": Words("logits", "logits（输出层）"),
    "runtime": Words("runtime", "运行时"),
    "loading": Words("more while loading", "加载时额外占用"),
}

# What `qingtune evaluate` measures; names that stay as they are in Chinese too are not listed.
METRICS = {
    "loss": Words("loss per trained token", "损失（每训练 token）"),
    "perplexity": Words("perplexity", "困惑度"),
    "exact match %": Words("exact match %", "完全一致 %"),
    "length ratio": Words("length ratio", "长度比（回答 / 参考）"),
    "ended by itself %": Words("ended by itself %", "自行结束 %"),
    "form: title %": Words("form: title %", "格式：标题 %"),
    "form: emoji %": Words("form: emoji %", "格式：表情符号 %"),
    "form: tags %": Words("form: tags %", "格式：话题标签 %"),
    "form: min_characters %": Words("form: min characters %", "格式：字数下限 %"),
    "form: max_characters %": Words("form: max characters %", "格式：字数上限 %"),
    "form: contains %": Words("form: contains %", "格式：必含内容 %"),
    "form: all %": Words("form: all %", "格式：全部满足 %"),
}

ENVIRONMENT = {
    "device": Words("device", "计算设备"),
    "processes": Words("processes", "进程数"),
    "processor": Words("processor", "处理器"),
    "cores": Words("cores", "可用核数"),
    "memory_bytes": Words("memory", "内存"),
    "system": Words("system", "操作系统"),
    "python": Words("Python", "Python"),
    "started": Words("started", "启动时间"),
}

_UNITS = {"s": "秒", "min": "分钟", "h": "小时"}


def named(names: dict[str, Words], key: str) -> Words:
    """The words for a key; for one that is not known, the key in plain letters."""
    return names.get(key, both(key.replace("_", " ")))


def number(value: float, decimals: int) -> str:
    """A number with separators; what is not finite, as a dash."""
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "–"


def significant(value: float) -> str:
    """A number of any size with four significant digits, such as 12,340 or 0.01234 or 1.2e-05."""
    if not math.isfinite(value):
        return "–"
    if not value:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def size(count: float) -> str:
    """Bytes as GB, or MB below a tenth of that."""
    return f"{number(count / 1e9, 2)} GB" if count >= 1e8 else f"{number(count / 1e6, 1)} MB"


def time_taken(seconds: float) -> Words:
    """A time in the unit that suits it."""
    english = duration(seconds)
    count, unit = english.split()
    return Words(english, f"{count} {_UNITS[unit]}")
