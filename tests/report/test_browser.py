"""Report and studio in a real browser: no error in the console, no request that leaves the machine, and what
one clicks does what it says."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from test_page import make_run, metrics

from nextscale.models.zoo import TOY_ASSETS
from nextscale.report.comparison import write_comparison
from nextscale.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that is let go only if nothing went wrong in it and nothing left the machine."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    errors, requests = [], []
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    yield opened
    opened.close()
    local = ("data:", "blob:", "file:", "http://127.0.0.1:", "ws://127.0.0.1:", "about:")
    assert errors == [] and [each for each in requests if not each.startswith(local)] == []


def place(element: Any) -> list[float]:
    """Where an element is in the page, however far that is scrolled, and how large."""
    box = element.evaluate("each => each.getBoundingClientRect().toJSON()")
    scrolled = element.evaluate("each => window.scrollY")
    return [box["x"], box["y"] + scrolled, box["width"], box["height"]]


def test_the_report_wipes_and_enlarges(page, tmp_path):
    path = write_report(make_run(tmp_path / "run", metrics()))
    page.goto(path.as_uri())
    last = page.locator("#pair .sample").last.locator("img")
    beside = place(last)
    page.get_by_role("button", name="Lay one over the other").click()
    assert place(last) == place(page.locator("#pair .sample").first.locator("img")) != beside

    def clip() -> str:
        return last.evaluate("each => getComputedStyle(each).clipPath")

    slider = page.get_by_role("slider")
    assert "50%" in clip()
    slider.press("ArrowRight")  # it has the focus, and goes by the keyboard
    assert "51%" in clip()
    page.get_by_role("button", name="Lay them side by side").click()
    assert place(last) == beside

    chart = page.locator(".chart").first
    narrow = chart.bounding_box()["width"]
    chart.get_by_role("button").click()
    assert chart.bounding_box()["width"] > 2 * narrow and chart.get_by_text("Shrink").is_visible()


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_desktop_and_a_phone(page, tmp_path, width, scheme):
    folders = [make_run(tmp_path / name, metrics()) for name in ("a", "b")]
    both = write_comparison(folders, tmp_path / "both.html")
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for path in (write_report(folders[0]), both):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colour = page.evaluate("getComputedStyle(document.body).color")
        dark, light = "rgb(29, 31, 35)", "rgb(232, 232, 234)"
        assert colour == (light if scheme == "dark" else dark)
        assert all(image.get_attribute("alt") for image in page.locator("img").all())


@pytest.fixture
def studio(tmp_path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nextscale", "ui", "--runs", str(tmp_path / "runs"), "--port", str(port)]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(not TOY_ASSETS.is_dir(), reason=f"no miniature world in {TOY_ASSETS}")
def test_images_appear_and_a_run_ends_with_a_report(studio, page):  # which is closed first
    page.goto(studio)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Reward: mean").wait_for(timeout=60_000)
    assert page.locator("img").first.is_visible()
    page.get_by_label("Classes").fill("dragon")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("dragon'").first.wait_for(timeout=30_000)  # what is wrong with it

    page.get_by_role("tab", name="Tune").click()
    page.get_by_label("Steps").fill("1")
    page.get_by_label("Name of the run").fill("mine")
    page.get_by_role("button", name="Start").click()
    page.get_by_text("Running: mine").wait_for(timeout=30_000)
    page.get_by_text("Done: mine").wait_for(timeout=180_000)
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="Look again").click()
    page.frame_locator("iframe").get_by_role("heading", name="mine").wait_for(timeout=60_000)
