"""A headless Chromium, where there is one, and what it saw of a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


def find_chromium() -> str:
    """The browser's path, `COPPICE_CHROMIUM` first; skips the test where there is none."""
    named = os.environ.get("COPPICE_CHROMIUM")
    found = [path for name in ((named,) if named else _NAMES) if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium on this machine (apt-get install chromium, or COPPICE_CHROMIUM)")
    return found[0]


@contextmanager
def launched() -> Iterator[Browser]:
    """The browser, for a session's tests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_chromium()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_QUIET))
        yield browser
        browser.close()


class Seen:
    """Everything that a page said, asked for or was refused while it was open."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def check_quiet(self) -> None:
        """Nothing was said, nothing but the page itself was asked for, nothing was refused."""
        assert self.messages == []
        assert self.requests == [self.page.url]
        assert self.page.evaluate("window.violations") == []


@contextmanager
def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Seen]:
    """The page in a context of its own; must have been quiet at the end."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    try:
        page = context.new_page()
        if options.get("java_script_enabled", True):
            page.add_init_script(_WATCH)
        seen = Seen(page)
        page.goto(path.as_uri())
        yield seen
        if options.get("java_script_enabled", True):
            seen.check_quiet()
    finally:
        context.close()
