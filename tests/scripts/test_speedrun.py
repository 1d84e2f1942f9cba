"""speedrun.sh as a person meets it: its stages are stood in for by a program that notes how it was called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = [
    *(
        "tok_train",
        "tok_eval",
        "base_train",
        "base_eval",
        "mid_train",
        "chat_sft",
        "chat_rl",
        "chat_eval",
        "report",
    )
]
STAND_IN = """#!/usr/bin/env bash
echo "$@" >>calls.txt
case "$*" in *"scripts.${FAILING:-none} "*) exit "$CODE" ;; esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with speedrun.sh, a stand-in for Python, and no GPU."""
    place = tmp_path / "a clone"
    (place / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "speedrun.sh", place)
    program(place / ".venv/bin/python", STAND_IN)
    program(place / "bin/nvidia-smi", "exit 9")
    return place


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def speedrun(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(place / "speedrun.sh"), "--no-install", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=place.parent,
        env=os.environ | {"PATH": path} | environment,
    )


def calls(place: Path) -> list[str]:
    return (place / "calls.txt").read_text().splitlines() if (place / "calls.txt").exists() else []


def test_plan_first_then_every_stage(place: Path) -> None:
    done = speedrun(place, "--home=/tmp/x", "--seed", "7", "--tag=t")
    assert done.returncode == 0, done.stderr
    plan, *stages = calls(place)
    assert plan == "-m scripts.plan --preset=cpu-demo"
    assert stages == [
        f"-m scripts.{name} --preset=cpu-demo --home=/tmp/x --seed=7 --tag=t" for name in STAGES
    ]
    last = [line.strip() for line in done.stdout.splitlines()][-2:]
    assert last[0] == ".venv/bin/python -m scripts.chat_cli --home=/tmp/x --tag=t"


@pytest.mark.parametrize(
    ("gpus", "preset", "launch"),
    [
        (1, "single-gpu", "-m scripts.base_train"),
        (2, "single-gpu", "-m torch.distributed.run --standalone --nproc_per_node=2 -m scripts.base_train"),
        (8, "speedrun", "-m torch.distributed.run --standalone --nproc_per_node=8 -m scripts.base_train"),
    ],
)
def test_hardware_chooses(place: Path, gpus: int, preset: str, launch: str) -> None:
    program(place / "bin/nvidia-smi", f"for i in {{1..{gpus}}}; do echo 'GPU 0: some kind (UUID: x)'; done")
    assert speedrun(place).returncode == 0
    assert calls(place)[0] == f"-m scripts.plan --preset={preset} --gpus={gpus}"
    assert f"{launch} --preset={preset}" in calls(place)
    assert f"-m scripts.tok_train --preset={preset}" in calls(place)


def test_a_stopped_stage_stops_the_run(place: Path) -> None:
    done = speedrun(place, FAILING="mid_train", CODE="75")
    assert done.returncode == 75 and "run the same command again" in done.stderr
    assert calls(place)[-1].startswith("-m scripts.mid_train ")


@pytest.mark.parametrize("code", [1, 2, 130, 137])
def test_a_failed_stage_stops_the_run(place: Path, code: int) -> None:
    done = speedrun(place, FAILING="base_train", CODE=str(code))
    assert done.returncode == code and "again" not in done.stderr
    assert calls(place)[-1].startswith("-m scripts.base_train ")


def test_dry_run_runs_the_plan_alone(place: Path) -> None:
    done = speedrun(place, "--dry-run", "--preset", "smoke")
    assert done.returncode == 0 and calls(place) == ["-m scripts.plan --preset=smoke"]
    assert re.findall(r"-m scripts\.(\w+) --preset=smoke", done.stdout) == STAGES


@pytest.mark.parametrize(
    "words", [["--preset", "nope"], ["--preset"], ["--prest=smoke"], ["surprise"], ["--home"]]
)
def test_refused_in_two_lines(place: Path, words: list[str]) -> None:
    done = speedrun(place, *words)
    assert done.returncode == 2 and done.stdout == "" and calls(place) == []
    problem, hint = done.stderr.splitlines()
    assert problem.startswith("error: ") and hint.startswith("  hint: ")


def test_help(place: Path) -> None:
    done = speedrun(place, "--help")
    flags = ("--preset", "--home", "--tag", "--seed", "--dry-run", "--no-install")
    assert done.returncode == 0 and all(flag in done.stdout for flag in flags) and calls(place) == []
