"""The page in a real browser: no error on its console, no wider than a phone, both languages, values at the pointer."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_run import logged, write_run

from qingtune.runs.page.write import write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(NAMES)}")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--v=0", "--dump-dom",
)  # fmt: skip
CONSOLE = re.compile(r'CONSOLE[^"]*"(.*)", source')
# Run after the page's own script; what it finds stands in attributes of <html> when the DOM is dumped.
PROBE = """<script>
const data = document.documentElement.dataset;
data.width = `${innerWidth}`;
data.content = `${document.documentElement.scrollWidth}`;
const shows = (kind) => getComputedStyle(document.querySelector("h2 ." + kind)).display !== "none";
const spoken = () => (shows("en") ? "en" : "") + (shows("zh") ? "zh" : "");
data.first = spoken();
for (const kind of ["zh", "en"]) { document.querySelector(`label[for=choose-${kind}]`).click(); data[kind] = spoken(); }
const chart = document.querySelector(".chart"), plot = chart.querySelector(".plot"), box = plot.getBoundingClientRect();
const values = () => [...chart.querySelectorAll("output, .at")].map((place) => place.textContent).join(" ");
data.before = values();
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }));
data.pointed = values();
plot.dispatchEvent(new PointerEvent("pointerleave"));
data.after = values();
</script></body>"""
# The page in a frame, as a browser without a screen makes no window narrower than 500; its attributes go outside.
FRAME = """<!doctype html><html><body><iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{page}"
onload="Object.assign(document.documentElement.dataset, contentDocument.documentElement.dataset)"></iframe>
</body></html>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(write_run(tmp_path_factory.mktemp("browser") / "run")).read_text(encoding="utf-8")


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., tuple[dict[str, str], list[str]]]:
    """A function that opens a page; returns the data attributes of its <html> and the lines of the console."""

    def opened(text: str, width: int = 1000, language: str = "en-US") -> tuple[dict[str, str], list[str]]:
        file = tmp_path / "page.html"
        file.write_text(FRAME.format(width=width, page=html.escape(text)), encoding="utf-8")
        flags = (f"--user-data-dir={tmp_path / 'profile'}", f"--accept-lang={language}", f"--lang={language}")
        command = [str(BROWSER), *FLAGS, *flags, file.as_uri()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, encoding="utf-8")
        outside = re.search(r"<html([^>]*)>", ended.stdout)
        assert outside, ended.stdout[:2000]
        return dict(re.findall(r'data-(\w+)="([^"]*)"', outside[1])), CONSOLE.findall(ended.stderr)

    return opened


def test_the_page_runs_without_an_error(page: str, browse: Callable[..., tuple[dict[str, str], list[str]]]) -> None:
    data, console = browse(page)
    assert data == {"ready": "yes"}
    assert console == []


def test_an_error_would_be_seen(page: str, browse: Callable[..., tuple[dict[str, str], list[str]]]) -> None:
    _, console = browse(page.replace('"use strict";', '"use strict"; none.such;'))
    assert any("none is not defined" in line for line in console)
    _, console = browse(page.replace("<main>", '<main><img src="https://example.org/x.png">'))
    assert any("violates the following Content Security Policy" in line for line in console)
    data, _ = browse(page.replace("</body>", PROBE).replace("<main>", f"<main><pre>{'x' * 80}</pre>"), 390)
    assert int(data["content"]) <= 390
    data, _ = browse(page.replace("</body>", PROBE).replace("<main>", f"<main><nobr>{'x' * 80}</nobr>"), 390)
    assert int(data["content"]) > 390


@pytest.mark.parametrize(("width", "language"), [(390, "en"), (320, "zh"), (1280, "zh")])
def test_it_fits_the_screen_speaks_both_languages_and_shows_values(
    page: str, width: int, language: str, browse: Callable[..., tuple[dict[str, str], list[str]]]
) -> None:
    tag = {"en": "en-US", "zh": "zh-CN"}[language]
    data, console = browse(page.replace("</body>", PROBE), width, tag)
    assert console == []
    assert data["width"] == str(width)
    assert int(data["content"]) <= width
    assert (data["first"], data["zh"], data["en"]) == (language, "zh", "en")
    assert data["before"] == data["after"] != data["pointed"]
    assert data["pointed"].endswith("@ 120")
    assert data["pointed"].split()[0] == f"{logged(120)['loss']:.4f}"
