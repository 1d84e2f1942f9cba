"""The page's files as text; what they do is tested in a browser (tests/browser)."""

from __future__ import annotations

import re
from pathlib import Path

from nanochat.server.app import KINDS, POLICY, page_files

PAGE = Path(__file__).parents[2] / "nanochat/server/page"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}


def test_no_inner_html() -> None:
    """No way from text to markup, no inline code or style, nothing from elsewhere."""
    unsafe = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc"
        r"|createContextualFragment|<[^>]+\son\w+=|\sstyle=|<script>|<style|javascript:[^ ]"
    )
    for name, text in TEXTS.items():
        assert not re.search(unsafe, text), name
    control = '<p onclick="x()" style="a">'
    assert re.search(unsafe, control) and re.search(unsafe, "a.innerHTML = b")


def test_nothing_from_elsewhere() -> None:
    for name, text in TEXTS.items():
        found = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}  # the name of SVG
        assert not found, (name, found)


def test_csp() -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in POLICY.split(";"))
    assert (
        rules["default-src"] == "'none'"
        and rules["script-src"] == "'self'"
        and rules["style-src"] == "'self'"
    )
    assert rules["require-trusted-types-for"] == "'script'" and rules["frame-ancestors"] == "'none'"
    assert "unsafe" not in POLICY and "*" not in POLICY


def test_every_file_is_served_and_kept_offline() -> None:
    served = set(page_files())
    assert served == {"/", *(f"/{name}" for name in TEXTS)}
    assert all(name[name.rfind(".") :] in KINDS for name in TEXTS)
    listed = re.search(r"const FILES = \[(.*?)\]", TEXTS["sw.js"], re.S)
    assert listed
    kept = set(re.findall(r'"([^"]+)"', listed[1]))
    assert kept == {"./", *TEXTS} - {"index.html", "sw.js"}


def test_labels() -> None:
    """Everything that can be pressed or filled has a name."""
    html = TEXTS["index.html"]
    for tag, inner in re.findall(r"<button([^>]*)>(.*?)</button>", html, re.S):
        text = re.sub(r"<[^>]+>", "", inner).strip()
        assert text or "aria-label" in tag or 'id="sampling"' in tag or 'id="confirm-yes"' in tag, tag
    for tag in re.findall(r"<(?:input|textarea)[^>]*>", html):
        is_inside_label = re.search(r"<label[^>]*>(?:(?!</label>).)*" + re.escape(tag), html, re.S)
        assert "aria-label" in tag or is_inside_label, tag
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for name in re.findall(r'aria-labelledby="([^"]+)"', html):
        assert name in ids


def test_ids_that_the_code_names_exist() -> None:
    ids = set(re.findall(r'\sid="([^"]+)"', TEXTS["index.html"]))
    for name, text in TEXTS.items():
        if name.endswith(".js"):
            assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= ids, name
            icons = set(re.findall(r'\b(?:icon|iconButton)\("([a-z]+)"', text))
            assert {f"i-{icon}" for icon in icons} <= ids, name
