"""Debian's Chromium, or another one that PREFGEN_CHROMIUM names, driven by Playwright."""

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("PREFGEN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


# For a module alone: while Playwright runs, its event loop keeps others in the process from starting one.
@pytest.fixture(scope="module")
def chromium():
    """The browser; tests make pages of their own in it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: install Debian's chromium, or name one in PREFGEN_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
