"""Silence messages of libraries that users can do nothing about, and keep libraries from fetching native code."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import cast


def quieten() -> None:
    """Set the libraries up; called before they are imported.

    Where the package `kernels` is installed, bitsandbytes fetches native code from a hub while it is imported, and
    Transformers where a model's configuration asks for it. None in its place is what Python takes for "not installed".
    """
    cast("dict[str, object]", sys.modules).setdefault("kernels", None)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # bitsandbytes advises at import to install a package for a function that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*pin_memory.*no accelerator.*")


def quieten_transformers() -> None:
    """The same for Transformers' own logger and bars, which exist only once it is imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
