"""`qingtune compare`: train setups on the same data in processes of their own -> a table of what was measured."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qingtune.command_config import CompareConfig
from qingtune.comparison import Comparison, compare_outcomes
from qingtune.comparison_table import as_console, as_json, as_markdown
from qingtune.config_load import Loaded, read_json_object
from qingtune.data.prepare import check_files_exist
from qingtune.errors import UserError, raise_all
from qingtune.files import sha256_of, write_json
from qingtune.output_folder import check_output_folder, only_run_in
from qingtune.plots import plot_comparison
from qingtune.record import read_record
from qingtune.redaction import redact, redact_values
from qingtune.search import Asked, Search, extremes, require_optuna
from qingtune.setups import Setup, about_learning_rates, check_varied, grid_setups, make_setup, methods_to_compare
from qingtune.trials import (
    Interruption,
    Outcome,
    State,
    Trial,
    check_same_settings,
    check_same_work,
    evaluations,
    finished_outcome,
    interruption,
    last_evaluation,
    run_trial,
)

DONE, FAILED, INTERRUPTED = 0, 1, 130
# What a comparison leaves in its folder; BEGUN is the first.
BEGUN, TRIALS, JOURNAL = "compare_config.json", "trials", "search.journal"
PAGE, NUMBERS, PICTURE = "comparison.md", "comparison.json", "comparison.png"
_ANEW_FLAG = re.compile(r" --overwrite[_-]output[_-]dir(?:[= ]true\b)?")
ANEW = "Pass --overwrite_output_dir to begin anew, or choose another output_dir."
Outcomes = dict[str, tuple[Setup, dict[int, Outcome]]]


def compare(loaded: Loaded[CompareConfig], command: str) -> int:
    """Run the trials that are not finished yet, write the report and print its table.

    Args:
        command: what the user typed, shown where it can be used again.

    Returns:
        The exit code: 0, 1 if a trial failed, 130 if a signal ended it early; what is done is kept then.

    Raises:
        UserError: anything that the user can mend, before the first trial.
    """
    config, output_dir = loaded.config, Path(loaded.config.output_dir)
    _check(config)
    setups, notices = _search_checked(loaded) if config.space else _grid_checked(loaded)
    check_output_folder(output_dir, overwrite=config.overwrite_output_dir, first_file=BEGUN, what="a comparison")
    check_files_exist({"data_path": config.data_path, "eval_data_path": config.eval_data_path})
    with only_run_in(output_dir), interruption() as stopping:
        _begin(config, output_dir)
        for notice in notices:
            _say(notice)
        bench = _Bench(loaded, stopping)
        if config.space:
            _search(bench, Search(config, output_dir / JOURNAL))
        else:
            _run_all(bench, setups)
        code = INTERRUPTED if stopping.asked else FAILED if bench.any_failed() else DONE
        bench.report()
    if code == INTERRUPTED:
        _say(f"Stopped. To go on: {_ANEW_FLAG.sub('', command)}")
    return code


# --- Before the first trial ------------------------------------------------------------------------------------------


def _check(config: CompareConfig) -> None:
    """Refuse what cannot be compared.

    Raises:
        UserError: names every problem.
    """
    check_varied(config)
    problems: list[UserError] = []
    if not (config.eval_data_path or config.val_size):
        problems.append(
            UserError("a comparison needs evaluation data", fix="Give eval_data_path, or val_size, such as 0.1.")
        )
    elif config.eval_strategy == "no":
        problems.append(UserError('eval_strategy is "no"', fix="Leave it out: a comparison needs evaluations."))
    if config.pruner != "none" and not config.space:
        problems.append(
            UserError(f"pruner {config.pruner} without space has no meaning", fix="Give space, or leave it out.")
        )
    if config.resume_from_checkpoint not in ("auto", True):
        problems.append(
            UserError(
                "resume_from_checkpoint has no meaning in a comparison", fix="Unfinished trials go on by themselves."
            )
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append(UserError("a comparison starts its processes itself", fix="Start it without a launcher."))
    raise_all(problems)


def _grid_checked(loaded: Loaded[CompareConfig]) -> tuple[list[Setup], list[str]]:
    """The grid's setups, and what the user should be told of them."""
    setups = grid_setups(loaded)
    about = about_learning_rates(loaded.config, loaded.given)
    notices = [*([about] if about else []), *(notice for setup in setups for notice in setup.notices)]
    return setups, [*dict.fromkeys(notices)]


