"""kill -9 of base training at 20 random moments: the run that remains equals an undisturbed one, bit for bit.

A server process imports torch once and forks a child for each trial; the child is a whole base_train. Every
second kill waits for a checkpoint that is being written. The control is a run that forgets its place in the
data: this harness must see it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAVE_EVERY, NUM_STEPS, NUM_KILLS, SEED = 4, 30, 20, 5


@pytest.mark.slow
def test_killed_runs_equal_an_undisturbed_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    straight, runs = facts["straight"], facts["runs"]
    assert straight["steps"] == list(range(1, NUM_STEPS + 1)) and len(set(straight["losses"])) == NUM_STEPS
    assert len(runs) >= 2 and all(run == straight for run in runs), facts
    assert facts["kills"] == NUM_KILLS and facts["in_saves"] >= NUM_KILLS // 4, facts
    assert facts["lost"] == 0 and 0 < facts["most_redone"] <= SAVE_EVERY, facts
    assert facts["control"]["steps"] == straight["steps"] and facts["control"]["losses"] != straight["losses"]


# ---------------------------------------------------------------- the server


def train(home: Path, tag: str, forgetful: bool = False) -> int:
    """Fork a child that runs base_train to its end; its process id."""
    from nanochat import errors
    from nanochat.train import checkpointing as keep
    from scripts import base_train

    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        base_train.PRESETS["smoke"] = replace(base_train.PRESETS["smoke"], primer=None)  # test_train has one
        if forgetful:
            keep.join_arrays = lambda tree, arrays: None  # type: ignore[assignment]
        flags = ["--preset=smoke", "--device=cpu", "--dtype=float32", "--eval-every=0", "--sample-every=0"]
        flags += [f"--num-steps={NUM_STEPS}", f"--save-every={SAVE_EVERY}", "--batch-tokens=512"]
        code = errors.run(base_train.main, [*flags, f"--home={home}", f"--tag={tag}"])
        (home / "modules").write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def is_over(child: int) -> bool:
    """Whether a child has finished. Raises RuntimeError for one that has failed."""
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        raise RuntimeError(f"a run ended with exit code {os.waitstatus_to_exitcode(status)}")
    return bool(found)


def finish(child: int) -> None:
    while not is_over(child):
        time.sleep(0.001)


def kill(child: int) -> bool:
    """Kill a child that is not waited for yet; False if it had finished all the same."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status and not os.WIFSIGNALED(status):
        raise RuntimeError(f"a run ended with exit code {os.waitstatus_to_exitcode(status)}")
    return os.WIFSIGNALED(status)


def kill_at_random(child: int, ckpt: Path, rng: random.Random, seconds: float, saving: bool) -> bool:
    """Kill after a random time, or in one of the next three saves; False if the run was over before."""
    moment, patience = time.monotonic() + rng.random() * seconds, rng.random() * 0.003
    wanted, seen = rng.randint(1, 3), set(ckpt.glob("tmp-*"))
    wanted += len(seen)
    while not is_over(child):
        seen |= set(ckpt.glob("tmp-*"))
        if len(seen) >= wanted if saving else time.monotonic() > moment:
            time.sleep(patience if saving else 0)
            return kill(child)
        time.sleep(0.0003)
    return False


def stopped_halfway(child: int, ckpt: Path) -> bool:
    """Kill after the first checkpoint; False if the run was over before."""
    from nanochat import checkpoint

    while not checkpoint.list_steps(ckpt):
        if is_over(child):
            return False
        time.sleep(0.0003)
    return kill(child)


def outcome(home: Path, tag: str) -> dict[str, Any]:
    """Losses as bits and the hash of the last weights."""
    from nanochat import checkpoint
    from nanochat.home import Home
    from nanochat.run_dir import read_metrics

    found = checkpoint.load(Home(home).checkpoints(tag, "base"), repair=False)
    if found is None or found.step != NUM_STEPS:
        raise RuntimeError(f"{tag} has no last checkpoint")
    digest = hashlib.sha256()
    for name, array in sorted(found.tensors("model").items()):
        digest.update(name.encode() + array.tobytes())
    rows = [row for row in read_metrics(Home(home).metrics_file(tag, "base")) if "loss" in row]
    return {
        "steps": [row["step"] for row in rows],
        "losses": [row["loss"].hex() for row in rows],
        "weights": digest.hexdigest(),
    }


def prepare(home: Path) -> float:
    """A tokenizer, the undisturbed run, and in this process all that a child would import; its seconds."""
    import torch

    from nanochat import hardware
    from nanochat.corpus import document
    from nanochat.home import Home
    from nanochat.tokenizer import RustBPETokenizer

    torch.set_num_threads(1)
    hardware.matmul_rate(torch.float32)  # kept, so that no child measures it
    tok = RustBPETokenizer.train_from_iterator((document(1, i) for i in range(200)), 512)
    tok.save(Home(home).tokenizer_dir)
    finish(train(home, "straight"))
    for name in (home / "modules").read_text().splitlines():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    start = time.monotonic()
    finish(train(home, "twin"))
    return time.monotonic() - start


def serve(home: Path) -> dict[str, Any]:
    from nanochat import checkpoint
    from nanochat.home import Home
    from nanochat.run_dir import read_metrics

    seconds, rng, tags = prepare(home), random.Random(SEED), ["twin"]
    kills = in_saves = lost = most_redone = 0
    while kills < NUM_KILLS:
        tags.append(f"killed-{len(tags)}")
        ckpt, is_running = Home(home).checkpoints(tags[-1], "base"), True
        while is_running:
            before, old = checkpoint.list_steps(ckpt), set(ckpt.glob("tmp-*"))
            child = train(home, tags[-1])
            if kills == NUM_KILLS:
                finish(child)
                break
            is_running = kill_at_random(child, ckpt, rng, seconds / 2, saving=kills % 2 == 1)
            if is_running:
                kills += 1
                in_saves += bool(set(ckpt.glob("tmp-*")) - old)
                newest = (checkpoint.list_steps(ckpt) or [0])[-1]
                lost += newest < (before or [0])[-1]
                rows = read_metrics(Home(home).metrics_file(tags[-1], "base"))
                most_redone = max([most_redone, *(row["step"] - newest for row in rows)])

    forgetful = "forgetful"
    while not stopped_halfway(train(home, forgetful), Home(home).checkpoints(forgetful, "base")):
        forgetful += "-again"
    finish(train(home, forgetful, forgetful=True))
    return {
        "straight": outcome(home, "straight"), "runs": [outcome(home, tag) for tag in tags], "kills": kills,
        "in_saves": in_saves, "lost": lost, "most_redone": most_redone, "control": outcome(home, forgetful),
        "run_seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(serve(Path(sys.argv[1]))))
