"""File names, atomic writes, and how errors reach a person."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat import errors
from nanochat import home as paths
from nanochat.errors import Interrupted, UserError
from nanochat.home import Home, read_json, write_json, write_text


def test_home_is_the_flag_then_the_environment_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "named"))
    assert Home.find("given").root == Path.cwd() / "given"
    assert Home.find("~/x").root == Path.home() / "x"
    assert Home.find().root == tmp_path / "named"
    monkeypatch.delenv("NANOCHAT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Home.find().root == tmp_path / "cache" / "nanochat"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Home.find().root == tmp_path / ".cache" / "nanochat"
    monkeypatch.setattr(paths, "sys", SimpleNamespace(platform="darwin"))
    assert Home.find().root == tmp_path / "Library" / "Caches" / "nanochat"
    assert not list(tmp_path.iterdir()), "finding a home creates nothing"


def test_names_within_a_home(tmp_path: Path) -> None:
    home, stage = Home(tmp_path), tmp_path / "runs" / "d4.v-1_b" / "sft"
    assert home.stage_dir("d4.v-1_b", "sft") == stage
    assert home.checkpoints("d4.v-1_b", "sft") == stage / "ckpt"
    names = [f("d4.v-1_b", "sft").relative_to(stage).as_posix() for f in (
        home.settings_file, home.metrics_file, home.result_file, home.exit_file)]  # fmt: skip
    assert names == ["settings.json", "metrics.jsonl", "result.json", "exit.json"]
    inside = [home.tokenizer_dir, home.data_dir, home.eval_bundle_dir, home.report_dir("main")]
    assert len(set(inside)) == 4 and all(path.is_relative_to(tmp_path) for path in inside)


@pytest.mark.parametrize(
    "tag", ["", ".", "..", ".hidden", "a/b", "../x", "a b", "a\n", "a\0", "a\\b", "$(x)"]
)
def test_a_tag_cannot_leave_the_home(tag: str) -> None:
    for name in ((tag, "base"), ("main", tag)):
        with pytest.raises(UserError, match="may hold letters"):
            Home(Path("home")).stage_dir(*name)


def test_a_write_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "facts.json"
    write_json(path, {"a": [1, None, "é\u2028"]})
    assert read_json(path) == {"a": [1, None, "é\u2028"]}
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})

    order: list[str] = []
    real = {"fsync": os.fsync, "rename": os.rename}

    def spy(name: str, fails: bool) -> Any:
        def call(*args: Any) -> None:
            order.append(name)
            if fails:
                raise OSError(28, "No space left on device")
            real[name](*args)

        return call

    for name in real:
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
            patch.setattr(os, name, spy(name, fails=True))
            write_json(path, {"b": 2})
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    order.clear()
    for name in real:
        monkeypatch.setattr(os, name, spy(name, fails=False))
    write_text(path, "new")
    assert path.read_text() == "new" and order == ["fsync", "rename", "fsync"]
    with pytest.raises(UserError, match="cannot write"):
        write_json(path / "below a file.json", {})


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json cannot be read as JSON"):
            read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (UserError("it is red", "paint it"), 2, "error: it is red\n  hint: paint it\n"),
        (Interrupted("SIGTERM at step 3"), 75, "stopped: SIGTERM at step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    raised: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def main(argv: list[str] | None) -> None:
        seen.append(argv)
        if raised is not None:
            raise raised

    assert errors.run(main, ["--x"]) == code and seen == [["--x"]]
    assert capsys.readouterr().err == said


def test_other_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe(argv: list[str] | None) -> None:
        raise BrokenPipeError

    def bug(argv: list[str] | None) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert errors.run(pipe) == 141
    with pytest.raises(KeyError):  # a bug of ours keeps its traceback
        errors.run(bug)
    assert str(UserError("a", "b")) == "a\n  b" and json.dumps(UserError("a", "b").args) == '["a", "b"]'
