"""The page: self-contained, and live in a browser."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from browsing import CHROMEDRIVER, CHROMIUM, chromium, show
from crowd import Crowd, Stuck
from harness import receive, until
from watching import WATCHED, get, place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from certificates import Certificates
    from harness import Start

pytestmark = pytest.mark.once


class Page(html.parser.HTMLParser):
    """Collect the links, event handlers and style attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.styles = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        for name, value in attrs:
            if name in {"src", "href", "srcset", "action", "data"}:
                self.links.append(value or "")
            self.handlers += [name] if name.startswith("on") else []
            self.styles += name == "style"


def test_page_is_self_contained(start: Start) -> None:
    """The page links only /status and /metrics, and the policy has the hashes of its script and style."""
    answer = get(start(*WATCHED), "/")
    text = answer.body.decode()
    page = Page()
    page.feed(text)
    assert {link for link in page.links if not link.startswith("data:,")} == {"status", "metrics"}
    assert not any(urlsplit(link).netloc for link in page.links)
    assert (page.handlers, page.styles) == ([], 0)
    assert set(re.findall(r"https?://[^\"' )]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text
    assert "@import" not in text
    assert "innerHTML" not in text
    policy = answer.headers["Content-Security-Policy"]
    for element in ("script", "style"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


# The last character turns the direction of text.
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>\u202e"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Return a headless Chromium."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    pytest.importorskip("selenium", reason="selenium is not installed")
    with chromium(tmp_path / "profile") as driver:
        yield driver


def text_of(browser: Any, element: str) -> str:
    return str(browser.execute_script(f"return document.querySelector({element!r}).innerText"))


def points(browser: Any) -> int:
    """Return the number of samples in the chart of connections."""
    script = "return (document.querySelector('#chart-active polyline')?.getAttribute('points') || '').split(' ').length"
    return int(browser.execute_script(script))


# Returns the words that are broken over two lines. The page may break lines at a <wbr>, where text nodes end.
BROKEN_WORDS = """
const range = document.createRange(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), broken = [];
while (walker.nextNode())
  for (const word of walker.currentNode.data.matchAll(/[^\\s-]+/g)) {
    range.setStart(walker.currentNode, word.index);
    range.setEnd(walker.currentNode, word.index + word[0].length);
    if (new Set([...range.getClientRects()].map((box) => box.top)).size > 1) broken.push(word[0]);
  }
return broken;
"""


@pytest.mark.chromium
def test_page_in_a_browser(start: Start, browser: Any, tmp_path: Path, certificates: Certificates) -> None:
    """The page is live, shows names as text, fits a phone, and reports when echod drains or is gone.

    A paused client is shown, and a reload keeps the charts.
    """
    config = tmp_path / "echo.toml"
    config.write_text(f"[listeners.{json.dumps(HOSTILE)}]\naddress = '127.0.0.1:0'\n")
    daemon = start(
        *(*WATCHED, "--config", str(config), "--shutdown.quiet-period", "1000", "--shutdown.drain-timeout", "1000"),
        *(*certificates.options("secure"), "--limits.write-timeout", "600"),
    )
    browser.get(f"http://127.0.0.1:{place(daemon)[1]}/")
    until(lambda: text_of(browser, "#state") == "ready")
    assert text_of(browser, "#active") == "0"
    assert text_of(browser, "#certificates").startswith("secure")
    assert "89\xa0d left" in text_of(browser, "#certificates")
    listeners = text_of(browser, "#listeners")
    assert HOSTILE.replace("\u202e", "\\u{202e}") in listeners
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#settings tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    assert ["shutdown.quiet_period", "1000", "--shutdown.quiet-period"] in rows

    daemon.echo(b"closed before the page is read")
    with daemon.connect() as client, Crowd() as crowd:

        def flow() -> bool:
            client.sendall(b"x" * 50_000)
            receive(client, 50_000)
            return bool(re.fullmatch(r"[\d.]+", text_of(browser, "#in"))) and bool(
                re.search("[kM]B/s", text_of(browser, "#clients"))
            )

        until(flow)
        paused = crowd.add(daemon.connect(receive_buffer=4096), None, 1)
        crowd.pause_reading(paused)
        crowd.run(Stuck(paused))
        until(lambda: text_of(browser, "#active") == "2")
        until(lambda: text_of(browser, "#states") == "1\xa0open, 1\xa0paused")
        first = text_of(browser, "#clients tr")
        assert (f"127.0.0.1:{paused.port}" in first, "paused" in first) == (True, True)
        until(lambda: points(browser) > 2)
        browser.refresh()
        until(lambda: text_of(browser, "#state") == "ready")
        assert points(browser) > 2
        assert f"127.0.0.1:{client.getsockname()[1]}" in text_of(browser, "#clients")
        assert re.fullmatch(r"clean\s+eof\s+1", text_of(browser, "#closed"))
        for width, height, scheme in ((1200, 1000, "light"), (390, 844, "dark"), (360, 640, "light")):
            show(browser, width, height, scheme)
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            assert browser.execute_script(BROKEN_WORDS) == []
            background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            channels = [int(channel) for channel in re.findall(r"\d+", background)]
            assert (sum(channels) < 384) == (scheme == "dark")
            if shots := os.environ.get("SCREENSHOTS"):
                browser.save_screenshot(f"{shots}/{width}-{scheme}.png")

        daemon.send_signal()
        until(lambda: text_of(browser, "#state") == "draining")
        left = re.compile(r"Draining: 2 clients still connected; at most 1[0-6]\smin left\.")
        until(lambda: left.fullmatch(text_of(browser, "#notice")) is not None)
        paused.sock.close()
    assert daemon.wait() == 0
    until(lambda: text_of(browser, "#state") == "gone")
    assert "No answer from echod" in text_of(browser, "#notice")
    assert browser.title.startswith("gone")
    messages = [line["message"] for line in browser.get_log("browser")]
    assert not [message for message in messages if "ERR_CONNECTION" not in message], "the console is not silent"
