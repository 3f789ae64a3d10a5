"""Chromium for tests, headless; `make browser` installs it where it can."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
SILENT_FLAGS = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]  # it calls home else


@contextmanager
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: run `make browser` as root, or install your system's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ROOT_FLAGS, *SILENT_FLAGS])
        yield browser
        browser.close()
