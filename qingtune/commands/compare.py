"""`qingtune compare`: train setups on the same data in processes of their own -> a table of what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qingtune.config.commands import CompareConfig
from qingtune.config.load import Loaded, read_json_object
from qingtune.data.prepare import check_files_exist
from qingtune.errors import UserError, raise_all
from qingtune.evaluation.compare.run_trials import TRIALS, Bench, run_all, run_search
from qingtune.evaluation.compare.search import Search, extremes, require_optuna
from qingtune.evaluation.compare.setups import (
    Setup,
    about_full_training,
    about_learning_rates,
    check_varied,
    grid_setups,
    make_setup,
    methods_to_compare,
)
from qingtune.evaluation.compare.summary import Comparison, compare_outcomes
from qingtune.evaluation.compare.tables import as_console, as_json, as_markdown, ordered_otherwise, reference_name
from qingtune.evaluation.compare.trial import interruption, is_trial_file, wait_for_left_behind
from qingtune.files.digests import sha256_of
from qingtune.files.write import refuse_links, write_json, write_text
from qingtune.machine.describe import launched_processes
from qingtune.output.console import say, show
from qingtune.output.invocation import command_line
from qingtune.output.redaction import redact, redact_values
from qingtune.output.units import counted
from qingtune.runs.folder import check_output_folder, is_run, only_run_in, ours_and_others
from qingtune.runs.plots import plot_comparison, try_to_draw
from qingtune.runs.record import FACTS, FEW_ROWS, WEIGHTS_REMOVED, changed_names, read_record, without_secrets
from qingtune.runs.result_folder import shown

DONE, FAILED, INTERRUPTED = 0, 1, 130
# What a comparison leaves in its folder; BEGUN is the first.
BEGUN, JOURNAL = "compare_config.json", "search.journal"
PAGE, NUMBERS, PICTURE = "comparison.md", "comparison.json", "comparison.png"
_FILES = (BEGUN, JOURNAL, PAGE, NUMBERS, PICTURE)
START_OVER = "Pass --overwrite_output_dir to start over, or choose another output_dir."


def compare(loaded: Loaded[CompareConfig], command: str) -> int:
    """Run the trials that are not finished yet, write the report and print its table.

    Args:
        command: resumes the comparison.

    Returns:
        The exit code: 0, 1 if a trial failed, 130 if a signal ended it early; what is done is kept then.

    Raises:
        UserError: any error that the user can fix, before the first trial.
    """
    config, output_dir = loaded.config, Path(loaded.config.output_dir)
    how_to_go_on = f"Stopped. To resume: {command}"
    _check(config, loaded.given)
    setups, notices = _search_checked(loaded) if config.space else _grid_checked(loaded)
    check_output_folder(output_dir, overwrite=config.overwrite_output_dir, first_file=BEGUN, what="a comparison")
    check_files_exist({"data_path": config.data_path, "eval_data_path": config.eval_data_path})
    with only_run_in(output_dir), interruption() as stopping:
        refuse_links(output_dir, _FILES)
        wait_for_left_behind(output_dir / TRIALS, stopping)
        if stopping.asked:
            say(how_to_go_on)
            return INTERRUPTED
        _begin(config, output_dir)
        for notice in notices:
            say(notice)
        bench = Bench(loaded, stopping)
        if config.space:
            run_search(bench, Search(config, output_dir / JOURNAL))
        else:
            run_all(bench, setups)
        code = INTERRUPTED if stopping.asked else FAILED if bench.any_failed() else DONE
        _report(bench)
    if code == INTERRUPTED:
        say(how_to_go_on)
    return code


# --- Before the first trial ------------------------------------------------------------------------------------------


def _check(config: CompareConfig, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be compared, by a UserError that names every problem; `given` is what the user set."""
    check_varied(config)
    no_space = not config.space
    checks = [
        (
            not config.has_evaluation,
            "a comparison needs evaluation data",
            "Set eval_data_path, or val_size, such as 0.1.",
        ),
        (
            config.has_evaluation and config.eval_strategy == "no",
            'eval_strategy is "no"',
            "Remove it: a comparison needs evaluations.",
        ),
        (config.pruner != "none" and no_space, f"pruner {config.pruner} needs space", "Set space, or remove it."),
        ("trials" in given and no_space, "trials needs space", "Set space, or remove it."),
        ("sampler" in given and no_space, "sampler needs space", "Set space, or remove it."),
        (
            config.dry_run,
            "dry_run does not apply to a comparison",
            f"`{command_line('plan')}` shows the memory of each method.",
        ),
        (
            config.resume_from_checkpoint not in ("auto", True),
            "resume_from_checkpoint does not apply to a comparison",
            "Unfinished trials are resumed automatically.",
        ),
        (launched_processes() > 1, "a comparison starts its processes itself", "Run it without a launcher."),
    ]
    raise_all([UserError(what, fix=fix) for wrong, what, fix in checks if wrong])


