"""The commands in README.md and docs/ work: blocks marked run are executed, in order, in one temporary home.

A block of commands opens with ```bash run or ```bash skip; an unmarked one is an error. What is executed is
what stands there, but for three things: the preset becomes smoke, speedrun.sh does not install, and the
commands that run the tests are left out (they would run this one).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))]
LEFT_OUT = ("bash tests/run.sh", "make ")


def blocks(text: str) -> list[tuple[str, str]]:
    """(what follows ```bash, body) of every shell block."""
    return re.findall(r"^```(?:bash|sh|shell|console)\b ?(.*?)\n(.*?)^```", text, flags=re.M | re.S)


def commands(text: str) -> list[str]:
    """The commands of the blocks marked run, as the test executes them."""
    found = []
    for mark, body in blocks(text):
        if mark == "run":
            for line in body.replace("\\\n", " ").splitlines():
                command = " ".join(shlex.split(line, comments=True)) and line.split(" #")[0].strip()
                if command and not command.startswith(LEFT_OUT):
                    found.append(as_smoke(command))
    return found


def as_smoke(command: str) -> str:
    """The same command, tiny."""
    if "speedrun.sh" in command:
        command = re.sub(r" --preset[= ]\S+", "", command) + " --preset smoke"
        return command if "--no-install" in command else command + " --no-install"
    return re.sub(r"--preset[= ]\S+", "--preset=smoke", command)


def test_commands_are_found() -> None:
    text = """
```bash run
bash speedrun.sh --preset cpu-demo   # minutes
bash tests/run.sh
python -m scripts.chat_cli -p "Why #1?" \\
    --home x
```
```bash skip
rm -rf /
```
```python
x = 1
```
"""
    assert [mark for mark, _ in blocks(text)] == ["run", "skip"]
    assert commands(text)[0] == "bash speedrun.sh --preset smoke --no-install"
    assert (
        as_smoke("python -m scripts.plan --preset=speedrun -x") == "python -m scripts.plan --preset=smoke -x"
    )
    assert len(commands(text)) == 2 and commands(text)[1].startswith("python -m scripts.chat_cli -p")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_is_marked(page: Path) -> None:
    unmarked = [
        body for mark, body in blocks((ROOT / page).read_text("utf-8")) if mark not in ("run", "skip")
    ]
    assert not unmarked, unmarked


def test_the_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "bash speedrun.sh" in text and "bash tests/run.sh" in text
    assert any("speedrun.sh" in command for command in commands(text))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_work(tmp_path: Path) -> None:
    environment = os.environ | {
        "NANOCHAT_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for page in PAGES:
        for command in commands((ROOT / page).read_text("utf-8")):
            done = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True,
                stdin=subprocess.DEVNULL, timeout=600,
            )  # fmt: skip
            said = (done.stdout + done.stderr)[-3000:]
            assert done.returncode == 0, f"{page}: {command}\nexit code {done.returncode}\n{said}"
