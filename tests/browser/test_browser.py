"""The page in a real browser, in front of the real server and a model that says what the test wants."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.chain_server import TOK, Client
from helpers.script_model import Script

from nanochat.engine import Engine
from nanochat.server.app import create_app

playwright = pytest.importorskip(
    "playwright.sync_api", reason="not run: the package playwright is not installed"
)
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="not run: no chromium on this machine"),
]
WAIT = 60_000  # milliseconds; machines may be busy

RICH = (
    "## Sum\n\nA **bold** word and `code`:\n\n```python\ndef f(x):\n    return x + 1  # one more\n```\n\n",
    ("40 + 2",),
    "So: 42.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
)


def script(name: str) -> str:
    """A function of JavaScript from the file of that name."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def new_server(port: int = 0) -> Client:
    return Client(create_app(Engine(Script(), TOK), "main-sft", num_rows=4), port)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    client = new_server()
    yield client
    client.close()


def wait_until(page: Any, expression: str) -> None:
    end = time.monotonic() + WAIT / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


class Walker:
    """A person with the page open; every error of the page and every dialog is kept."""

    def __init__(self, browser: Any, port: int, **options: Any) -> None:
        options = {"viewport": {"width": 1200, "height": 800}, "service_workers": "block", **options}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(WAIT)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.bodies: list[dict] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("dialog", lambda dialog: (self.errors.append("a dialog opened"), dialog.dismiss()))
        self.page.on(
            "request", lambda r: self.bodies.append(json.loads(r.post_data)) if r.method == "POST" else None
        )
        self.page.goto(f"http://127.0.0.1:{port}/")
        self.wait("document.getElementById('model').textContent")

    def _console(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def wait(self, expression: str) -> None:
        """Until it is true. Playwright's wait_for_function needs eval, which the page's policy forbids."""
        wait_until(self.page, expression)

    def ask(self, text: str, wait: bool = True) -> None:
        self.page.fill("#input", text)
        self.page.keyboard.press("Enter")
        if wait:
            self.idle()

    def idle(self) -> None:
        self.wait("document.getElementById('log').getAttribute('aria-busy') === 'false'")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).last.inner_text())

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def act(self, label: str) -> None:
        """Press the last button of that name."""
        self.page.get_by_role("button", name=label, exact=True).last.click(force=True)


@pytest.fixture
def walk(browser: Any, server: Client) -> Iterator[Walker]:
    server.model.say("hello")
    walker = Walker(browser, server.port)
    yield walker
    assert walker.errors == []
    walker.context.close()