def _grid_checked(loaded: Loaded[CompareConfig]) -> tuple[list[Setup], list[str]]:
    """The setups of the grid, and messages about them."""
    setups = grid_setups(loaded)
    about = [about_learning_rates(loaded.config, loaded.given), about_full_training(loaded.config)]
    notices = [*filter(None, about), *(notice for setup in setups for notice in setup.notices)]
    return setups, [*dict.fromkeys(notices)]


def _search_checked(loaded: Loaded[CompareConfig]) -> tuple[list[Setup], list[str]]:
    """No setups, because a search finds them; checks the values it may try, and returns messages about all of them."""
    require_optuna()
    assert loaded.config.space is not None
    points = extremes(loaded.config.space)
    setups = [make_setup(loaded, method, point) for method in methods_to_compare(loaded.config) for point in points]
    about = about_learning_rates(loaded.config, loaded.given)
    of_all = [notice for notice in setups[0].notices if all(notice in setup.notices for setup in setups)]
    return [], [*([about] if about else []), *of_all]


def _begin(config: CompareConfig, output_dir: Path) -> None:
    """Remove an earlier comparison where that is asked for, else make sure that this is the same one; write it down."""
    if config.overwrite_output_dir:
        _remove_trials(output_dir / TRIALS)
        for name in _FILES:
            (output_dir / name).unlink(missing_ok=True)
    paths = [*(config.data_path or []), *(config.eval_data_path or [])]
    space = config.model_dump(mode="json", include={"space"}).get("space")
    now = {"data": {path: sha256_of(Path(path)) for path in paths}, "space": space}
    if config.space:
        now["methods"] = methods_to_compare(config)
    if (output_dir / BEGUN).exists():
        before = read_json_object(str(output_dir / BEGUN))
        for name in changed_names(before, now):
            if name in now:
                raise UserError(
                    f"the {name} of this comparison changed since it began", where=str(output_dir), fix=START_OVER
                )
    settings = redact_values(config.model_dump(mode="json", exclude_defaults=True, exclude={"overwrite_output_dir"}))
    write_json(output_dir / BEGUN, {**without_secrets(now), "settings": settings})


def _remove_trials(folder: Path) -> None:
    """Remove those of an earlier comparison; one that stayed would pass for a trial of this one.

    Removes nothing where something else lies there.
    """
    names = [path.stem for path in folder.glob("*.json") if is_trial_file(path)]
    known = {folder / f"{name}{ending}" for name in names for ending in ("", ".json", ".log")}
    around = sorted(folder.iterdir()) if folder.is_dir() else []
    others = [path.name for path in around if path not in known or path.is_symlink()]
    for run in [path for path in known if path.is_dir()]:
        ours, not_ours = ours_and_others(run)
        others += [f"{run.name}/{name}" for name in not_ours] if is_run(run) or not ours else [run.name]
    if others:
        raise UserError(
            f"the trials of an earlier comparison cannot be removed, because they contain other files: {shown(others)}",
            where=str(folder),
            fix="Move them away, or choose another output_dir.",
        )
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"cannot be removed ({error.strerror})",
            where=str(error.filename or folder),
            fix="Remove it, or choose another output_dir.",
        ) from error


