"""Keep off the screen what libraries say and users can do nothing about; warnings that matter stay."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Set the libraries' logging; called before they are imported."""
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
