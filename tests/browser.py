"""A headless Chromium, where the machine has one, and the page in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browser() -> Iterator[Any]:
    """Skips the test that asks where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)
        if found is None:
            pytest.skip("needs a browser: apt install chromium, or playwright install chromium")
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        opened = driver.chromium.launch(
            executable_path=found, args=["--no-sandbox"] if root else []
        )
        yield opened
        opened.close()


class Tab:
    """A page of its own storage, and what it has asked for and complained of."""

    def __init__(self, opened: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = opened.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.goto(url)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, text: str) -> None:
        """As a document."""
        self.page.fill("#paste", text)
        self.page.click("#use")
        self.page.wait_for_selector("#view", state="visible")

    def ask(self, question: str, longest: str = "32", by: str = "Control+Enter") -> None:
        """`longest` may be less than the page offers, for the sake of time."""
        add = "text => document.getElementById('longest').add(new Option(text, text))"
        self.page.evaluate(add, longest)
        self.page.select_option("#longest", longest)
        self.page.fill("#question", question)
        if by.startswith("#"):
            self.page.click(by)
        else:
            self.page.press("#question", by)

    def until_answered(self) -> None:
        self.page.wait_for_selector("#submit", state="visible", timeout=60_000)

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector))

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())
