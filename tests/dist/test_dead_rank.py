"""A rank that dies or hangs in training: the others end within the timeout and 5 s, and name it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 6.0
PROGRAM = f"""
import os, sys, time
import torch
from nanochat import errors, runtime
from nanochat.data.loader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.loop import Rates, TrainState, fit

how = sys.argv[1]
rt = runtime.start("cpu", "float32", timeout_seconds={TIMEOUT})
torch.set_num_threads(1)
model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
model.init_weights(1)
optimizer = model.setup_optimizer(batch_tokens=1024, weight_decay=0.0)

def batches():
    step = 0
    while True:
        if rt.rank == 1 and step == 3:
            print("last step", time.time(), flush=True)
            if how == "dies":
                os._exit(9)
            time.sleep(300)
        ids = torch.arange(17).expand(2, 17)
        yield Batch(ids[:, :-1], ids[:, 1:], num_targets=32)
        step += 1

def main(argv):
    fit(model, optimizer, batches(), num_steps=50, accum=1, schedule=lambda step: Rates(1.0, 0.9), rt=rt,
        hooks=[], state=TrainState())

code = errors.run(main)
sys.stdout.flush(); sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
@pytest.mark.slow
def test_the_others_end_in_time_and_name_it(how: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        line = ranks[1].stdout.readline()
        assert line.startswith("last step"), ranks[1].stderr.read()[-2000:]
        said_at = float(line.split()[2])
        for rank in (0, 2):
            _, said = ranks[rank].communicate(timeout=120)
            assert time.time() - said_at < TIMEOUT + 5, said
            assert ranks[rank].returncode == 2, said
            assert "error: step 3: rank 1 (" in said, said
            assert "was last heard of waiting for data in step 3, and does not answer" in said, said
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
