"""Settings of a script: one frozen dataclass gives the command-line flags, the help page and settings.json.

A script declares its settings with `setting(default, help)`, gives presets as complete values, and calls
`parse`. A flag is the name of its field with dashes; a boolean also takes --no-NAME; None means that the
value is decided later, by the plan or the checkpoint. Settings stop at the scripts: library functions take
plain values.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanochat.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def setting(default: Any, help: str, *, in_key: bool = True, old_words: dict[str, str] | None = None) -> Any:
    """A field of a settings dataclass.

    Args:
        help: its line on the help page, which names the unit.
        in_key: whether it decides the outcome of a run. A run starts again when such a setting changes.
        old_words: {new word: old word} for values that have been renamed. The old words are accepted, and
            the key of a run is made from them, so that runs of earlier versions keep their keys.
    """
    metadata = {"help": help, "in_key": in_key, "old_words": old_words or {}}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunSettings:
    """The flags of every script that works in a run's directory."""

    home: str | None = setting(
        None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)", in_key=False
    )
    tag: str = setting("main", "name of the run", in_key=False)


@dataclass(frozen=True)
class HubSettings(RunSettings):
    """The flags of scripts that may download."""

    offline: bool = setting(False, "open no connection", in_key=False)
    mirror: str | None = setting(
        None, "directory or URL that replaces the hub (default: NANOCHAT_MIRROR)", in_key=False
    )


@dataclass(frozen=True)
class DeviceSettings(RunSettings):
    """The flags of scripts that run a model."""

    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)", in_key=False)
    dtype: str | None = setting(None, "float32, bfloat16 or float16 (default: bfloat16 where fast)")


@dataclass(frozen=True)
class StageSettings(DeviceSettings):
    """The flags of every training stage."""

    eval_every: int = setting(150, "optimizer steps between evaluations (0: never)", in_key=False)
    sample_every: int = setting(0, "optimizer steps between samples (0: never)", in_key=False)
    save_every: int = setting(1000, "optimizer steps between checkpoints (0: only the last)", in_key=False)
    keep: int = setting(2, "newest checkpoints to keep", in_key=False)
    resume: str = setting("auto", "auto, never, or a step", in_key=False)
    wandb: str = setting("off", "off, offline or online", in_key=False)


def parse(cls: type[S], presets: dict[str, S], argv: list[str] | None, doc: str | None) -> S:
    """Settings from `argv` (default sys.argv[1:]): --settings FILE or --preset NAME, then the other flags.

    Prints the help and exits with --help. Raises UserError for an unknown flag or preset or a bad value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        print(help_text(cls, presets, doc))
        raise SystemExit(0)
    kinds = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    base = cls()
    changes: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f"expected a flag such as --{sorted(names)[0]}, found {word!r}", "see --help")
        flag, has_value, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in names | {"preset", "settings"}:
            if name.startswith("no_") and name[3:] in names and kinds[name[3:]] is bool and not has_value:
                changes[name[3:]] = False
                continue
            near = difflib.get_close_matches(name, sorted(names | {"preset", "settings"}), 1, 0.5)
            guess = f"did you mean --{near[0].replace('_', '-')}?" if near else "see --help"
            raise UserError(f"there is no flag --{flag}", guess)
        if name in names and kinds[name] is bool and not has_value:
            following = words[0].lower() if words else ""
            value = words.pop(0) if following in ("true", "false") else "true"
        elif not has_value:
            if not words:
                raise UserError(f"--{flag} needs a value", f"write --{flag}=VALUE")
            value = words.pop(0)
        if name == "preset":
            if value not in presets:
                raise UserError(f"there is no preset {value!r}", f"choose one of: {', '.join(presets)}")
            base = presets[value]
        elif name == "settings":
            base = from_dict(cls, _load(Path(value)))
        else:
            changes[name] = _convert(kinds[name], value, flag)
    return dataclasses.replace(base, **_with_new_words(cls, changes))


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read settings from {path}: {error}", "give a settings.json that a run has written"
        ) from error


def _convert(kind: Any, text: str, flag: str) -> Any:
    options = [kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if text.lower() in ("none", ""):
            return None
    try:
        if options[0] is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        if options[0] is int and "e" in text.lower() and float(text).is_integer():
            return int(float(text))
        value = options[0](text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--{flag} must be {_name(kind)}, found {text!r}", f"write --{flag}=VALUE") from None


def _name(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(words[option] for option in typing.get_args(kind))
    return words[kind]


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as JSON values."""
    return dataclasses.asdict(settings)


def from_dict(cls: type[S], values: dict[str, Any]) -> S:
    """Settings from `to_dict`'s output; fields it lacks keep their defaults, unknown ones are an error."""
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise UserError(
            f"these settings do not exist here: {', '.join(unknown)}", "use the settings of the same script"
        )
    return cls(**_with_new_words(cls, values))


def _with_new_words(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values with words of earlier versions replaced by today's."""
    values = dict(values)
    for field in dataclasses.fields(cls):
        for new, old in field.metadata["old_words"].items():
            if values.get(field.name) == old:
                values[field.name] = new
    return values


def key_values(settings: Any) -> dict[str, Any]:
    """The settings that decide the outcome of a run, in the words of the version that introduced them."""
    chosen = {}
    for field in dataclasses.fields(settings):
        if field.metadata["in_key"]:
            value = getattr(settings, field.name)
            chosen[field.name] = field.metadata["old_words"].get(value, value)
    return chosen


def describe(settings: Any) -> str:
    """A two-column table of every setting."""
    rows = to_dict(settings)
    width = max(map(len, rows))
    return "\n".join(
        f"  {name.ljust(width)}  {'-' if value is None else value}" for name, value in rows.items()
    )


def help_text(cls: type[Any], presets: dict[str, Any], doc: str | None) -> str:
    """The --help page, made from the fields."""
    lines = [(doc or "").strip(), "", f"  --preset NAME  a complete set of values: {', '.join(presets)}"]
    lines.append("  --settings FILE  replay a settings.json")
    # A script's own flags first, those that it shares with others last.
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__)
    for field in fields:
        default = "" if field.default is None else f" [{field.default}]"
        lines.append(f"  --{field.name.replace('_', '-')}  {field.metadata['help']}{default}")
    return "\n".join(lines)
