"""Base training under torchrun: two gloo ranks equal one process, one rank continues what two began."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.corpus import document
from nanochat.home import Home
from nanochat.tokenizer import RustBPETokenizer
from nanochat.run_dir import read_metrics
from scripts import base_train

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "base_train.py")
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
STEPS = 18  # 8 of lessons, 10 of documents
FLAGS = ["--preset=smoke", "--device=cpu", "--dtype=float32", "--sample-every=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    tok = RustBPETokenizer.train_from_iterator((document(1, i) for i in range(200)), 512)
    tok.save(Home(root).tokenizer_dir)
    return root


def rows(root: Path, tag: str) -> list[dict]:
    return read_metrics(Home(root).metrics_file(tag, "base"))


def losses(root: Path, tag: str) -> list[float]:
    return [row["loss"] for row in rows(root, tag) if "loss" in row]


def torchrun(root: Path, tag: str, *flags: str) -> str:
    """What two ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    done = subprocess.run(
        [*command, *FLAGS, f"--home={root}", f"--tag={tag}", *flags],
        cwd=root, env=ENV, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_ranks_equal_one_and_one_continues_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the accumulation on one rank: the same rows, so the same losses, gradients and validation."""
    said = torchrun(root, "two")
    assert said.count(f"base: finished {STEPS} steps") == 1, "rank 0 alone speaks"
    base_train.main([*FLAGS, f"--home={root}", "--tag=one"])
    two, one = losses(root, "two"), losses(root, "one")
    assert len(two) == STEPS and two == pytest.approx(one, rel=1e-5)
    norms = [[row["grad_norm"] for row in rows(root, tag) if "loss" in row] for tag in ("two", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    bits = [[row["val_bpb"] for row in rows(root, tag) if "val_bpb" in row] for tag in ("two", "one")]
    assert len(bits[0]) == 4 and bits[0] == pytest.approx(bits[1], rel=1e-5)
    plans = [json.loads(Home(root).result_file(tag, "base").read_text())["plan"] for tag in ("two", "one")]
    assert [(p["world_size"], p["accum"], p["batch_tokens"]) for p in plans] == [(2, 1, 1024), (1, 2, 1024)]

    Home(root).result_file("two", "base").unlink()  # as if the run had been stopped; step 15 is of two ranks
    base_train.main([*FLAGS, f"--home={root}", "--tag=two", "--resume=15"])
    assert "continuing from step 15" in capsys.readouterr().out
    continued = losses(root, "two")
    assert continued[:15] == two[:15] and continued == pytest.approx(two, rel=1e-5)


@pytest.mark.slow
def test_two_agents_on_loopback_equal_one_process(root: Path) -> None:
    """Two torchrun agents, as on two machines (docs/multinode.md), with one rank each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
                "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}", SCRIPT, *FLAGS,
                f"--home={root}", "--tag=agents",
            ],
            env=ENV, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=250) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    assert said[0][0].count(f"base: finished {STEPS} steps") == 1 and "finished" not in said[1][0]
    base_train.main([*FLAGS, f"--home={root}", "--tag=alone"])
    assert losses(root, "agents") == pytest.approx(losses(root, "alone"), rel=1e-5)


@pytest.mark.parametrize("form", [[SCRIPT], ["-m", "scripts.base_train"]], ids=["file", "module"])
def test_both_forms_of_the_command(form: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *form, "--help"], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0 and not done.stderr and "--device-batch" in done.stdout


def test_a_batch_that_the_ranks_do_not_divide(root: Path) -> None:
    """Both ranks end with exit code 2 and name batches that work; on one rank this batch does."""
    flags = [*FLAGS, f"--home={root}", "--tag=odd", "--batch-tokens=1536", "--num-steps=1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *flags],
            env=ENV | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True, cwd=root,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, said = process.communicate(timeout=250)
        assert process.returncode == 2, said
        problem, hint = said.splitlines()[-2:]
        assert problem == (
            "error: the batch must be a multiple of ranks * device batch * T = 1024 tokens, found 1536; "
            "1024 and 2048 work"
        )
        assert hint.startswith("  hint: ")
    base_train.main(flags)
    assert losses(root, "odd")
