"""The sandbox: every attack fails, as root and as an ordinary user; missing walls are refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import sandbox_attacks

from nanochat.errors import UserError
from nanochat.sandbox import Sandbox, confine
from nanochat.sandbox.process import Child, Limits

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not run: the walls are Linux's")
pytestmark = LINUX


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits(20.0))
    except UserError as error:
        pytest.skip(f"not run: {error.problem}")


def test_a_program_runs(sandbox: Sandbox) -> None:
    found = sandbox.run("import math, threading\nt = threading.Thread(target=print, args=('thread',))\n"
                        "t.start(); t.join()\nprint(math.comb(5, 2))\n1 / 0")  # fmt: skip
    assert (found.how, found.code, found.out) == ("failed", 1, "thread\n10\n")
    assert "ZeroDivisionError" in found.err
    assert sandbox.run("print('é')").out == "é\n"


def test_modules_that_programs_ask_for(sandbox: Sandbox) -> None:
    names = "json random hashlib datetime collections heapq bisect itertools functools statistics decimal"
    names += " fractions string copy operator textwrap unicodedata zoneinfo dataclasses enum array struct"
    code = "".join(f"import {name}\n" for name in names.split())
    found = sandbox.run(code + "print(hashlib.sha256(b'').hexdigest()[:6], random.random() < 1)")
    assert found.out == "e3b0c4 True\n", found


def test_nothing_comes_along(sandbox: Sandbox) -> None:
    """No environment, no arguments of ours, no repository on the path, no root, no capability but reading."""
    os.environ["NANOCHAT_SECRET"] = "x"
    found = sandbox.run(
        "import os, sys\nprint(dict(os.environ).keys() - {'LC_CTYPE'}, os.getuid() == 0, os.getcwd())\n"
        "try:\n    import nanochat\n    print('through')\nexcept ImportError: print('no package')"
    )
    assert found.out == "set() False /\nno package\n", found


@pytest.mark.slow
def test_every_attack_fails() -> None:
    """At least 120 of them; as the user who runs the tests, which may be root."""
    assert sandbox_attacks.count() >= 120
    assert sandbox_attacks.attack_all() == {}


@pytest.mark.slow
def test_every_attack_fails_for_an_ordinary_user() -> None:
    """Root runs the same program as another user, with a Python that this user can read."""
    if os.getuid() != 0:
        pytest.skip("not run: this is an ordinary user, and the test above has run the attacks")
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)), None)
    if python is None:
        pytest.skip("not run: no Python that other users can read")
    with tempfile.TemporaryDirectory(prefix="nanochat-user-") as directory:
        code = Path(directory)
        for name in ("nanochat/sandbox", "nanochat/errors.py", "nanochat/__init__.py"):
            source, target = ROOT / name, code / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        shutil.copy(ROOT / "tests" / "helpers" / "sandbox_attacks.py", code)
        for path in [code, *code.rglob("*")]:
            path.chmod(0o755)
        done = subprocess.run(
            [python, "-B", "sandbox_attacks.py"], cwd=code, user=65534, group=65534, extra_groups=[],
            env={"PYTHONPATH": ".", "TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"wrong": {}, "count": sandbox_attacks.count(), "uid": 65534}


def changed_child(directory: Path, old: str, new: str) -> Path:
    """A copy of the child whose walls differ in one place."""
    copy = directory / "sandbox"
    shutil.copytree(ROOT / "nanochat" / "sandbox", copy)
    text = (copy / "confine.py").read_text()
    assert text.count(old) == 1
    (copy / "confine.py").write_text(text.replace(old, new))
    return copy / "child.py"


def test_the_attacks_would_get_through_without_walls(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without walls the same programs do harm, and the probe refuses."""
    child = changed_child(tmp_path, "    for name, step in steps:", "    for name, step in []:")
    monkeypatch.setattr("nanochat.sandbox.process.CHILD", child)
    named = [line for line in sandbox_attacks.lines("files") if "SECRET" in line][:1]
    named += ["os.fork()", "socket.socket()", "os.memfd_create('x')", "os.chdir('/tmp')"]
    secret = tmp_path / "secret"
    secret.write_text("s")
    names = f"SECRET = {str(secret)!r}\nDIRECTORY = {str(tmp_path)!r}\nPARENT = {os.getpid()}\n"
    names += f"LINES = {named}\n"
    frame = sandbox_attacks.FRAME.replace(
        "    if value is not False", "    if os.getpid() != pid: os._exit(0)\n    if value is not False"
    )
    found = sandbox.run(f"import os\npid = os.getpid()\n{names}{frame}")
    assert json.loads(found.out) == named, found
    problem = sandbox.probe()
    assert problem is not None and "read a file" in problem and "a file was changed" in problem