def _search_checked(loaded: Loaded[CompareConfig]) -> tuple[list[Setup], list[str]]:
    """No setups, as a search finds them; but what it may ask for is checked, and what is true of all is told."""
    require_optuna()
    assert loaded.config.space is not None
    points = extremes(loaded.config.space)
    setups = [make_setup(loaded, method, point) for method in methods_to_compare(loaded.config) for point in points]
    about = about_learning_rates(loaded.config, loaded.given)
    of_all = [notice for notice in setups[0].notices if all(notice in setup.notices for setup in setups)]
    return [], [*([about] if about else []), *of_all]


def _begin(config: CompareConfig, output_dir: Path) -> None:
    """Remove an earlier comparison where that is asked for, else make sure that this is the same one; write it down.

    Raises:
        UserError: the data or the space is not what it was.
    """
    if config.overwrite_output_dir:
        shutil.rmtree(output_dir / TRIALS, ignore_errors=True)
        for name in (BEGUN, JOURNAL, PAGE, NUMBERS, PICTURE):
            (output_dir / name).unlink(missing_ok=True)
    paths = [*(config.data_path or []), *(config.eval_data_path or [])]
    space = config.model_dump(mode="json", include={"space"}).get("space")
    now = {"data": {path: sha256_of(Path(path)) for path in paths}, "space": space}
    if config.space:
        now["methods"] = methods_to_compare(config)
    if (output_dir / BEGUN).exists():
        before = read_json_object(str(output_dir / BEGUN))
        for name, value in now.items():
            if before.get(name) != value:
                raise UserError(
                    f"the {name} of this comparison changed since it began", where=str(output_dir), fix=ANEW
                )
    settings = redact_values(config.model_dump(mode="json", exclude_defaults=True, exclude={"overwrite_output_dir"}))
    write_json(output_dir / BEGUN, {**now, "settings": settings})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- Trials ----------------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """Where trials are run and their outcomes collected.

    Attributes:
        outcomes: setup's name -> the setup, and seed -> how its trial ended.
    """

    loaded: Loaded[CompareConfig]
    stopping: Interruption

    def __post_init__(self) -> None:
        self.output_dir = Path(self.loaded.config.output_dir)
        first = self.loaded.config.seed
        self.seeds = range(first, first + self.loaded.config.seeds)
        self.outcomes: Outcomes = {}
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def trial(self, setup: Setup, seed: int) -> Trial:
        return Trial(setup, seed, self.output_dir / TRIALS / f"{setup.slug}-seed{seed}")

    def run(self, trial: Trial, of_all: str, watch: Callable[[Sequence[dict[str, Any]]], bool]) -> Outcome:
        """Run a trial unless it is finished, and tell how it goes."""
        name = f"{of_all} {trial.setup.name}, seed {trial.seed}"
        outcome = finished_outcome(trial)
        if outcome.state == "finished":
            self.console.print(f"{name}: finished already", markup=False)
        elif self.stopping.asked:
            outcome = Outcome("not run")
        else:
            self.console.print(f"{name} ...", markup=False)
            with self.console.status("") as status:

                def look(lines: Sequence[dict[str, Any]]) -> bool:
                    status.update(_progress(lines))
                    return watch(lines)

                outcome = run_trial(trial, self.stopping, look)
            self.console.print(f"{name}: {_told(outcome)}", markup=False)
        self.keep(trial, outcome)
        check_same_work([self.trial(setup, seed) for setup, of_seeds in self.outcomes.values() for seed in of_seeds])
        return outcome

    def keep(self, trial: Trial, outcome: Outcome) -> None:
        self.outcomes.setdefault(trial.setup.name, (trial.setup, {}))[1][trial.seed] = outcome

    def keep_end(self, setup: Setup, state: str) -> None:
        """Keep how a setup's first trial ended in an earlier start."""
        ended: State = "pruned" if state == "pruned" else "failed"
        trial = self.trial(setup, self.seeds[0])
        self.keep(trial, Outcome(ended, last_evaluation(trial) if ended == "pruned" else f"see {trial.log_file}"))

    def losses_of(self, setup: Setup) -> list[float]:
        """Of its finished trials."""
        _, outcomes = self.outcomes[setup.name]
        return [outcome.numbers.eval_loss for outcome in outcomes.values() if outcome.numbers]

    def end_of(self, setup: Setup) -> State:
        """How the last of its trials ended."""
        return [*self.outcomes[setup.name][1].values()][-1].state

    def any_failed(self) -> bool:
        return any(o.state == "failed" for _, of_seeds in self.outcomes.values() for o in of_seeds.values())

    def report(self) -> None:
        """Write the report, and print it."""
        comparison = compare_outcomes([*self.outcomes.values()])
        config = self.loaded.config
        records = [
            read_record(self.trial(setup, s).folder) for setup, of_seeds in self.outcomes.values() for s in of_seeds
        ]
        steps = sorted({record.results["steps"] for record in records if record})
        versions = next((record.versions for record in records if record), {})
        about = _about(config, steps)
        (self.output_dir / PAGE).write_text(redact(as_markdown(comparison, about)), encoding="utf-8")
        write_json(
            self.output_dir / NUMBERS, redact_values({"about": about, "versions": versions, **as_json(comparison)})
        )
        if comparison.best:
            _draw(comparison, self.output_dir / PICTURE)
            print(as_console(comparison, min(120, max(80, shutil.get_terminal_size().columns))))
            best = self.trial(comparison.best.setup, min(comparison.best.numbers))
            print(f"Its settings: {best.config_file}; its result: {best.folder}")
        else:
            print("No trial is finished.")
        print(f"Report: {self.output_dir / PAGE}, {NUMBERS}" + f", {PICTURE}" * bool(comparison.best))


