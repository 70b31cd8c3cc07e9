"""Take the pictures of the report and of the studio that README.md shows.

    nextscale train toy-painting
    python benchmarks/screenshots.py runs/toy-painting

Needs Playwright, and chromium in the PATH.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from nextscale.report.page import write_report

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZE = {"width": 1100, "height": 1100}


def keep(page: Page, name: str) -> None:
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").save(path := DOCS / f"{name}.webp", quality=85)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def take_report(page: Page, run: Path) -> None:
    page.goto(write_report(run).resolve().as_uri())
    keep(page, "report")


def take_studio(page: Page, run: Path) -> None:
    """The base model and the trained one, side by side."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nextscale", "ui", "--runs", str(run.parent), "--port", str(port)]
    studio = subprocess.Popen(command, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"})
    try:
        until = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
        page.set_viewport_size(SIZE | {"height": 850})  # below it is empty
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_label("Beside it").first.click()
        page.get_by_role("option", name=f"runs: {run.name}").click()
        page.get_by_role("button", name="Draw", exact=True).click()
        page.wait_for_function(
            "document.body.innerText.match(/Reward: mean/g)?.length === 2", timeout=120_000
        )
        page.wait_for_timeout(1000)
        keep(page, "studio")
    finally:
        studio.terminate()
        studio.wait(20)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = parser.parse_args().run
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        take_report(page, run)
        take_studio(page, run)
        browser.close()


if __name__ == "__main__":
    main()
