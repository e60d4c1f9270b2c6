"""How long training takes: the work of a token, and what this machine was seen to do, kept in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

from qingtune.files.write import write_json
from qingtune.planning.planner import Planner, Samples

FILE = "speed.json"
MOST_KEPT = 100
ALIKE = 1.05  # runs whose tokens cost the same up to this factor are one kind of run; the last one counts
PRODUCTS = "products"  # a measurement of matrix products alone
# Share of the rate of 16-bit matrix products at which training runs: docs/performance.md, middle of two machines.
SHARE_OF_PRODUCTS = {"full": 0.73, "full8": 0.70, "lora": 0.72, "qlora8": 0.90, "qlora4": 0.72}


@dataclass(frozen=True)
class TokenWork:
    """What the work of a token depends on; parameters are counted, not bytes.

    Attributes:
        body: weights that a token is multiplied by between embedding and head.
        attention_width: all query heads together.
        attention_layers: layers in which a token attends to those before it.
    """

    body: int
    head: int
    adapters: int
    attention_width: int
    attention_layers: int


def flops_per_token(
    work: TokenWork, trained_share: float, mean_length: float, *, full: bool, recomputed: float = 0.0
) -> float:
    """Multiplications and additions that training one token cannot do without.

    LoRA: forward and input gradient through frozen weights (2 + 2 a weight), those and the weight gradient through
    adapters (6), the head for trained tokens only, attention over the half of the scores that is not masked (forward
    two products, backward four). Full training: 6 a weight.

    Args:
        trained_share: of the tokens.
        mean_length: of the samples, in tokens.
        full: whether all weights are trained.
        recomputed: share of the layers that go forward twice.
    """
    attention = work.attention_layers * 6 * 2 * work.attention_width * mean_length / 2
    a_weight = 6 if full else 4
    adapters = 0 if full else 6 * work.adapters
    again = recomputed * (2 * work.body + attention / 3)
    return a_weight * (work.body + trained_share * work.head) + adapters + attention + again


def flops_of(planner: Planner, recompute: int, samples: Samples) -> float:
    """Operations a token of a run in which this many layers go forward twice."""
    blueprint = planner.blueprint
    work = TokenWork(
        body=blueprint.active_body,
        head=blueprint.hidden * blueprint.vocabulary,
        adapters=planner.built.low_rank,
        attention_width=blueprint.attention_width,
        attention_layers=blueprint.attention_layers,
    )
    again = recompute / blueprint.layers
    return flops_per_token(work, samples.trained_share, samples.mean, full=planner.full, recomputed=again)


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@pydantic_dataclass(frozen=True)
class Speed:
    """What was seen once.

    Attributes:
        device: its name.
        dtype: 16-bit or fp32.
        method: a key of SHARE_OF_PRODUCTS, or PRODUCTS.
        flops_per_token: of that run; 1 for products, whose tokens are operations.
        tokens_per_second: after the first step.
    """

    device: str
    dtype: str
    method: str
    flops_per_token: _Positive
    tokens_per_second: _Positive


_SPEEDS = TypeAdapter(list[Speed])


@dataclass(frozen=True)
class Estimate:
    """Tokens a second, and what the estimate rests on."""

    tokens_per_second: float
    basis: str


def read_speeds(cache: Path) -> list[Speed]:
    """All that was seen; nothing where the file is missing or broken, as it can be measured again."""
    try:
        return _SPEEDS.validate_json((cache / FILE).read_bytes())
    except (OSError, ValueError):
        return []


def keep_speed(cache: Path, speed: Speed) -> None:
    """Add what was seen, in the place of an older run of the same kind.

    Raises:
        OSError: the cache cannot be written.
    """
    others = [other for other in read_speeds(cache) if not _same_kind(other, speed)]
    cache.mkdir(parents=True, exist_ok=True)
    write_json(cache / FILE, [asdict(one) for one in (*others, speed)][-MOST_KEPT:])


def _same_kind(one: Speed, other: Speed) -> bool:
    same = (one.device, one.dtype, one.method) == (other.device, other.dtype, other.method)
    return same and abs(math.log(one.flops_per_token / other.flops_per_token)) < math.log(ALIKE)


def estimate_speed(speeds: Iterable[Speed], device: str, dtype: str, method: str, flops: float) -> Estimate | None:
    """Tokens a second of a run, from the nearest that was seen on this device, scaled by the work of a token.

    The same method counts before others, and any run before products alone; None where nothing was seen.

    Args:
        flops: a token's, of the run to come.
    """
    here = [speed for speed in speeds if (speed.device, speed.dtype) == (device, dtype)]
    runs = [speed for speed in here if speed.method != PRODUCTS]
    chosen = [speed for speed in runs if speed.method == method] or runs
    if chosen:
        nearest = min(chosen, key=lambda speed: abs(math.log(speed.flops_per_token / flops)))
        rate = nearest.tokens_per_second * nearest.flops_per_token / flops
        if nearest.method != method:
            share = SHARE_OF_PRODUCTS[method] / SHARE_OF_PRODUCTS.get(nearest.method, SHARE_OF_PRODUCTS[method])
            return Estimate(rate * share, "a run of another method here")
        return Estimate(rate, "an earlier run here")
    for speed in here:
        products = speed.tokens_per_second * speed.flops_per_token
        return Estimate(products * SHARE_OF_PRODUCTS[method] / flops, "this machine's matrix products")
    return None
