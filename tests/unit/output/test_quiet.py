"""What libraries are kept from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from qingtune.output.quiet import quieten


def test_no_library_fetches_native_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes does so at its import, on a CPU with bf16 units, if the package `kernels` is installed."""
    (tmp_path / "kernels.py").write_text("get_kernel = lambda *_, **__: 1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert importlib.util.find_spec("kernels")
    quieten()
    try:
        assert importlib.util.find_spec("kernels") is None
        with pytest.raises(ImportError):
            import kernels  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    finally:
        sys.modules.pop("kernels", None)