def test_the_walk_of_a_user(walk: Walker, server: Client, tmp_path: Path) -> None:
    page = walk.page
    assert page.is_visible("#empty") and walk.text("#model") == "main-sft"
    server.model.say(*RICH)
    page.click("#ideas button >> nth=0")
    walk.idle()
    # markdown, highlighted code, the tool's call as expression and result, figures
    assert walk.text(".answer h4") == "Sum" and walk.text(".answer strong") == "bold"
    assert walk.text(".code .t-key") == "return" and walk.text(".t-com") == "# one more"
    assert walk.text(".tape-code") == "40 + 2" and walk.text(".tape-output") == "42"
    assert walk.text(".answer td") == "2" and "tokens/s" in walk.text(".stats")
    walk.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".copy-code")
    copied = "navigator.clipboard.readText()"
    assert page.evaluate(copied) == "def f(x):\n    return x + 1  # one more"
    page.click(".copy-answer")
    assert "[40 + 2 = 42] So: 42." in page.evaluate(copied)

    # another answer, a branch, and back
    server.model.say("second")
    walk.act("Answer again")
    walk.idle()
    assert walk.text(".answer") == "second" and walk.text(".branch span") == "2/2"
    walk.act("Earlier version")
    assert walk.text(".answer h4") == "Sum" and walk.text(".branch span") == "1/2"
    # an edited question is a branch too, and leaves the old one alone
    page.focus("#input")
    page.keyboard.press("ArrowUp")
    page.fill(".editor textarea", "edited question")
    server.model.say("third")
    page.keyboard.press("Enter")
    walk.idle()
    assert walk.text(".bubble") == "edited question" and walk.text(".answer") == "third"
    assert walk.bodies[-1]["messages"] == [{"role": "user", "content": "edited question"}]
    walk.act("Earlier version")
    assert walk.text(".bubble") == "What is 47 + 85?"
    walk.act("Earlier version")
    assert walk.text(".answer td") == "2"

    # settings and commands
    walk.ask("/temperature 0.25")
    assert "Temperature 0.25" in walk.text(".notice") and "0.25" in walk.text("#sampling")
    page.keyboard.press("Control+Period")
    page.fill("#system", "be brief")
    page.fill("#fields input[name=top_k]", "7")
    page.get_by_role("button", name="Done").click()
    server.model.say("brief")
    walk.ask("once more")
    body = walk.bodies[-1]
    assert body["temperature"] == 0.25 and body["top_k"] == 7
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["parts"][1] == {"type": "python", "text": "40 + 2"}

    # a second conversation, search, rename
    page.keyboard.press("Control+Shift+KeyO")
    walk.ask("zebra crossing")
    assert walk.count(".entry") == 2
    page.keyboard.press("Control+KeyK")
    page.keyboard.type("zebra")
    assert walk.count(".entry") == 1
    page.fill("#search", "")
    page.locator(".entry").first.hover()
    page.get_by_role("button", name="Rename zebra crossing").click()
    page.fill("#rename-text", "Stripes")
    page.keyboard.press("Enter")
    assert walk.text("#title") == "Stripes"

    # export, delete all, import: everything is as it was
    page.keyboard.press("Control+Period")
    with page.expect_download() as download:
        page.click("#export-all")
    file = tmp_path / "all.json"
    download.value.save_as(file)
    page.click("#remove-all")
    page.click("#confirm-yes")
    page.wait_for_selector("#empty:not([hidden])")
    assert walk.count(".entry") == 0
    page.set_input_files("#file", str(file))
    walk.wait("document.querySelectorAll('.entry').length === 2")
    assert sorted(page.locator(".entry .open").all_inner_texts()) == ["Stripes", "What is 47 + 85?"]
    page.locator(".entry .open", has_text="47").click()
    assert walk.text(".answer") == "brief" and walk.count(".message") == 4
    page.click("#export")
    with page.expect_download() as download:
        page.get_by_role("button", name="Markdown").click()
    download.value.save_as(tmp_path / "one.md")
    assert "[40 + 2 = 42]" in (tmp_path / "one.md").read_text()
    # and kept: after a reload too
    page.reload()
    page.wait_for_selector(".entry")
    assert walk.count(".entry") == 2 and walk.text(".answer") == "brief"
    page.locator(".entry").first.hover()
    page.locator(".entry .quiet").nth(1).click()
    page.click("#confirm-yes")
    walk.wait("document.querySelectorAll('.entry').length === 1")


def test_stop_and_continue(walk: Walker, server: Client) -> None:
    digits = "1-2-3-4-5-6-7-8-9"  # no two of these bytes are one token
    server.model.say(digits, delay_seconds=0.1)
    walk.ask("count", wait=False)
    walk.wait("document.querySelector('.answer')?.textContent.includes('2')")
    walk.page.keyboard.press("Escape")
    walk.idle()
    shown = walk.text(".answer")
    assert digits.startswith(shown) and 2 < len(shown) < len(digits) and "Stopped." in walk.text(".trouble")
    server.model.say(digits)
    walk.act("Continue this answer")
    walk.idle()
    assert walk.text(".answer") == digits and walk.bodies[-1]["continue_final_message"]