def _run_all(bench: _Bench, setups: Sequence[Setup]) -> None:
    """All setups with the first seed, then with the next, so that a first comparison is there early."""
    trials = [bench.trial(setup, seed) for seed in bench.seeds for setup in setups]
    check_same_settings(trials)
    for number, trial in enumerate(trials, 1):
        bench.run(trial, f"[{number}/{len(trials)}]", lambda _: False)


def _search(bench: _Bench, search: Search) -> None:
    """One point after another, each with all seeds; whether one falls behind is judged by its first seed."""
    told = [(make_setup(bench.loaded, point.method, point.varied), point.state) for point in search.told()]
    check_same_settings([bench.trial(setup, seed) for setup, _ in told for seed in bench.seeds])
    ends: dict[str, str] = {}
    for number, (setup, state) in enumerate(told, 1):
        ends[setup.name] = state
        if state == "finished":  # there may be more seeds than before
            _run_seeds(bench, setup, f"[{number}/{search.config.trials}]", lambda _: False)
        else:
            bench.keep_end(setup, state)
    while not bench.stopping.asked and (asked := search.ask()):
        setup = make_setup(bench.loaded, asked.method, asked.varied)
        watch = _Watch(search, asked, setup)
        if setup.name not in ends:
            losses = _run_seeds(bench, setup, f"[{asked.number}/{search.config.trials}]", watch)
            ends[setup.name] = bench.end_of(setup)
        else:  # drawn once more
            losses = bench.losses_of(setup)
        if ends[setup.name] == "stopped":
            return
        search.tell(asked, ends[setup.name], losses)


