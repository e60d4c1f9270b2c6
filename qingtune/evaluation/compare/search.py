"""A search for settings by Optuna; its journal on the disk lets it be resumed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qingtune.config.commands import CompareConfig
from qingtune.config.methods import TrainingMethod
from qingtune.config.types import Interval
from qingtune.errors import UserError
from qingtune.evaluation.compare.setups import methods_to_compare
from qingtune.files.write import refuse_links

if TYPE_CHECKING:
    import optuna

_METHOD = "method"  # is no setting, so it can stand among them
_TOLD = "how it ended"


@dataclass(frozen=True)
class AskedPoint:
    """A point to try, the `number`th; `handle` is Optuna's."""

    number: int
    method: TrainingMethod
    varied: dict[str, Any]
    handle: optuna.trial.Trial


class Search:
    """Asks for points one after another, hears how good they are, and stops those that fall behind.

    Its points depend on the seed and on the reported results, not on interruptions.
    """

    def __init__(self, config: CompareConfig, journal: Path) -> None:
        """Begin, or resume from the journal."""
        self.optuna = optuna = require_optuna()
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

        self.config = config
        self.methods = methods_to_compare(config)
        self.distributions = _distributions(config, self.methods)
        halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        pruner = halving if config.pruner == "halving" else optuna.pruners.NopPruner()
        refuse_links(journal.parent, [journal.name])
        storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))
        self.study = optuna.create_study(
            storage=storage, study_name="compare", direction="minimize", pruner=pruner, load_if_exists=True
        )
        self._asked_again = self._ask_again()

    def _ask_again(self) -> set[int]:
        """Have what an earlier start left interrupted or failed, as by a full disk, asked again first; its numbers."""
        states, trials = self.optuna.trial.TrialState, self.study.get_trials()
        unsettled = [trial for trial in trials if trial.state in (states.RUNNING, states.FAIL)]
        known = [trial.system_attrs.get("fixed_params", trial.params) for trial in trials if trial not in unsettled]
        for trial in unsettled:
            if trial.params not in known:
                known.append(trial.params)
                self.study.enqueue_trial(trial.params)
            if trial.state == states.RUNNING:
                self.study.tell(trial.number, state=states.FAIL)
        return {trial.number for trial in unsettled}

    def reported(self) -> list[tuple[TrainingMethod, dict[str, Any], str]]:
        """Points whose end (finished, pruned, failed) is known, in their order, without failures of earlier starts."""
        return [
            (*self._values(trial.params), trial.user_attrs[_TOLD])
            for trial in self.study.get_trials()
            if _TOLD in trial.user_attrs and trial.number not in self._asked_again
        ]

    def ask(self) -> AskedPoint | None:
        """The next point; None after the last one."""
        count = len(self.reported())
        if count >= self.config.trials:
            return None
        samplers = {"random": self.optuna.samplers.RandomSampler, "tpe": self.optuna.samplers.TPESampler}
        self.study.sampler = samplers[self.config.sampler](seed=self.config.seed + count)
        trial = self.study.ask(self.distributions)
        return AskedPoint(count + 1, *self._values(trial.params), handle=trial)

    def falls_behind(self, asked: AskedPoint, losses: Sequence[float], heard: int) -> bool:
        """Report evaluations, the first `heard` of which are known, and ask whether the trial should end."""
        for number, loss in enumerate(losses[heard:], heard + 1):
            asked.handle.report(loss, number)
            if asked.handle.should_prune():
                return True
        return False

    def tell(self, asked: AskedPoint, state: str, losses: Sequence[float]) -> None:
        """Say how a point ended: finished with losses, of which the median counts, pruned, or failed."""
        states = self.optuna.trial.TrialState
        asked.handle.set_user_attr(_TOLD, state)
        if state == "finished":
            self.study.tell(asked.handle, statistics.median(losses))
        else:
            self.study.tell(asked.handle, state=states.PRUNED if state == "pruned" else states.FAIL)

    def _values(self, params: dict[str, Any]) -> tuple[TrainingMethod, dict[str, Any]]:
        """Method and settings of a point; numbers drawn from an interval to three figures, as one would write them."""
        space = self.config.space or {}
        varied = {name: _three_figures(params[name], space[name]) for name in space}
        return cast("TrainingMethod", params.get(_METHOD, self.methods[0])), varied


def extremes(space: dict[str, list[Any] | Interval]) -> list[dict[str, Any]]:
    """Points that hold every value of the space that can be wrong by itself: each alternative, each interval's ends."""
    values = {
        name: [int(end) if part.whole else end for end in (part.low, part.high)] if isinstance(part, Interval) else part
        for name, part in space.items()
    }
    most = max(len(of_one) for of_one in values.values())
    return [{name: of_one[min(number, len(of_one) - 1)] for name, of_one in values.items()} for number in range(most)]


def _three_figures(value: Any, part: list[Any] | Interval) -> Any:
    if not isinstance(part, Interval) or part.whole:
        return value
    return min(max(float(f"{value:.3g}"), part.low), part.high)


def _distributions(config: CompareConfig, methods: Sequence[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, part in (config.space or {}).items():
        if not isinstance(part, Interval):
            found[name] = CategoricalDistribution([_scalar(value) for value in part])
        elif part.whole:
            found[name] = IntDistribution(int(part.low), int(part.high), log=part.log)
        else:
            found[name] = FloatDistribution(part.low, part.high, log=part.log)
    return found | ({_METHOD: CategoricalDistribution([*methods])} if len(methods) > 1 else {})


def _scalar(value: Any) -> Any:
    """A value as Optuna keeps it; lists and objects as the text that means the same in a flag."""
    if isinstance(value, list):
        return ",".join(str(item) for item in cast("list[object]", value))
    return json.dumps(value) if isinstance(value, dict) else value


def require_optuna() -> Any:
    """The module, which is loaded only where a search is asked for.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a search needs Optuna, which is not installed",
            where="space",
            fix="Run pip install optuna, or use grid, which does not need it.",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
