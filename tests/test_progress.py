"""Bars: plain lines at most every two seconds, the last one always; a live bar on a terminal."""

from __future__ import annotations

import pytest

from nanochat import progress


def test_plain_lines_come_seldom_and_the_last_one_always(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Bar("merging", 10)
    for done in range(11):
        bar.show(done, f"{done} of 10")
        now[0] += 0.5
    bar.close()
    assert capsys.readouterr().out.splitlines() == [f"merging: {done} of 10" for done in (0, 4, 8, 10)]
    assert bar.seconds() == 5.5


def test_a_terminal_gets_a_live_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True, raising=False)
    bar = progress.Bar("counting", 4)
    bar.show(1, "1 of 4")
    bar.show(4, "4 of 4")
    bar.close()
    bar.close()
    out = capsys.readouterr().out
    assert "counting" in out and "4 of 4" in out