def test_other_conversations_go_on(walk: Walker, server: Client) -> None:
    """An answer is finished in its own conversation, whatever is on the screen."""
    server.model.say("a b c d e f g h i j", delay_seconds=0.04)
    walk.ask("first", wait=False)
    walk.page.wait_for_selector(".entry.busy")
    walk.page.keyboard.press("Control+Shift+KeyO")
    assert walk.page.is_visible("#empty")
    walk.wait("!document.querySelector('.entry.busy')")
    walk.page.locator(".entry .open").click()
    assert walk.text(".answer") == "a b c d e f g h i j"


def test_reload_in_mid_stream(walk: Walker, server: Client) -> None:
    server.model.say("w" * 40, delay_seconds=0.15)
    walk.ask("slow", wait=False)
    walk.wait("document.querySelector('.answer')?.textContent.length > 12")
    walk.page.reload()
    walk.page.wait_for_selector(".trouble")
    assert walk.text(".bubble") == "slow" and 5 < len(walk.text(".answer")) < 40
    assert "before this answer was complete" in walk.text(".trouble")
    server.model.say("fresh")
    walk.act("Answer again")
    walk.idle()
    assert walk.text(".answer") == "fresh" and walk.text(".branch span") == "2/2"


def test_server_gone_and_back(browser: Any) -> None:
    server = new_server()
    server.model.say("kept words")
    walk = Walker(browser, server.port, service_workers="allow")
    walk.ask("remember")
    walk.wait("navigator.serviceWorker.ready.then(() => true)")
    walk.wait("caches.open('nanochat-page-1').then((cache) => cache.keys()).then((keys) => keys.length > 15)")
    server.model.say("x" * 400, delay_seconds=0.03)
    walk.ask("again", wait=False)
    walk.wait("[...document.querySelectorAll('.answer')].at(-1).textContent.length > 3")
    server.server.config.timeout_graceful_shutdown = 0
    server.close()
    walk.page.wait_for_selector("#banner:not([hidden])")
    assert "stopping" in walk.text(".trouble") or "lost" in walk.text(".trouble")
    # readable without the server, even from nothing
    walk.page.reload()
    walk.page.wait_for_selector(".entry")
    assert "kept words" in walk.page.locator(".answer").first.inner_text()
    assert "does not answer" in walk.text("#banner")
    again = new_server(server.port)
    again.model.say("back")
    walk.page.wait_for_selector("#banner[hidden]", state="attached")
    walk.act("Try again")
    walk.idle()
    assert walk.text(".answer") == "back"
    assert walk.errors == []
    walk.context.close()
    again.close()


PAYLOADS = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror=window.pwned=1>",
    "[a](javascript:window.pwned=1) [b](JaVaScRiPt:window.pwned=1) [c](data:text/html,x)",
    "![i](javascript:window.pwned=1) ![r](http://127.0.0.1:9/x.png)",
    "<svg/onload=window.pwned=1>`<b>`\n\n```html\n<script>window.pwned=1</script>\n```\n",
    "| <img src=x onerror=window.pwned=1> | b |\n|---|---|\n| <iframe srcdoc=x> | 2 |\n",
    '[x](http://a.b/"onmouseover="window.pwned=1) <http://a.b/\'onclick=1>',
    "- [ ] <a href=javascript:window.pwned=1>t</a>\n> <style>*{display:none}</style>\n# </h1><form action=x>",
    "[t](<javascript:window.pwned=1>) [\\u0001](\x01javascript:window.pwned=1) &#106;avascript:",
]
SPLITS = script("splits.js")


def test_xss_every_split(walk: Walker) -> None:
    """However hostile text is cut, the page shows text, and the same nodes as for the uncut one."""
    assert walk.page.evaluate(SPLITS, [*PAYLOADS, "".join(p for p in RICH if isinstance(p, str))]) == [
        [],
        None,
    ]


