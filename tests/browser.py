"""A Chromium for the tests of pages: whichever the machine has, driven by playwright (`make browser` installs both)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Nothing but the page: no sandbox, which containers lack, and none of the browser's own errands on the network.
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def program() -> str | None:
    """The path of a Chromium: FUSED_TRANSFORMER_CHROMIUM, or the first that is found."""
    return os.environ.get("FUSED_TRANSFORMER_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def browser() -> Iterator:
    """playwright's Browser; skips where there is no Chromium or no playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: make browser")
    with playwright.sync_playwright() as driver:
        path = program() or driver.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium: make browser")
        running = driver.chromium.launch(executable_path=path, args=list(OPTIONS))
        try:
            yield running
        finally:
            running.close()
