"""What runs inside: reads its orders, puts up the walls, then runs foreign code. Started by process.py.

Three roles. "run": a program, with its output as it comes. "candidate": defines a function and answers calls
of it. "tests": runs tests against a stub that passes calls on, and alone says the verdict. In the last two
messages use a descriptor of their own, and print goes to stderr.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import os
import sys
from typing import Any

MAX_ORDERS = 1 << 22
OUT = 3  # messages


class _NoAnswer(BaseException):
    """The candidate gave no answer that could be read; no test can catch this by accident."""


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here)
    confine, wire = importlib.import_module("confine"), importlib.import_module("wire")
    sys.path.remove(here)
    orders = wire.read_message(0, MAX_ORDERS)
    role = orders["role"]
    if role != "run":
        os.dup2(1, OUT)
        os.dup2(2, 1)
    import collections  # noqa: F401  before the walls: what nearly every program asks for
    import math  # noqa: F401
    import re  # noqa: F401
    import typing  # noqa: F401

    try:
        gaps = confine.confine(orders["limits"], orders["readable"], frozenset(orders["skip"]))
    except confine.Gap as gap:
        wire.send(OUT if role != "run" else 2, {"gap": str(gap)})
        os._exit(3)
    del gaps
    gc.collect()
    roles = {"run": _run, "candidate": _candidate, "tests": _tests}
    roles[role](orders, wire)


def _run(orders: dict[str, Any], wire: Any) -> None:
    os.close(0)
    _execute(orders["code"], {"__name__": "__main__"})


def _execute(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "<program>", "exec", dont_inherit=True), names)  # noqa: S102  what this is for
    return names


def _candidate(orders: dict[str, Any], wire: Any) -> None:
    send, unpack, pack, read = wire.send, wire.unpack, wire.pack, wire.read_message
    try:
        function = _execute(orders["code"], {"__name__": "candidate"})[orders["entry"]]
    except Exception as error:
        send(OUT, {"failed": f"{type(error).__name__}: {error}"[:500]})
        os._exit(1)
    send(OUT, {"ready": True})
    while True:
        request = read(0)
        arguments, named = unpack(request["arguments"]), unpack(request["named"])
        try:
            result = function(*arguments, **named)
            reply = {"result": pack(result), "arguments": pack(arguments)}
            wire.frame(reply)
        except Exception as error:
            reply = {"error": type(error).__name__, "text": str(error)[:500]}
        send(OUT, reply)


def _tests(orders: dict[str, Any], wire: Any) -> None:
    def stub(*arguments: Any, **named: Any) -> Any:
        try:
            wire.send(OUT, {"arguments": wire.pack(list(arguments)), "named": wire.pack(named)})
            reply = wire.read_message(0)
            if "error" not in reply:
                result, changed = wire.unpack(reply["result"]), wire.unpack(reply["arguments"])
                for mine, theirs in zip(arguments, changed, strict=True):
                    _copy_into(mine, theirs)
                return result
            kind = getattr(builtins, str(reply["error"]), None)
        except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
            raise _NoAnswer(f"no answer that can be read: {error}") from error
        is_usual = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if is_usual and kind else RuntimeError)(str(reply.get("text")))

    try:
        names = _execute(orders["helpers"], {"__name__": "tests"})
        names[orders["entry"]] = stub
        _execute(orders["code"], names)
        verdict = {"passed": True, "why": ""}
    except BaseException as error:
        verdict = {"passed": False, "why": f"{type(error).__name__}: {error}"[:500]}
    wire.send(OUT, {"verdict": verdict})


def _copy_into(mine: Any, theirs: Any) -> None:
    """What the call changed in a list, dictionary or set that it was given."""
    if type(mine) is not type(theirs) or mine == theirs:
        return
    if type(mine) is list:
        mine[:] = theirs
    elif type(mine) in (dict, set):
        mine.clear()
        mine.update(theirs)


if __name__ == "__main__":
    main()
