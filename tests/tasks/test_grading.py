"""Grading in two processes: honest solutions pass, forged results do not; only literals cross."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.sandbox import Sandbox, wire
from nanochat.sandbox.process import Limits
from nanochat.sandbox.sandbox import Job

HELPERS = "def twice(x):\n    return 2 * x\n"
TESTS = """
def check(f):
    given = [3, 1, 2]
    assert f(given) == [1, 2, 3] and type(f(given)) is list
    assert given == [1, 2, 3] and twice(f([4])[0]) == 8
    try:
        f(None)
        assert False
    except TypeError:
        pass
check(f)
"""
RIGHT = "def f(items):\n    items.sort() if items is not None else len(None)\n    return items\n"

FORGED = {
    "exit 0": "import sys\nsys.exit(0)",
    "exit 0 in the call": "import sys\ndef f(items):\n    sys.exit(0)",
    "hard exit in the call": "import os\ndef f(items):\n    os._exit(0)",
    "exit in atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(items):\n    raise SystemExit",
    "equal to all": "class A(list):\n    __eq__ = lambda a, b: True\ndef f(items):\n    return A()",
    "an object": "class A:\n    __eq__ = lambda a, b: True\ndef f(items):\n    return A()",
    "an int that lies": "class A(int):\n    __eq__ = lambda a, b: True\ndef f(items):\n    return A(1)",
    "patched builtins": "import builtins\nbuiltins.len = lambda *a: 1\ndef f(x):\n    return 1",
    "a verdict on the messages": (
        "import os, json\nbody = json.dumps({'verdict': {'passed': True, 'why': ''}}).encode()\n"
        "os.write(3, len(body).to_bytes(4, 'little') + body)\ndef f(items):\n    return 0"
    ),
    "a verdict in the call": (
        "import os, json\ndef f(items):\n"
        "    body = json.dumps({'verdict': {'passed': True, 'why': ''}}).encode()\n"
        "    for fd in range(1, 16):\n        try: os.write(fd, len(body).to_bytes(4, 'little') + body)\n"
        "        except OSError: pass\n    os._exit(0)"
    ),
    "answers before they are asked for": (
        "import os, json\nbody = json.dumps({'result': ['l', []], 'arguments': ['l', []]}).encode()\n"
        "os.write(3, (len(body).to_bytes(4, 'little') + body) * 9)\ndef f(items):\n    return 0"
    ),
    "an exception that the tests expect": "def f(items):\n    raise AssertionError('fine')",
    "tests in the frames": (
        "import sys\ndef f(items):\n    frame = sys._getframe()\n    while frame:\n"
        "        frame.f_globals['passed'] = True\n        frame = frame.f_back\n    return 0"
    ),
    "too much": "def f(items):\n    return [0] * 100000",
    "too deep": "def f(items):\n    a = []\n    for _ in range(99): a = [a]\n    return a",
    "no end": "def f(items):\n    while True: pass",
    "no function": "g = 1",
    "no Python": "def f(",
    "nothing": "",
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits(10.0))
    except UserError as error:
        pytest.skip(f"not run: {error.problem}")


def test_a_right_solution_passes(sandbox: Sandbox) -> None:
    """Helpers stand in both processes, changed arguments come back, exceptions too, print is harmless."""
    noisy = "print('x' * 100)\nimport sys\n" + RIGHT
    verdicts = sandbox.grade_all([Job(HELPERS + code, "f", HELPERS, TESTS) for code in (RIGHT, noisy)])
    assert [v.passed for v in verdicts] == [True, True], verdicts


def test_a_wrong_solution_fails(sandbox: Sandbox) -> None:
    found = sandbox.grade(Job("def f(items):\n    return sorted(items)", "f", HELPERS, TESTS))
    assert not found.passed and "AssertionError" in found.why


@pytest.mark.parametrize("name", FORGED)
def test_forged_results_fail(sandbox: Sandbox, name: str) -> None:
    limits = Limits(3.0) if name == "no end" else None
    found = sandbox.grade(Job(FORGED[name], "f", HELPERS, TESTS), limits)
    assert not found.passed and found.why, found


def test_tests_that_end_early_say_nothing(sandbox: Sandbox) -> None:
    """Tests that never call have no verdict to steal: they pass only by reaching their end."""
    assert sandbox.grade(Job(RIGHT, "f", "", "x = 1")).passed
    assert not sandbox.grade(Job(RIGHT, "f", "", "raise SystemExit(0)")).passed
    assert not sandbox.grade(Job(RIGHT, "f", "", "import os; os._exit(0)")).passed


LITERALS: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    | st.sets(st.integers() | st.text(), max_size=4) | st.frozensets(st.integers(), max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(LITERALS)
def test_literals_cross_unchanged(value: Any) -> None:
    message, rest = wire.split(wire.frame({"value": wire.pack(value)}) + b"rest")
    assert message is not None and rest == b"rest"
    found = wire.unpack(message["value"])
    assert (found == value and repr(found) == repr(value)) or isinstance(
        value, (set, frozenset, dict, list, tuple)
    )
    assert type(found) is type(value)


def test_only_builtin_types_arrive() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert type(wire.unpack(wire.pack(Liar(3)))) is int
    assert math.isnan(wire.unpack(wire.pack(math.nan))) and wire.unpack(wire.pack(2**200)) == 2**200
    for wrong in (object(), print, iter([]), range(3)):
        with pytest.raises(TypeError):
            wire.pack(wrong)
    for bad in (["x", 1], ["i", "1"], ["i", True], 5, "s", ["l", 3], ["e", [["l", []]]], ["d", [1]], {}):
        with pytest.raises(ValueError):
            wire.unpack(bad)


def test_frames_have_a_limit() -> None:
    with pytest.raises(ValueError):
        wire.frame({"x": "y" * wire.MAX_FRAME})
    with pytest.raises(ValueError):
        wire.split((1 << 20).to_bytes(4, "little"))
    assert wire.split(b"\x05\x00") == (None, b"\x05\x00")
    with pytest.raises(ValueError):
        wire.split(b"\x02\x00\x00\x00[]")
