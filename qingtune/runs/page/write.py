"""Writes the page of a run, once or during the run."""

from __future__ import annotations

import time
from pathlib import Path

from qingtune.errors import UserError
from qingtune.files.write import disk_errors, write_text
from qingtune.output.console import say
from qingtune.output.invocation import command_line
from qingtune.runs.page.render import render
from qingtune.runs.page.source import read_run
from qingtune.runs.record import PAGE

MOST_OF_THE_TIME = 0.01  # of a run that may go into its page


def write_page(folder: Path) -> Path:
    """Write the page of the run in a folder; returns its path.

    Raises:
        UserError: a file of the run is broken, or the disk does not take the page.
    """
    text = render(read_run(folder))
    again = command_line("report", output_dir=folder)
    with disk_errors(PAGE, folder, f"Check its permissions and the free disk space, then run `{again}`."):
        write_text(folder / PAGE, text)
    return folder / PAGE


class PageOfRun:
    """Keeps a run's page up to date; an error of the page is reported once and does not stop the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rest_until = 0.0
        self.reported: set[str] = set()

    def __call__(self, _event: object) -> None:
        """Something was measured: write the page, unless that would take too much of the time."""
        if time.perf_counter() >= self.rest_until:
            self.write()

    def write(self) -> bool:
        """Write the page now; returns whether that went well."""
        began = time.perf_counter()
        try:
            write_page(self.folder)
        except Exception as error:  # a fault of the page, whichever, must not cost hours of training
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if reason not in self.reported:
                say(f"Warning: {PAGE} was not written: {reason}")
            self.reported.add(reason)
            return False
        finally:
            now = time.perf_counter()
            self.rest_until = now + (now - began) / MOST_OF_THE_TIME
        return True
