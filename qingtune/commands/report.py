"""`qingtune report`: the page of a run, report.html in its folder; training writes it too."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from qingtune.config.commands import ReportConfig
from qingtune.errors import UserError
from qingtune.output.console import give
from qingtune.runs.page.write import write_page
from qingtune.runs.record import METRICS, RECORD, SETTINGS


def report(config: ReportConfig) -> None:
    """Rewrite the page and print its path.

    Raises:
        UserError: there is no run in the folder, one of its files is broken, or the disk does not take the page.
    """
    folder = Path(config.output_dir)
    if not any((folder / name).is_file() for name in (RECORD, SETTINGS, METRICS)):
        raise UserError("no training run here", where=config.output_dir, fix="Pass the output_dir of a run.")
    page = write_page(folder)
    give(str(page))
    if config.open:
        webbrowser.open(page.resolve().as_uri())
