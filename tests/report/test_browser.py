"""Report and studio in a real browser: no error in the console, no request that leaves the machine, and what
one clicks does what it says; and axe-core finds nothing that would shut anyone out."""

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


# What Gradio writes and nobody who uses it can change: the rule, and how the element begins.
OF_GRADIO = {
    "aria-prohibited-attr": '<div aria-label="Empty value"'
}  # a name for an empty place, without a role


def faults(page: Any) -> list[str]:
    """What axe-core holds to be a serious or critical fault of the page as it is shown now."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 15  # it has looked
    return [
        f"{rule['id']}: {node['html']} {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
        if rule["impact"] in ("serious", "critical")
        and not node["html"].startswith(OF_GRADIO.get(rule["id"], "none"))
    ]


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
    chart.get_by_role("button", name="Enlarge").click()
    assert chart.bounding_box()["width"] > 2 * narrow and chart.get_by_text("Shrink").is_visible()


def texts_at(chart: Any, ticks: str) -> list[tuple[str, float, float]]:
    """The labels of ticks, and where they begin to the right and below, in the units of the drawing."""
    place = "each => [each.textContent, Number(each.getAttribute('x')), Number(each.getAttribute('y'))]"
    return [tuple(each.evaluate(place)) for each in chart.locator(f"{ticks} text").all()]


def test_a_chart_tells_values_and_zooms(page, tmp_path):
    lines = metrics()
    page.goto(write_report(make_run(tmp_path / "run", lines)).as_uri())
    chart = page.locator(".chart").first
    plot, curve = chart.locator(".plot"), chart.locator("[data-curve='0'] > path").last
    as_drawn, box = curve.get_attribute("d"), place(plot)
    plot.scroll_into_view_if_needed()
    scale = box[2] / 259.2
    at = {text: box[0] + x * scale for text, x, _ in texts_at(chart, ".tick.x")}
    height = plot.bounding_box()["y"] + 60 * scale

    page.mouse.move((at["10"] + at["20"]) / 2, height)
    trained, evaluated = lines[15]["reward"], lines[15]["eval_reward"]
    told = ["step 15", f"training {trained:.4g}", f"evaluation, fixed seeds {evaluated:.4g}"]
    assert chart.locator(".tip").inner_text().split("\n") == told
    page.mouse.move(at["10"] - 1, height)
    page.mouse.down()
    page.mouse.move(at["20"] + 1, height, steps=3)
    page.mouse.up()
    ticks = texts_at(chart, ".ticks")
    assert [text for text, *_ in ticks][:6] == ["10", "12", "14", "16", "18", "20"]
    assert not chart.locator(".tick").first.is_visible()
    # Step 15 is where its tick would be, and as high as the ticks say.
    (_, x_10, _), (_, x_20, _) = ticks[0], ticks[5]
    (first, _, y_first), (last, _, y_last) = ticks[6], ticks[-1]
    points = [tuple(map(float, pair.split()[-2:])) for pair in curve.get_attribute("d").split("L")]
    x, y = points[14]
    assert x == pytest.approx((x_10 + x_20) / 2, abs=0.5)
    found = float(first) + (y + 3.6 - y_first) / (y_last - y_first) * (float(last) - float(first))
    assert found == pytest.approx(trained, abs=2e-3)

    chart.get_by_role("button", name="Show all").click()
    assert curve.get_attribute("d") == as_drawn and chart.locator(".tick").first.is_visible()
    for key in ("ArrowRight", "ArrowRight", "+"):
        page.keyboard.press(key)  # the chart has the focus
    assert "step 1" in chart.locator(".tip").inner_text() and chart.locator(".whole").is_visible()
    page.keyboard.press("Escape")
    assert curve.get_attribute("d") == as_drawn and not chart.locator(".whole").is_visible()
    chart.get_by_role("button", name="training").click()
    assert not curve.is_visible()
    page.mouse.move((at["10"] + at["20"]) / 2, height)
    assert "training" not in chart.locator(".tip").inner_text()


def test_a_name_hides_its_run_in_all_charts(page, tmp_path):
    folders = [make_run(tmp_path / name, metrics()) for name in ("a", "b")]
    page.goto(write_comparison(folders, tmp_path / "both.html").as_uri())
    page.get_by_role("button", name="b", exact=True).click()
    curves = page.locator("[data-curve]")
    hidden = [each for each in curves.all() if not each.is_visible()]
    assert len(hidden) == curves.count() // 2 == page.locator(".chart").count()


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
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        if path != both or (scheme == "light") == (width == 1200):  # a second each: two of four do
            assert faults(page) == []


def test_axe_sees_pale_text_and_a_picture_without_words(page, tmp_path):
    page.goto(write_report(make_run(tmp_path / "run", metrics())).as_uri())
    page.evaluate("document.querySelector('.verdict').style.color = '#bbb'")
    page.evaluate("document.querySelector('img').removeAttribute('alt')")
    assert [fault.partition(":")[0] for fault in faults(page)] == ["color-contrast", "image-alt"]


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

    model = page.get_by_label("Model", exact=True)
    model.first.click()
    page.get_by_role("option", name="toy-text", exact=True).first.click()
    assert page.get_by_label("Prompts").first.input_value().startswith("a photo of a red star")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Reward: mean").wait_for(timeout=60_000)

    page.get_by_role("tab", name="Tune").click()
    model.last.click()
    page.get_by_role("option", name="toy-text", exact=True).last.click()
    page.get_by_label("Prompts to train on").wait_for(timeout=30_000)
    model.last.click()
    page.get_by_role("option", name="toy", exact=True).last.click()
    page.get_by_label("Prompts to train on").wait_for(state="hidden", timeout=30_000)
    page.get_by_label("Steps").fill("1")
    page.get_by_label("Name of the run").fill("mine")
    page.get_by_role("button", name="Start").click()
    page.get_by_text("Running: mine").wait_for(timeout=30_000)
    page.get_by_text("Done: mine").wait_for(timeout=180_000)
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="Look again").click()
    page.frame_locator("iframe").get_by_role("heading", name="mine").wait_for(timeout=60_000)

    for scheme, width in (("light", 1200), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        for tab in ("Draw", "Score", "Tune", "Runs"):
            page.get_by_role("tab", name=tab).click()
            page.get_by_role("tab", name=tab, selected=True).wait_for()
            if tab == "Runs":
                page.frame_locator("iframe").get_by_role("heading", name="mine").wait_for(timeout=60_000)
            assert faults(page) == []