@pytest.mark.parametrize("layer", ["landlock", "seccomp"])
def test_a_missing_wall_is_refused_by_name(
    layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child whose kernel lacks the layer (its code is replaced by one that finds it missing)."""
    old = {
        "landlock": "version = landlock_version()\n    if",
        "seccomp": "machine = os.uname().machine\n    if",
    }[layer]
    new = {"landlock": "version = 0\n    if", "seccomp": 'machine = "other"\n    if'}[layer]
    monkeypatch.setattr("nanochat.sandbox.process.CHILD", changed_child(tmp_path, old, new))
    with pytest.raises(UserError, match=layer) as caught:
        Sandbox(Limits(20.0))
    assert "--unsafe-no-sandbox" in str(caught.value.hint)
    said: list[str] = []
    unsafe = Sandbox(Limits(20.0), unsafe=True, say=said.append)
    assert layer in said[0] and unsafe.run("print(1)").out == "1\n"


def test_a_seccomp_filter_by_hand() -> None:
    """Interpreted here, on both machines: what is let through, what gets EPERM, what is killed."""
    for machine, (column, arch) in confine.MACHINES.items():
        program = confine.filter_program(machine, pid=77)

        def call(number: int, *arguments: int, arch: int = arch, program: bytes = program) -> int:
            return interpret(program, number, arch, arguments)

        numbers = {name: pair[column] for name, pair in confine.CHECKED.items()}
        for name, pair in confine.PLAIN.items():
            if pair[column] is not None:
                assert call(pair[column]) == confine.ALLOW, name
        no = confine.ERRNO | confine.EPERM
        assert call(numbers["clone"], 0x3D0F00) == confine.ALLOW
        assert call(numbers["clone"], 17) == call(numbers["clone"], 0x4111) == no
        assert call(numbers["clone3"]) == confine.ERRNO | confine.ENOSYS
        assert call(numbers["kill"], 77, 9) == confine.ALLOW and call(numbers["kill"], 1, 9) == no
        assert call(numbers["kill"], 0xFFFFFFFF, 9) == call(numbers["kill"], 0, 9) == no
        assert (
            call(numbers["tgkill"], 77, 78, 9) == confine.ALLOW and call(numbers["tgkill"], 76, 76, 9) == no
        )
        assert call(numbers["prlimit64"], 0, 7, 0) == confine.ALLOW
        assert call(numbers["prlimit64"], 0, 7, 1) == call(numbers["prlimit64"], 0, 7, 1 << 32) == no
        assert call(numbers["prlimit64"], 5, 7, 0) == no
        assert call(numbers["ioctl"], 1, 0x5401) == confine.ALLOW and call(numbers["ioctl"], 1, 0x5412) == no
        assert call(numbers["prctl"], 15) == confine.ALLOW and call(numbers["prctl"], 4) == no
        assert call(2, arch=0x40000003) == confine.KILL
        listed = {pair[column] for pair in (*confine.PLAIN.values(), *confine.CHECKED.values())}
        assert all(call(n) == no for n in range(600) if n not in listed)
    assert interpret(confine.filter_program("x86_64", 1), 0x40000000, 0xC000003E, ()) == confine.KILL


def interpret(program: bytes, number: int, arch: int, arguments: Any) -> int:
    """What a classic BPF program returns for a call (the plain reading of the format)."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *words)
    code = [struct.unpack_from("HBBI", program, i) for i in range(0, len(program), 8)]
    at = a = 0
    while True:
        kind, yes, no, value = code[at]
        at += 1
        if kind == 0x20:
            (a,) = struct.unpack_from("<I", data, value)
        elif kind == 0x54:
            a &= value
        elif kind == 0x15:
            at += yes if a == value else no
        elif kind == 0x35:
            at += yes if a >= value else no
        else:
            assert kind == 0x06
            return int(value)


def test_no_process_is_left(sandbox: Sandbox) -> None:
    child = Child.start({"role": "run", "code": "while True: pass"}, Limits(20.0))
    pid = child.process.pid
    child.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "end, how", [("os.kill(os.getpid(), signal.SIGCHLD)", "killed"), ("os.fork() or time.sleep(60)", "done")]
)
def test_without_walls_too_every_program_ends(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, how: str
) -> None:
    """One that asks to be traced stops at its first signal; one that forks leaves a child with its pipes. Of
    neither is anything left."""
    child = changed_child(tmp_path, "    for name, step in steps:", "    for name, step in []:")
    monkeypatch.setattr("nanochat.sandbox.process.CHILD", child)
    code = "import ctypes, os, signal, time\nprint(os.getpid(), flush=True)\n"
    if how == "killed":
        code += "ctypes.CDLL(None).ptrace(0, 0, 0, 0)\n"
    found = sandbox.run(code + end, Limits(3.0))
    assert found.how == how and found.seconds < 15, found
    for _ in range(100):  # a killed child of the child is reaped by init
        try:
            os.killpg(int(found.out), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"the group {found.out} is left")
