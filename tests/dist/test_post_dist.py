"""chat_rl and chat_dpo under torchrun: two gloo ranks equal one process, and one rank continues what two began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.small_home import save_model
from helpers.rl_cases import Short

from nanochat.home import Home
from nanochat.run_dir import read_metrics
from scripts import chat_dpo, chat_rl
from tasks.reinforce import Goal

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
COMMON = ["--preset=smoke", "--device=cpu", "--dtype=float32", "--keep=9"]
PROGRAM = """
from nanochat import errors
from scripts import chat_rl
from helpers.rl_cases import Short
from tasks.reinforce import Goal
chat_rl.goal = lambda *args, **more: Goal(Short(7), {"short": Short(5)})
raise SystemExit(errors.run(chat_rl.main))
"""  # rewards that a random model gets now and then
NAMES = {
    "rl": ("loss", "grad_norm", "reward", "same_frac", "groups", "questions", "sampled_tokens", "kl", "clip_frac",
           "accuracy", "pass_at_2_short"),
    "dpo": ("loss", "grad_norm", "dpo_loss", "margin", "preferred_frac", "val_dpo_loss", "val_margin"),
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for tag in ("one", "two"):
        save_model(Home(tmp_path), "sft", tag=tag)
    monkeypatch.setattr(chat_rl, "goal", lambda *args, **more: Goal(Short(7), {"short": Short(5)}))  # type: ignore[arg-type]
    return tmp_path


def torchrun(script: Path, *flags: str) -> str:
    """What two ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), *flags], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def series(root: Path, tag: str, stage: str) -> dict[str, list[tuple[int, float]]]:
    rows = read_metrics(Home(root).metrics_file(tag, stage))
    return {name: [(row["step"], row[name]) for row in rows if name in row] for name in NAMES[stage]}


def assert_equal(root: Path, stage: str, num_steps: int) -> dict[str, list[tuple[int, float]]]:
    """Every series of "two" is that of "one" but for the last bits; no loss is missing."""
    two, one = series(root, "two", stage), series(root, "one", stage)
    assert [step for step, _ in two["loss"]] == list(range(1, num_steps + 1))
    for name in NAMES[stage]:
        assert two[name], f"{name} is not logged"
        assert [s for s, _ in two[name]] == [s for s, _ in one[name]], name
        assert [v for _, v in two[name]] == pytest.approx([v for _, v in one[name]], rel=2e-4, abs=2e-6), name
    return two


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--updates=2", "--clip=0.05", "--kl=0.1", "--refill=1"]])
def test_rl_on_two_ranks(root: Path, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Three questions on two ranks, two rows a pass: uneven shares, dropped groups, ranks without rows."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    flags = [*COMMON, f"--home={root}", "--steps=8", "--questions=3", "--samples=4", "--device-batch=2",
             "--lr-scale=2", "--eval-every=4", "--save-every=1", *more]  # fmt: skip
    said = torchrun(program, *flags, "--tag=two")
    assert said.count("rl: finished 8 steps") == 1, "rank 0 alone speaks"
    chat_rl.main([*flags, "--tag=one"])
    found = assert_equal(root, "rl", 8)
    shares = [value for _, value in found["same_frac"]]
    assert 0 < max(shares) and min(shares) < 1, "the run must drop some groups and keep some"
    assert any(value > 0 for _, value in found["kl"])

    Home(root).result_file("two", "rl").unlink()  # as if it had been stopped; with two updates within a round
    chat_rl.main([*flags, "--tag=two", "--resume=3"])
    assert "continuing from step 3" in capsys.readouterr().out
    assert_equal(root, "rl", 8)


@pytest.mark.slow
def test_dpo_on_two_ranks(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three pairs a step, one a pass: the second rank has one of them and an empty batch."""
    records: list[dict[str, Any]] = [
        {"prompt": "the " * (1 + i % 3) + "x" * (i % 5), "chosen": "green", "rejected": "blue sky " * (1 + i % 2)}
        for i in range(23)
    ]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    flags = [*COMMON, f"--home={root}", f"--data={data}", "--pairs=3", "--device-batch=2", "--lr-scale=0.5",
             "--eval-every=3", "--save-every=1"]  # fmt: skip
    said = torchrun(ROOT / "scripts" / "chat_dpo.py", *flags, "--tag=two")
    assert said.count("dpo: finished 7 steps") == 1
    chat_dpo.main([*flags, "--tag=one"])
    found = assert_equal(root, "dpo", 7)
    assert found["margin"][-1][1] > 0.01 > abs(found["margin"][0][1])

    Home(root).result_file("two", "dpo").unlink()
    chat_dpo.main([*flags, "--tag=two", "--resume=4"])
    assert "continuing from step 4" in capsys.readouterr().out
    assert_equal(root, "dpo", 7)