def test_xss_from_the_model(walk: Walker, server: Client) -> None:
    for payload in PAYLOADS:
        server.model.say(payload)
        walk.ask(f"say {payload}")
    assert walk.page.evaluate("window.pwned ?? null") is None
    assert walk.count(".message.assistant") == len(PAYLOADS)
    assert walk.count("#log script, #log img, #log iframe, #log style, #log form") == 0
    assert "<script>" in walk.page.locator(".answer").first.inner_text()


def test_sse_split_anywhere(walk: Walker) -> None:
    found = walk.page.evaluate(script("events.js"))
    assert [json.loads(one) for one in found] == [['{"a": "é🙂"}', "2", "x\ny", "[DONE]"]]


def test_hostile_imports(walk: Walker) -> None:
    found = walk.page.evaluate(script("imports.js"))
    assert found[0] is True and found[2] is None
    assert all(
        '"__proto__"' in text for text in found[1]
    )  # a prototype is no node: the conversation is empty


def test_on_a_phone(browser: Any, server: Client) -> None:
    walk = Walker(browser, server.port, has_touch=True)
    walk.page.set_viewport_size({"width": 360, "height": 640})
    server.model.say("```\n" + "long line " * 30 + "\n```\n", ("1 + 1",), "w" * 200)
    walk.page.locator("#ideas button").first.tap()
    walk.idle()
    boxes = "[document.documentElement, document.getElementById('scroll')]"
    wide = f"{boxes}.some((box) => box.scrollWidth > innerWidth)"
    walk.act("Answer again")
    walk.idle()
    assert walk.text(".branch span") == "2/2" and "tokens/s" in walk.text(".stats")
    for selector in (".branch span", ".stats"):  # one line each
        assert walk.page.locator(selector).last.bounding_box()["height"] < 30, selector
    assert not walk.page.evaluate(wide)
    assert not walk.page.is_visible("#side")
    walk.page.locator("#side-open").tap()
    assert walk.page.is_visible("#side")
    walk.page.locator("#scrim").click(position={"x": 350, "y": 300})
    assert not walk.page.is_visible("#side")
    assert walk.errors == []
    walk.context.close()


CONTRAST = script("contrast.js")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names(browser: Any, server: Client, scheme: str) -> None:
    """Text stands out at 4.5 to 1, everything that can be pressed has a name, answers are announced."""
    walk = Walker(browser, server.port, color_scheme=scheme, reduced_motion="reduce")
    server.model.say(*RICH)
    walk.ask("show all")
    walk.page.keyboard.press("Control+Slash")
    assert walk.page.evaluate(CONTRAST) == []
    walk.page.keyboard.press("Escape")
    assert walk.page.evaluate(script("nameless.js")) == []
    log = walk.page.locator("#log")
    assert log.get_attribute("role") == "log" and log.get_attribute("aria-live") == "polite"
    walk.page.keyboard.press("Control+KeyB")
    assert not walk.page.is_visible("#side")
    walk.context.close()


def test_tokens_and_their_alternatives(walk: Walker, server: Client) -> None:
    walk.page.evaluate("localStorage.setItem('nanochat.settings', '{\"alternatives\": true}')")
    walk.page.reload()
    walk.wait("document.getElementById('model').textContent")
    server.model.say("sure")
    walk.ask("are you")
    walk.act("How sure was it?")
    assert walk.count(".tok") == 4
    walk.page.locator(".tok").first.click()
    assert "100.0 %" in walk.text("#alternatives-box .chosen")


def test_a_key_is_asked_for(browser: Any) -> None:
    server = Client(create_app(Engine(Script(), TOK), "main-sft", keys=["long-secret"]))
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("#banner:not([hidden])", timeout=WAIT)
    page.click("#banner button")
    page.fill("#key", "long-secret")
    page.get_by_role("button", name="Done").click()
    wait_until(page, "document.getElementById('model').textContent === 'main-sft'")
    page.fill("#input", "hi")
    page.keyboard.press("Enter")
    page.wait_for_selector(".stats:not(:empty)", timeout=WAIT)
    assert page.locator(".answer").inner_text() == "hello"
    context.close()
    server.close()