def _run_seeds(
    bench: _Bench, setup: Setup, of_all: str, watch: Callable[[Sequence[dict[str, Any]]], bool]
) -> list[float]:
    """Train a setup with each seed as long as that succeeds; `watch` sees the first only. Returns the losses."""
    for seed in bench.seeds:
        outcome = bench.run(bench.trial(setup, seed), of_all, watch if seed == bench.seeds[0] else lambda _: False)
        if outcome.state != "finished":
            break
    return bench.losses_of(setup)


@dataclass
class _Watch:
    """Reports a trial's evaluations to the search, and says whether it falls behind; never at its last step."""

    search: Search
    asked: Asked
    setup: Setup
    heard: int = 0

    def __call__(self, lines: Sequence[dict[str, Any]]) -> bool:
        """Take all lines so far."""
        found = evaluations(lines)
        losses = [loss for _, loss in found]
        behind = self.search.falls_behind(self.asked, losses, self.heard)
        self.heard = len(losses)
        return behind and not self._is_over(lines[-1])

    def _is_over(self, line: dict[str, Any]) -> bool:
        config = self.setup.config
        return line["step"] >= config.max_steps if config.max_steps > 0 else line["epoch"] >= config.num_train_epochs


def _progress(lines: Sequence[dict[str, Any]]) -> str:
    """The last step and evaluation, for a line that changes."""
    steps = [line for line in lines if "tokens" in line]
    found = evaluations(lines)
    told = f"step {steps[-1]['step']}, loss {steps[-1]['loss'] or math.nan:.4f}" if steps else "starting"
    return told + (f", eval_loss {found[-1][1]:.4f}" if found else "")


def _told(outcome: Outcome) -> str:
    """How a trial ended, as a line."""
    if outcome.numbers is None:
        return f"{outcome.state}. {outcome.message}"
    numbers = outcome.numbers
    return (
        f"eval_loss {numbers.eval_loss_before:.4f} -> {numbers.eval_loss:.4f}, {numbers.tokens_per_second:,.0f} tok/s"
    )


# --- The report ------------------------------------------------------------------------------------------------------


_OF_THE_ORDER = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"}


def _about(config: CompareConfig, steps: Sequence[int]) -> list[str]:
    """What was trained on what.

    Args:
        steps: of finished trials, each number once.
    """
    evaluated = ", ".join(config.eval_data_path or []) or f"{config.val_size:g} of it, held out"
    data = ", ".join(config.data_path or [])
    lines = [f"Model: {config.model_name_or_path}", f"Data: {data}; evaluated on {evaluated}"]
    of_methods = {name for settings in (config.per_method or {}).values() for name in settings}
    if steps and not _OF_THE_ORDER & {*(config.grid or {}), *(config.space or {}), *of_methods}:
        samples = config.per_device_train_batch_size * config.gradient_accumulation_steps
        lines.append(f"{steps[0]:,} steps of {samples} samples; all setups get the same ones in the same order")
    return lines


def _draw(comparison: Comparison, picture: Path) -> None:
    """Quality over memory; eval_loss where there is no quality."""
    rows = [row for row in comparison.rows if row.eval_loss and row.peak_bytes]
    related = all(row.quality for row in rows)
    points: list[tuple[str, tuple[float, float, float], tuple[float, float, float]]] = []
    for row in rows:
        across, up = row.peak_bytes, row.quality if related else row.eval_loss
        assert across is not None
        assert up is not None
        sizes = (across.median / 1e9, across.least / 1e9, across.most / 1e9)
        scale = 100 if related else 1
        points.append((row.setup.name, sizes, (up.median * scale, up.least * scale, up.most * scale)))
    assert comparison.reference is not None
    standing = f"quality relative to {comparison.reference.setup.name} (%)" if related else "eval_loss (nats per token)"
    plot_comparison(points, ("peak memory (GB)", standing), picture)
