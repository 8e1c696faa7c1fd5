"""Makes docs/dashboard.png: trains configs/digits.yaml and photographs its dashboard in a real browser.

Needs Chromium (`apt-get install chromium`) and `pip install playwright`; run it from the top folder:

    python scripts/dashboard_picture.py docs/dashboard.png
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from safeloop.config import load
from safeloop.sinks.tensorboard import dashboard_text
from safeloop.trainer import trainer_class

WIDTH, HEIGHT = 1500, 2600
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE_S = 60.0
DRAWN = """() => {
  const count = root => [...root.querySelectorAll('*')].reduce((sum, e) =>
    sum + (e.shadowRoot ? count(e.shadowRoot) : 0) +
    (e.tagName === 'path' && (e.getAttribute('d') || '').length > 200 ? 1 : 0), 0);
  return count(document);
}"""
"""JavaScript: how many curves are drawn, in all shadow roots."""


def main() -> None:
    """Train, serve, photograph, crop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/digits.yaml"))
    parser.add_argument("--height", type=int, default=1830, help="pixels to keep")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(given.config, overrides=[f"run.dir={folder}/runs", "log.sinks=[tensorboard]"])
        trainer_class(loaded)(loaded).fit()
        _, _, opens = dashboard_text(Path(folder, "runs", "digits")).partition("#")
        with server(folder) as address:
            picture = photograph(f"{address}/#{opens}", Path(folder) / "browser")
    save(picture, given.picture, given.height)
    print(f"{given.picture}: {given.picture.stat().st_size:,} bytes")


@contextlib.contextmanager
def server(folder: str) -> Iterator[str]:
    """A TensorBoard over `folder/runs` on a free port; yields its address once the layout is read."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--reload_interval", "1", "--load_fast", "false"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: get(f"{address}/data/plugins_listing")["custom_scalars"]["enabled"])
        yield address
    finally:
        process.terminate()
        process.wait(10)


def get(address: str) -> Any:
    """The JSON at an address; an empty default where the server is not up yet."""
    try:
        return json.load(urllib.request.urlopen(address, timeout=5))
    except OSError:
        return {"custom_scalars": {"enabled": False}}


def wait_for(is_ready: Any) -> None:
    """Ask five times a second, for a minute."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError("TensorBoard does not serve the dashboard")
        time.sleep(0.2)


def photograph(address: str, profile: Path) -> bytes:
    """The page once its curves stand still, as PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=shutil.which("chromium"),
            headless=True,
            args=FLAGS,
            viewport={"width": WIDTH, "height": HEIGHT},
        )
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(address, wait_until="domcontentloaded")
        page.locator("tf-custom-scalar-multi-line-chart-card svg").first.wait_for()
        until_still(page)
        picture = page.screenshot()
        browser.close()
    return picture


def until_still(page: Page) -> None:
    """Wait until the number of drawn curves has not changed for three seconds."""
    before, still = -1, 0
    while still < 3:
        page.wait_for_timeout(1000)
        drawn = page.evaluate(DRAWN)
        still = still + 1 if drawn == before and drawn > 0 else 0
        before = drawn


def save(picture: bytes, path: Path, height: int) -> None:
    """Crop from the top, reduce to 128 colours, write."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image = image.crop((0, 0, image.width, min(height, image.height)))
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
