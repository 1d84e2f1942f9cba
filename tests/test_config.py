"""Settings: flags of every type, presets, replay, and what is told to a person who mistypes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import config
from nanochat.config import setting
from nanochat.errors import UserError
from nanochat.home import write_json


@dataclass(frozen=True)
class Settings:
    depth: int = setting(4, "layers")
    ratio: float = setting(12.0, "tokens per parameter")
    data: str = setting("synthetic", "where documents come from")
    offline: bool = setting(False, "open no connection")
    is_fast: bool = setting(True, "skip what is slow")
    num_steps: int | None = setting(None, "optimizer steps")
    price: float | None = setting(3.0, "dollars an hour")
    mirror: str | None = setting(None, "directory or URL")


PRESETS = {"small": Settings(depth=2, ratio=8.0), "large": Settings(depth=24, offline=True)}


def parse(*argv: str) -> Settings:
    return config.parse(Settings, PRESETS, list(argv), "What it does.")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], {}),
        (["--depth=12"], {"depth": 12}),
        (["--depth", "-3"], {"depth": -3}),
        (["--depth=2e3"], {"depth": 2000}),
        (["--ratio=8"], {"ratio": 8.0}),
        (["--ratio", "1e-3"], {"ratio": 0.001}),
        (["--data=text:a=b c"], {"data": "text:a=b c"}),
        (["--data="], {"data": ""}),
        (["--data=none"], {"data": "none"}),
        (["--offline"], {"offline": True}),
        (["--offline", "--depth=1"], {"offline": True, "depth": 1}),
        (["--offline", "true", "--depth=1"], {"offline": True, "depth": 1}),
        (["--is-fast", "false"], {"is_fast": False}),
        (["--is-fast=no"], {"is_fast": False}),
        (["--no-is-fast"], {"is_fast": False}),
        (["--no-offline"], {"offline": False}),
        (["--num-steps=7"], {"num_steps": 7}),
        (["--num_steps=7"], {"num_steps": 7}),
        (["--num-steps=7", "--num-steps=none"], {"num_steps": None}),
        (["--price=none"], {"price": None}),
        (["--price="], {"price": None}),
        (["--mirror", "/data"], {"mirror": "/data"}),
        (["--preset=small"], {"depth": 2, "ratio": 8.0}),
        (["--depth=3", "--preset", "small"], {"depth": 3, "ratio": 8.0}),
        (["--preset=large", "--no-offline"], {"depth": 24, "offline": False}),
    ],
)
def test_flags_of_every_type(argv: list[str], wanted: dict[str, Any]) -> None:
    found = parse(*argv)
    assert found == Settings(**wanted)
    assert all(type(getattr(found, name)) is type(value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("argv", "problem", "hint"),
    [
        (["--dpeth=3"], "there is no flag --dpeth", "did you mean --depth?"),
        (["--numsteps=3"], "there is no flag --numsteps", "did you mean --num-steps?"),
        (["--presett=small"], "there is no flag --presett", "did you mean --preset?"),
        (["--qqqqqq"], "there is no flag --qqqqqq", "see --help"),
        (["--no-depth"], "there is no flag --no-depth", ""),
        (["--no-offline=true"], "there is no flag --no-offline", ""),
        (["depth=3"], "expected a flag such as --data, found 'depth=3'", "see --help"),
        (["--"], "expected a flag", "see --help"),
        (["--depth"], "--depth needs a value", "write --depth=VALUE"),
        (["--depth=3.5"], "--depth must be a whole number, found '3.5'", "write --depth=VALUE"),
        (["--depth="], "--depth must be a whole number, found ''", ""),
        (["--depth=1e400"], "--depth must be a whole number", ""),
        (["--ratio=fast"], "--ratio must be a number, found 'fast'", ""),
        (["--ratio=nan"], "--ratio must be a number, found 'nan'", ""),
        (["--price=-inf"], "--price must be a number or none, found '-inf'", ""),
        (["--offline=maybe"], "--offline must be true or false, found 'maybe'", ""),
        (["--num-steps=x"], "--num-steps must be a whole number or none, found 'x'", ""),
        (["--preset=tiny"], "there is no preset 'tiny'", "choose one of: small, large"),
        (["--preset"], "--preset needs a value", ""),
        (["--settings=missing.json"], "cannot read settings from missing.json", "settings.json"),
    ],
)
def test_mistakes_are_told_with_their_remedy(argv: list[str], problem: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert caught.value.problem.startswith(problem) and hint in caught.value.hint


def words(least: int) -> Any:
    """Text that a shell can pass; without what None is written as."""
    return st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=least).filter(
        lambda text: text.lower() not in ("none", "")
    )


@given(
    st.builds(
        Settings,
        depth=st.integers(),
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        data=words(0) | st.just(""),
        offline=st.booleans(),
        is_fast=st.booleans(),
        num_steps=st.none() | st.integers(),
        price=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        mirror=st.none() | words(1),
    )
)
def test_settings_survive_the_command_line_and_json(tmp_path_factory: Any, settings: Settings) -> None:
    values = config.to_dict(settings)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    assert parse(*flags) == settings
    path = tmp_path_factory.mktemp("replay") / "settings.json"
    write_json(path, values)
    assert parse(f"--settings={path}") == settings
    assert parse("--depth=9", f"--settings={path}").depth == 9


def test_a_replay_takes_only_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    write_json(path, {"depth": 6})
    assert parse(f"--settings={path}") == Settings(depth=6)
    write_json(path, {"depth": 6, "width": 1, "age": 2})
    with pytest.raises(UserError, match="do not exist here: age, width"):
        parse(f"--settings={path}")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read settings"):
        parse(f"--settings={path}")


def test_the_command_line_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script", "--depth=5"])
    assert config.parse(Settings, PRESETS, None, None) == Settings(depth=5)


SCRIPTS = ("base_train", "mid_train", "chat_sft", "plan", "import_checkpoint")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(f"scripts.{name}")
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            script.main(["--depth=3", flag])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(script.__doc__.strip())
        lines = text.splitlines()
        for field in fields(script.Settings):
            line = f"  --{field.name.replace('_', '-')}  {field.metadata['help']}"
            assert line + ("" if field.default is None else f" [{field.default}]") in lines
        assert all(preset in text for preset in getattr(script, "PRESETS", {}))


def test_a_description_names_every_setting() -> None:
    lines = config.describe(Settings(price=None)).splitlines()
    assert [line.split() for line in lines][:2] == [["depth", "4"], ["ratio", "12.0"]]
    assert len(lines) == len(fields(Settings)) and "  price      -" in lines
