"""The kernels in C under sanitizers, in a process of their own: no access beyond a buffer, no undefined behaviour, and
no two threads at one place without a barrier between them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from native_twin import VARIANTS, Variant

from qingtune.answering.decoder.native.build import SOURCE, has_native_units
from qingtune.kernels.native.build import HEADERS, flags_of_hidden_units

DRIVER = ROOT / "tests" / "native_driver.c"
BARRIERS = SOURCE.read_text(encoding="utf-8").count("#pragma omp barrier")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = [
    pytest.mark.skipif(not has_native_units(), reason="needs AVX2"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler"),
]


def built(folder: Path, source: Path, *flags: str) -> Path:
    """The driver compiled with a sanitizer, or the test is skipped where this compiler has none."""
    assert COMPILER
    program, include = folder / "driver", (f"-I{SOURCE.parent}", f"-I{HEADERS}")
    given = (f'-DSOURCE="{source}"', *include, "-march=native", "-std=gnu11", "-g1", *flags)
    trivial = folder / "trivial.c"
    trivial.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    for file in (trivial, DRIVER):
        done = subprocess.run(
            [COMPILER, *given, str(file), "-o", str(program), "-lm", "-lpthread"],
            capture_output=True,
            text=True,
            check=False,
        )
        if file == trivial and (
            done.returncode or subprocess.run([program], capture_output=True, check=False).returncode
        ):
            pytest.skip(f"no sanitizer that runs here: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr
    return program


def ran(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "3", "TSAN_OPTIONS": "exitcode=66", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=env, timeout=300)


@pytest.fixture(params=VARIANTS)
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The compiler's options for each variant of the kernels in turn."""
    variant: Variant = request.param
    for name, value in variant.environment().items():
        monkeypatch.setenv(name, value)
    return (*flags_of_hidden_units(), *variant.flags)


def test_no_access_is_out_of_bounds_and_no_behaviour_undefined(options: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("-O1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = ran(built(tmp_path, SOURCE, *flags, *options))
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_buffer_that_is_too_small_would_be_seen(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.c"
    text = SOURCE.read_text(encoding="utf-8")
    assert text.count("return scratch.used;") == 2
    narrow.write_text(text.replace("return scratch.used;", "return scratch.used - 64;"), encoding="utf-8")
    done = ran(built(tmp_path, narrow, "-O1", "-fopenmp", "-fsanitize=address"))
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr


def macros(*flags: str) -> dict[str, str]:
    """What the source is compiled with for a CPU."""
    assert COMPILER
    command = [COMPILER, *flags, "-dM", "-E", str(HEADERS / "simd.h")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = (line.split(maxsplit=2)[1:] for line in done.stdout.splitlines())
    found = {pair[0]: pair[-1] for pair in pairs}
    return {name: found[found[name]] if found[name] in found else found[name] for name in CHOICES}


CHOICES = ("LANES", "INT8_UNITS", "BF16_UNITS")


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["-march=x86-64-v3"], "8 0 0"),
        (["-march=x86-64-v3", "-mavxvnni"], "8 1 0"),
        (["-march=skylake-avx512"], "16 0 0"),
        (["-march=icelake-server"], "16 1 0"),
        (["-march=cooperlake"], "16 1 1"),
        (["-march=cooperlake", "-mno-avx512bf16"], "16 1 0"),
        (["-march=cooperlake", "-mno-avx512vnni"], "16 0 1"),
        (["-march=cooperlake", "-mno-avx512f"], "8 0 0"),
    ],
)
def test_each_cpu_gets_the_instructions_it_has(flags: list[str], wanted: str) -> None:
    found = macros(*flags)
    assert " ".join(found[name] for name in CHOICES) == wanted


def test_it_compiles_for_avx_vnni(tmp_path: Path) -> None:
    assert COMPILER
    flags = ("-march=x86-64-v3", "-mavxvnni", "-O1", "-fopenmp", "-S", f"-I{HEADERS}")
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(tmp_path / "made.s")], check=True)
    text = (tmp_path / "made.s").read_text(encoding="utf-8")
    assert "vpdpbusd" in text
    assert "zmm" not in text


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver for POSIX threads under ThreadSanitizer; see there."""
    folder = tmp_path_factory.mktemp("team")
    numbers = iter(range(BARRIERS))
    text = SOURCE.read_text(encoding="utf-8").replace("#include <omp.h>", "")
    text = re.sub(r"#pragma omp barrier", lambda _: f"team_barrier({next(numbers)});", text)
    loop = r"#pragma omp parallel for num_threads\(\(int\)threads\)\s+for \(int64_t (\w+) = 0; ([^;]+); \w+ \+= (\w+)\)"
    text, loops = re.subn(loop, r"for (int64_t \1 = own_number * \3; \2; \1 += \3 * team_size)", text)
    text, regions = re.subn(r"#pragma omp parallel num_threads\(\(int\)most_threads\)\n", "", text)
    assert (loops, regions, "#pragma omp" in text) == (2, 3, False)
    source = folder / "answer_step.c"
    source.write_text(text, encoding="utf-8")
    return built(folder, source, "-O1", "-DTEAM", "-fsanitize=thread")


def test_no_two_threads_are_at_one_place(team: Path) -> None:
    done = ran(team)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_a_barrier_that_is_missing_would_be_seen(team: Path, barrier: int) -> None:
    done = ran(team, str(barrier))
    assert "ThreadSanitizer: data race" in done.stderr