# --- The report ------------------------------------------------------------------------------------------------------


def _report(bench: Bench) -> None:
    """Write the report, and print it."""
    config, output_dir = bench.loaded.config, bench.output_dir
    comparison = compare_outcomes([*bench.outcomes.values()])
    trials = [bench.trial(setup, seed) for setup, of_seeds in bench.outcomes.values() for seed in of_seeds]
    records = [record for trial in trials if (record := read_record(trial.folder))]
    steps = min((record.results["steps"] for record in records), default=0)
    evaluated_on = ", ".join(config.eval_data_path or []) or f"{config.val_size:g} of it, held out"
    data = ", ".join(config.data_path or [])
    about = [f"Model: {config.model_name_or_path}", f"Data: {data}; evaluated on {evaluated_on}"]
    rows = next(filter(None, (_rows_evaluated(trial.folder) for trial in trials)), 0)
    few = " With so few, small differences may be noise." * (rows < FEW_ROWS)
    evaluated = [f"Evaluated on {counted(rows, 'sample')}.{few}"] if rows else []
    about += evaluated
    if steps and not ordered_otherwise(comparison):
        samples = config.samples_a_step()
        about.append(
            f"{counted(steps, 'step')} of {counted(samples, 'sample')}, the same for all setups, in the same order"
        )
    write_text(output_dir / PAGE, redact(as_markdown(comparison, about)))
    versions = records[0].versions if records else {}
    write_json(output_dir / NUMBERS, redact_values({"about": about, "versions": versions, **as_json(comparison)}))
    drawn = False
    if comparison.best:
        drawn = try_to_draw(lambda: _draw(comparison, output_dir / PICTURE), PICTURE)
        for line in evaluated:
            show(line)
        show(as_console(comparison, min(120, max(80, shutil.get_terminal_size().columns))))
        best = bench.trial(comparison.best.setup, min(comparison.best.numbers))
        show(f"Its settings: {best.config_file}; its result: {best.folder}")
        if (note := best.folder / WEIGHTS_REMOVED).exists():  # it was not the best yet when another's were kept
            show(f"Its weights were removed; to train them again: {note}")
    else:
        show("No trial is finished.")
    show(f"Report: {output_dir / PAGE}, {NUMBERS}" + f", {PICTURE}" * drawn)


def _rows_evaluated(folder: Path) -> int | None:
    """Samples that a run was evaluated on, from its facts; None where they are missing."""
    path = folder / FACTS
    if not path.exists():
        return None
    evaluation = read_json_object(str(path)).get("data", {}).get("evaluation") or {}
    return evaluation.get("summary", {}).get("samples")


def _draw(comparison: Comparison, picture: Path) -> None:
    """Quality over memory; eval_loss where there is no quality."""
    rows = [row for row in comparison.rows if row.measured]
    related = all("quality" in row.measured and row.measured["quality"].least >= 0 for row in rows)
    points: list[tuple[str, tuple[float, float, float], tuple[float, float, float]]] = []
    for row in rows:
        across, up = row.measured["peak_bytes"], row.measured["quality" if related else "eval_loss"]
        sizes = (across.median / 1e9, across.least / 1e9, across.most / 1e9)
        scale = 100 if related else 1
        points.append((row.setup.name, sizes, (up.median * scale, up.least * scale, up.most * scale)))
    standing = f"quality relative to {reference_name(comparison)} (%)" if related else "eval_loss (nats per token)"
    plot_comparison(points, ("peak memory (GB)", standing), picture)
