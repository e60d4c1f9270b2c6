"""Trials one after another: methods and grids in turns of seeds, searches point by point; their outcomes collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from qingtune.config.commands import CompareConfig
from qingtune.config.load import Loaded
from qingtune.evaluation.compare.search import AskedPoint, Search
from qingtune.evaluation.compare.setups import Setup, make_setup
from qingtune.evaluation.compare.trial import (
    Interruption,
    State,
    Trial,
    TrialOutcome,
    Watch,
    check_same_settings,
    check_same_work,
    finished_outcome,
    last_evaluation,
    remove_checkpoints,
    remove_model,
    run_trial,
)
from qingtune.output.console import console, safe
from qingtune.runs.page.source import Curves

TRIALS = "trials"  # the folder of them


@dataclass
class Bench:
    """Where trials are run and their outcomes collected.

    Attributes:
        stopping: once it is asked for, no further trial begins.
        outcomes: setup's name -> the setup, and seed -> how its trial ended.
    """

    loaded: Loaded[CompareConfig]
    stopping: Interruption

    def __post_init__(self) -> None:
        self.output_dir = Path(self.loaded.config.output_dir)
        first = self.loaded.config.seed
        self.seeds = range(first, first + self.loaded.config.seeds)
        self.outcomes: dict[str, tuple[Setup, dict[int, TrialOutcome]]] = {}
        self.console = console()

    def trial(self, setup: Setup, seed: int) -> Trial:
        """The trial in its place."""
        return Trial(setup, seed, self.output_dir / TRIALS / f"{setup.slug}-seed{seed}")

    def run(self, trial: Trial, of_all: str, watch: Watch) -> TrialOutcome:
        """Run a trial unless it is finished, and tell how it goes."""
        name = f"{of_all} {trial.setup.name}, seed {trial.seed}"
        outcome = finished_outcome(trial)
        if outcome.state == "finished":
            remove_checkpoints(trial.folder)  # it may have ended without us
            self.console.print(safe(f"{name}: already finished"), markup=False)
        elif self.stopping.asked:
            outcome = TrialOutcome("not run")
        else:
            self.console.print(safe(f"{name} ..."), markup=False)
            with self.console.status("") as status:

                def look(curves: Curves) -> bool:
                    status.update(_progress(curves))
                    return watch(curves)

                outcome = run_trial(trial, self.stopping, look)
            self.console.print(safe(f"{name}: {_told(outcome)}"), markup=False)
        self.keep(trial, outcome)
        if self.loaded.config.keep_models == "best":
            self._remove_models_but_the_best()
        check_same_work([self.trial(setup, seed) for setup, of_seeds in self.outcomes.values() for seed in of_seeds])
        return outcome

    def _remove_models_but_the_best(self) -> None:
        """Leave one whole model: a setup's first seed, as a comparison names that one as its result."""
        finished = [
            (seed != self.seeds[0], outcome.numbers.eval_loss, self.trial(setup, seed))
            for setup, of_seeds in self.outcomes.values()
            for seed, outcome in of_seeds.items()
            if setup.method == "full" and outcome.numbers
        ]
        for _, _, trial in sorted(finished, key=itemgetter(0, 1))[1:]:
            remove_model(trial)

    def keep(self, trial: Trial, outcome: TrialOutcome) -> None:
        """Collect how a trial ended."""
        self.outcomes.setdefault(trial.setup.name, (trial.setup, {}))[1][trial.seed] = outcome

    def losses_of(self, setup: Setup) -> list[float]:
        """Of its finished trials."""
        _, outcomes = self.outcomes[setup.name]
        return [outcome.numbers.eval_loss for outcome in outcomes.values() if outcome.numbers]

    def any_failed(self) -> bool:
        """Whether a trial did."""
        return any(o.state == "failed" for _, of_seeds in self.outcomes.values() for o in of_seeds.values())


def run_all(bench: Bench, setups: Sequence[Setup]) -> None:
    """All setups with the first seed, then with the next, so that a first comparison is there early."""
    trials = [bench.trial(setup, seed) for seed in bench.seeds for setup in setups]
    check_same_settings(trials)
    for number, trial in enumerate(trials, 1):
        bench.run(trial, f"[{number}/{len(trials)}]", lambda _: False)


def run_search(bench: Bench, search: Search) -> None:
    """One point after another, each with all seeds; whether one falls behind is judged by its first seed."""
    reported = [(make_setup(bench.loaded, method, varied), state) for method, varied, state in search.reported()]
    check_same_settings([bench.trial(setup, seed) for setup, _ in reported for seed in bench.seeds])
    ends: dict[str, str] = {}
    count = max(search.config.trials, len(reported))
    for number, (setup, state) in enumerate(reported, 1):
        ends[setup.name] = state
        if state == "finished":  # there may be more seeds than before
            _run_seeds(bench, setup, f"[{number}/{count}]", lambda _: False)
        else:
            trial = bench.trial(setup, bench.seeds[0])
            bench.keep(trial, TrialOutcome("pruned", last_evaluation(trial)))
    while not bench.stopping.asked and (asked := search.ask()):
        setup = make_setup(bench.loaded, asked.method, asked.varied)
        if setup.name not in ends:  # else it is drawn once more
            of_all = f"[{asked.number}/{search.config.trials}]"
            ends[setup.name] = _run_seeds(bench, setup, of_all, _watch(search, asked, setup))
        if ends[setup.name] in ("stopped", "not run"):  # repeated when the search resumes
            return
        search.tell(asked, ends[setup.name], bench.losses_of(setup))


def _run_seeds(bench: Bench, setup: Setup, of_all: str, watch: Watch) -> State:
    """Train a setup with each seed as long as that succeeds, and return how the last ended; `watch` sees the first."""
    state: State = "not run"
    for seed in bench.seeds:
        state = bench.run(bench.trial(setup, seed), of_all, watch if seed == bench.seeds[0] else lambda _: False).state
        if state != "finished":
            break
    return state


def _watch(search: Search, asked: AskedPoint, setup: Setup) -> Watch:
    """Reports a trial's evaluations to the search, and says whether it falls behind; never at its last step."""
    config, heard = setup.config, 0

    def watch(curves: Curves) -> bool:
        nonlocal heard
        losses = [loss for _, loss in curves.evaluations]
        behind = search.falls_behind(asked, losses, heard)
        heard = len(losses)
        done, most = curves.values["epoch"], config.num_train_epochs
        if config.max_steps > 0:
            done, most = curves.steps, config.max_steps
        return behind and not (done and done[-1] >= most)

    return watch


def _progress(curves: Curves) -> str:
    """The last step and evaluation, for a line that changes."""
    progress = f"step {curves.steps[-1]}, loss {curves.values['loss'][-1]:.4f}" if curves.steps else "starting"
    return progress + (f", eval_loss {curves.evaluations[-1][1]:.4f}" if curves.evaluations else "")


def _told(outcome: TrialOutcome) -> str:
    """How a trial ended, as a line."""
    if outcome.numbers is None:
        return f"{outcome.state}. {outcome.message}"
    numbers = outcome.numbers
    return (
        f"eval_loss {numbers.eval_loss_before:.4f} -> {numbers.eval_loss:.4f}, {numbers.tokens_per_second:,.0f} tok/s"
    )
