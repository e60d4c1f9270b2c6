"""The settings under which this machine computes like one whose CPU lacks some of its units."""

from __future__ import annotations


def environment_without(flags: str) -> dict[str, str]:
    """Environment variables that leave units of the CPU unused by qingtune, PyTorch and oneDNN.

    They must be set before torch is imported.

    Args:
        flags: flags of /proc/cpuinfo, separated by commas; empty for none.
    """
    if not flags:
        return {}
    missing, chosen = set(flags.split(",")), {"QINGTUNE_CPU_WITHOUT": flags}
    if "avx512f" in missing:
        return {**chosen, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    return {**chosen, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE" if "avx512_vnni" in missing else "AVX512_CORE_VNNI"}
